"""What the benchmarks see from inside pods is what the gateway does: the same program, here without a pod."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from bench import in_pod
from tests.api.kube import eventually
from tests.gateway.gateway import KEYS, MODEL, Gateway, started

pytestmark = pytest.mark.envoy


@contextmanager
def looking(config: dict[str, Any]) -> Iterator[list[dict[str, Any]]]:
    seen: list[dict[str, Any]] = []
    command = [sys.executable, "-u", in_pod.__file__, json.dumps(config)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:  # noqa: S603
        assert process.stdin
        assert process.stdout
        lines = process.stdout
        thread = threading.Thread(target=lambda: seen.extend(json.loads(line) for line in lines))
        thread.start()
        yield seen
        process.stdin.close()
        thread.join(30)
        assert process.wait(30) == 0, "it ends with its standard input"


def asked(gateway: Gateway, authority: str, key: str, **more: Any) -> dict[str, Any]:
    place = {"address": "127.0.0.1", "port": gateway.port, "host": "gateway", "authority": authority}
    request = {"method": "GET", "path": "/v1/models", "headers": {"Authorization": f"Bearer {key}"}, "body": None}
    return place | request | {"what": "key", "every": False, "pause": 0.01} | more


def test_turns_are_seen_in_their_order_and_every_answer_where_that_is_asked_for(
    tmp_path: Path, certificate: tuple[str, str]
) -> None:
    def until(wanted: Callable[[dict[str, Any]], bool]) -> None:
        eventually(lambda: any(wanted(one) for one in list(seen)), 60)

    with started(MODEL, tmp_path, certificate) as gateway:
        door = f"127.0.0.1:{gateway.port}"
        body = {"method": "POST", "path": "/v1/chat/completions", "body": json.dumps({"stream": 3, "interval": 0.01})}
        alice, bob = (asked(gateway, certificate[0], key.key) for key in KEYS)
        load = alice | {"what": "load", "every": True}
        with looking({"dials": [door], "asks": [bob, load], "streams": [alice | body]}) as seen:
            until(lambda one: (one["what"], one["answer"]) == (door, "open"))
            until(lambda one: (one["what"], one["answer"]) == ("key", 200))
            gateway.envoy.keys(KEYS[:1])
            until(lambda one: (one["what"], one["answer"]) == ("key", 401))
            gateway.envoy.keys(KEYS)
            eventually(lambda: [one["answer"] for one in seen if one["what"] == "key"] == [200, 401, 200], 60)
            eventually(lambda: sum(one["kind"] == "stream" for one in seen) > 1, 60)
            eventually(lambda: sum(one["what"] == "load" for one in seen) > 3, 60)
    streams = [one for one in seen if one["kind"] == "stream"]
    assert not any(one["answer"] for one in streams), "this engine's streams do not end as vLLM's do"
    assert {one["by"] for one in streams} == {"data: 2"}
    assert {one["answer"] for one in seen if one["what"] == "load"} == {200}


def test_a_door_that_closes_and_opens_is_told_twice() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        door = f"127.0.0.1:{port}"
        with looking({"dials": [door], "asks": [], "streams": []}) as seen:
            eventually(lambda: [one["answer"] for one in seen] == ["open"], 60)
            server.close()
            eventually(lambda: [one["answer"] for one in seen] == ["open", "blocked"], 60)
            with socket.create_server(("127.0.0.1", port)):
                eventually(lambda: [one["answer"] for one in seen] == ["open", "blocked", "open"], 60)
    assert [one["at"] for one in seen] == sorted(one["at"] for one in seen)
