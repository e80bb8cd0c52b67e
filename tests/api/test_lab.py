"""What other tests take as evidence: the checkers see what they are there to see, and a cut network is cut."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace

import pytest

from securevllm.render.meta import DENY_NAME
from tests.api.audit import Request
from tests.api.kube import eventually
from tests.api.lab import deny_gone_too_early, policies_before_pods
from tests.api.link import Cut, Link

OPERATOR, PERSON, KUBELET = "operator", "person", "kubelet"


def request(
    verb: str, resource: str, name: str = "", *, code: int = 200, user: str = OPERATOR, owner: str = ""
) -> Request:
    return Request("", "", verb, resource, "ns", name, "", code, user, "", owner)


POLICIES = [
    request("patch", "networkpolicies", DENY_NAME, code=201),
    request("patch", "networkpolicies", "llama-engine", code=201, owner="one"),
]
POD = request("create", "pods", code=201, user="replicaset-controller")
GONE = request("delete", "pods", "llama-engine-1", user=KUBELET)
NO_DENY = request("delete", "networkpolicies", DENY_NAME)


def test_a_pod_template_before_its_policies_is_seen_and_one_after_them_is_not() -> None:
    template = request("patch", "deployments", "llama-engine", code=201, owner="one")
    assert policies_before_pods([*POLICIES, template], {OPERATOR}) == []
    for missing in POLICIES:
        found = policies_before_pods([*(item for item in POLICIES if item != missing), template, missing], {OPERATOR})
        assert len(found) == 1
        assert missing.name in found[0]


@pytest.mark.parametrize(
    ("resource", "name", "policy"),
    [
        ("deployments", "llama-gateway", "llama-gateway"),
        ("jobs", "llama-fetch-0a1b2c", "llama-fetch"),
        ("statefulsets", "llama-e1-0", "llama-e1"),
    ],
)
def test_each_kind_of_workload_needs_the_policy_of_its_pods(resource: str, name: str, policy: str) -> None:
    workload = request("patch", resource, name, code=201, owner="one")
    there = request("patch", "networkpolicies", policy, code=201, owner="one")
    assert policies_before_pods([POLICIES[0], there, workload], {OPERATOR}) == []
    assert policies_before_pods([POLICIES[0], workload, there], {OPERATOR}) != []
    # A resource that is made anew begins without any, whatever still arrives for the one before it.
    anew, its = replace(workload, owner="two"), replace(there, owner="two")
    assert policies_before_pods([POLICIES[0], there, anew], {OPERATOR}) != []
    assert policies_before_pods([POLICIES[0], there, its, anew, workload], {OPERATOR}) == []
    # What a person wrote into the policies of before does not stand for those of the operator.
    assert policies_before_pods([POLICIES[0], replace(there, user=PERSON), workload], {OPERATOR}) != []
    # Removed by the operator, it is gone for every uid.
    gone = request("delete", "networkpolicies", policy)
    assert policies_before_pods([POLICIES[0], there, gone, workload], {OPERATOR}) != []


def test_a_default_deny_that_goes_before_the_last_pod_is_seen_and_one_that_goes_after_it_is_not() -> None:
    assert deny_gone_too_early([*POLICIES, POD, GONE, NO_DENY], {OPERATOR}) == []
    assert len(deny_gone_too_early([*POLICIES, POD, NO_DENY, GONE], {OPERATOR})) == 1
    assert len(deny_gone_too_early([*POLICIES, POD, POD, GONE, NO_DENY], {OPERATOR})) == 1


def test_a_pod_that_is_made_again_under_its_name_has_to_go_again() -> None:
    made = request("create", "pods", "llama-e0-0-0", code=201, user="statefulset-controller")
    gone = request("delete", "pods", "llama-e0-0-0", user=KUBELET)
    assert deny_gone_too_early([made, gone, gone, made, gone, NO_DENY], {OPERATOR}) == []
    assert deny_gone_too_early([made, gone, gone, made, NO_DENY], {OPERATOR}) != []
    assert deny_gone_too_early([POD, made, gone, gone, NO_DENY], {OPERATOR}) != []


@pytest.mark.parametrize("code", [404, 504])
def test_a_pod_counts_as_removed_when_the_answer_to_it_was_lost(code: int) -> None:
    assert deny_gone_too_early([POD, replace(GONE, code=code), NO_DENY], {OPERATOR}) == []
    assert deny_gone_too_early([POD, replace(GONE, code=409), NO_DENY], {OPERATOR}) != []


def test_what_a_person_deletes_or_the_server_refused_is_not_the_operators_doing() -> None:
    assert deny_gone_too_early([POD, replace(NO_DENY, user=PERSON)], {OPERATOR}) == []
    assert deny_gone_too_early([POD, replace(NO_DENY, code=409)], {OPERATOR}) == []
    assert deny_gone_too_early([POD, NO_DENY], {OPERATOR}) != []


# ------------------------------------------------------------------------------------------------------------ the link


@contextmanager
def echo() -> Iterator[tuple[int, list[bytes]]]:
    """A server that answers what it is told; its port, and what it was told."""
    heard: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            while True:
                try:
                    connection, _ = listening.accept()
                except OSError:
                    return
                threading.Thread(target=answer, args=(connection,), daemon=True).start()

        def answer(connection: socket.socket) -> None:
            with connection, suppress(ConnectionError):
                while data := connection.recv(100):
                    heard.append(data)
                    connection.sendall(data)

        thread = threading.Thread(target=serve)
        thread.start()
        yield listening.getsockname()[1], heard
        listening.shutdown(socket.SHUT_RDWR)
    thread.join()


@pytest.fixture
def link() -> Iterator[tuple[Link, socket.socket, list[bytes]]]:
    """A connection through a link that works."""
    with (
        echo() as (port, heard),
        Link(port) as between,
        socket.create_connection(("127.0.0.1", between.port), timeout=20) as connection,
    ):
        connection.sendall(b"hello")
        assert connection.recv(100) == b"hello"
        yield between, connection, heard
        between.cut(None)


def silent(connection: socket.socket) -> bool:
    """Whether nothing comes for a while."""
    connection.settimeout(0.3)
    try:
        return not connection.recv(100)
    except TimeoutError:
        return True
    finally:
        connection.settimeout(20)


def test_a_silent_link_delivers_nothing_and_all_of_it_when_it_is_back(
    link: tuple[Link, socket.socket, list[bytes]],
) -> None:
    between, connection, heard = link
    between.cut(Cut.SILENT)
    connection.sendall(b"there?")
    assert silent(connection)
    assert heard == [b"hello"]
    between.cut(None)
    assert connection.recv(100) == b"there?"


def test_a_silent_link_delivers_what_a_client_said_that_has_given_up(
    link: tuple[Link, socket.socket, list[bytes]],
) -> None:
    between, connection, heard = link
    between.cut(Cut.SILENT)
    connection.sendall(b"late")
    connection.close()
    between.cut(None)
    eventually(lambda: heard == [b"hello", b"late"])


def test_a_deaf_link_delivers_requests_and_no_answer(link: tuple[Link, socket.socket, list[bytes]]) -> None:
    between, connection, heard = link
    between.cut(Cut.DEAF)
    connection.sendall(b"do it")
    eventually(lambda: heard == [b"hello", b"do it"])
    assert silent(connection)
    between.cut(None)
    assert connection.recv(100) == b"do it"


def test_a_link_that_refuses_breaks_what_is_open_and_takes_nothing_new(
    link: tuple[Link, socket.socket, list[bytes]],
) -> None:
    between, connection, _ = link
    between.cut(Cut.REFUSED)
    with pytest.raises(ConnectionError):
        received(connection)
    with (
        pytest.raises(ConnectionError),
        socket.create_connection(("127.0.0.1", between.port), timeout=20) as another,
    ):
        received(another)
    between.cut(None)
    with socket.create_connection(("127.0.0.1", between.port), timeout=20) as another:
        another.sendall(b"back")
        assert another.recv(100) == b"back"


def received(connection: socket.socket) -> bytes:
    """What comes; the end of a connection is an error here."""
    data = connection.recv(100)
    if not data:
        raise ConnectionAbortedError("ended")
    return data
