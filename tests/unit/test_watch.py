"""What `Watcher` says when something is wrong; the streams themselves are in tests/api/test_watch.py."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from kopf._cogs.clients.errors import APIError, APIForbiddenError, APINotFoundError, APIServerError

from securevllm import watch
from securevllm.api.kinds import CONFIG_MAP, POD, KubeObject
from securevllm.cluster import Listing, Login
from securevllm.errors import Forbidden, NotFound, OperatorError, Unavailable
from securevllm.store import Store, Watched
from securevllm.watch import Watcher
from tests.virtual_time import run


def refusal(cls: type[APIError], status: int, plural: str, group: str, message: str) -> APIError:
    payload: Any = {"kind": "Status", "code": status, "message": message, "details": {"kind": plural, "group": group}}
    return cls(payload, status=status, headers={})


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            refusal(APIForbiddenError, 403, "deployments", "apps", "cannot watch resource"),
            (
                "may not watch deployments.apps in all namespaces: cannot watch resource. "
                'Allow it: apiGroups: ["apps"], resources: ["deployments"], verbs: ["get", "list", "watch"]'
            ),
        ),
        (
            refusal(APINotFoundError, 404, "securevllmdeployments", "securevllm.io", "gone"),
            (
                "securevllmdeployments.securevllm.io is not served by the API server (gone). "
                "Install the CRD: kubectl apply --server-side -k crds"
            ),
        ),
        (
            refusal(APINotFoundError, 404, "horizontalpodautoscalers", "autoscaling", "gone"),
            (
                "horizontalpodautoscalers.autoscaling is not served by the API server (gone). "
                "This version of Kubernetes does not have it"
            ),
        ),
        (APIServerError("down", status=503, headers={}), "the watches have ended: APIServerError: down"),
        (OperatorError("as it is"), "as it is"),
    ],
)
def test_the_end_of_the_streams_is_explained(error: BaseException, said: str) -> None:
    assert str(watch._translate(error)) == said


def test_what_needs_a_person_comes_first() -> None:
    errors = [Unavailable("timeout"), OperatorError("install the CRD"), Unavailable("timeout")]

    assert watch._main_error(ExceptionGroup("lists", errors)) is errors[1]
    mistake = TypeError("our own")
    assert watch._main_error(ExceptionGroup("lists", [*errors, mistake])) is mistake


class Lists:
    """Answers lists by script; the rest of the client is not needed."""

    def __init__(self, *answers: list[KubeObject] | Exception) -> None:
        self.answers = [*answers]
        self.asked: list[tuple[str, str | None, str | None]] = []

    async def list(self, kind: Any, namespace: str | None = None, label_selector: str | None = None) -> Listing:
        self.asked.append((kind.kind, namespace, label_selector))
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return Listing(answer, 100)


class Quiet:
    """An observer that counts what was missed."""

    def __init__(self) -> None:
        self.kinds: list[str] = []
        self.missed: list[tuple[str, int]] = []

    def watch_event(self, kind: str, unix_time: float) -> None:
        assert unix_time > 0
        self.kinds.append(kind)

    def watch_missed(self, kind: str, changes: int) -> None:
        self.missed.append((kind, changes))


def cm(name: str, version: int, owner: str) -> KubeObject:
    metadata = {"name": name, "namespace": "x", "resourceVersion": str(version), "labels": {"owner": owner}}
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata}


def owner(obj: KubeObject) -> Iterator[str]:
    yield obj["metadata"]["labels"]["owner"]


def watcher(lists: Lists, store: Store, observer: Quiet, keys: list[str]) -> Watcher[str]:
    return Watcher(lists, Login(), store, keys_of=owner, sink=keys.append, observer=observer)  # type: ignore[arg-type]


def test_the_first_lists_are_repeated_until_all_have_answered() -> None:
    lists = Lists(Unavailable("no"), [], [cm("a", 5, "one")], [])
    store, observer, keys = Store([Watched(CONFIG_MAP, "mine"), Watched(POD)], namespaces=["x"]), Quiet(), list[str]()

    run(watcher(lists, store, observer, keys)._list_until_complete())

    assert lists.asked[0] == ("ConfigMap", "x", "mine")
    assert lists.asked[-1] == ("Pod", "x", None)
    assert store.unsynced() is None
    assert keys == ["one"]
    assert observer.missed == []


def test_a_resync_tells_both_owners_and_counts_what_was_missed() -> None:
    lists = Lists([cm("a", 7, "two"), cm("b", 8, "one")])
    store, observer, keys = Store([Watched(CONFIG_MAP)]), Quiet(), list[str]()
    store.hear(cm("a", 5, "one"))
    store.hear(cm("gone", 6, "three"))

    run(watcher(lists, store, observer, keys)._list_all(first=False))

    assert keys == ["one", "two", "one", "three"]
    assert observer.missed == [("ConfigMap", 3)]


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (Forbidden("no", status=403), r"may not watch configmaps in namespace x: no\. Allow it: "),
        (NotFound("no", status=404), r"configmaps is not served by the API server \(no\)"),
    ],
)
def test_a_kind_that_cannot_be_listed_ends_the_start(error: Exception, said: str) -> None:
    store = Store([Watched(CONFIG_MAP)], namespaces=["x"])

    with pytest.raises(OperatorError, match=said):
        run(watcher(Lists(error), store, Quiet(), [])._list_until_complete())


def test_silence_for_three_resyncs_is_unhealthy() -> None:
    store, observer = Store([Watched(CONFIG_MAP)]), Quiet()
    one = watcher(Lists([]), store, observer, [])
    assert one.unhealthy() is None
    run(one._list_until_complete())
    assert one.unhealthy() is None
    one._seen[CONFIG_MAP] -= 3 * 600.0 + 1.0

    assert one.unhealthy() == "no event and no list for 1800 s: configmaps"


async def test_the_login_of_kopf_is_ours(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "token").write_text("bound-token", encoding="utf-8")
    (tmp_path / "ca.crt").write_text("certificate", encoding="utf-8")
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", "443")
    login = Login(service_account=tmp_path)
    registry = watch._registry(Store([Watched(CONFIG_MAP), Watched(POD)]), login, lambda *_: None)

    (handler,) = registry._activities.get_all_handlers()
    log_in: Any = handler.fn
    info = await log_in()
    assert (info.server, info.token, info.scheme) == ("https://10.0.0.1:443", "bound-token", "Bearer")
    assert info.trust_env is False
    assert len(registry._watching.get_all_handlers()) == 2


def test_kopf_is_told_to_write_nothing_and_to_select_on_the_server() -> None:
    settings = watch._settings(Store([Watched(CONFIG_MAP, "mine"), Watched(POD)]))

    assert (settings.scanning.disabled, settings.posting.enabled, settings.peering.standalone) == (True, False, True)
    assert settings.process.ultimate_exiting_timeout is None
    assert [*settings.watching.label_selectors.values()] == ["mine"]
