"""Prefill and decode: the side channel and the data sockets, reached at the first request, by the real router too."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from tests.fake.service import MODEL, Service, Vllm, free_port, own_address, request

CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}


def side(service: Service, connector: str, role: str, *flags: str, env: Mapping[str, str] | None = None) -> Vllm:
    """One server of a side."""
    config = json.dumps({"kv_connector": connector, "kv_role": role, "kv_load_failure_policy": "fail"})
    address = own_address()
    own = {"VLLM_NIXL_SIDE_CHANNEL_HOST": address, **(env or {})}
    return service.vllm(f"--kv-transfer-config={config}", *flags, address=address, env=own)


def transferred(prefill: Vllm, decode: Vllm, more: Mapping[str, Any]) -> tuple[int, Any]:
    """One request as a router splits it."""
    asked = CHAT | {
        "max_tokens": 1,
        "kv_transfer_params": {"do_remote_decode": True, "do_remote_prefill": False} | dict(more),
    }
    status, first = prefill.ask("POST", "/v1/chat/completions", asked)
    assert status == 200, first
    return decode.ask(
        "POST", "/v1/chat/completions", CHAT | {"kv_transfer_params": first["kv_transfer_params"] | dict(more)}
    )


def test_nixl(service: Service) -> None:
    prefill = side(service, "NixlConnector", "kv_producer", "--tensor-parallel-size=2")
    decode = side(service, "NixlConnector", "kv_consumer")
    prefill.healthy()
    decode.healthy()
    assert prefill.opened() == {"api": 1, "nixl-side-channel": 1, "nixl-data": 2, "gloo": 2, "nccl": 2}
    assert decode.opened() == {"api": 1, "nixl-side-channel": 1, "nixl-data": 1, "gloo": 1}
    status, answer = transferred(prefill, decode, {})
    assert (status, answer["choices"][0]["finish_reason"]) == (200, "stop")


def test_nixl_with_a_dead_prefill_fails_the_request_and_not_the_server(service: Service) -> None:
    prefill = side(service, "NixlConnector", "kv_producer")
    decode = side(service, "NixlConnector", "kv_consumer")
    prefill.healthy()
    decode.healthy()
    params = {"do_remote_decode": True, "do_remote_prefill": False}
    offered = prefill.ask("POST", "/v1/completions", {"prompt": "hi", "kv_transfer_params": params})[1][
        "kv_transfer_params"
    ]
    prefill.end()
    status, answer = decode.ask("POST", "/v1/completions", {"prompt": "hi", "kv_transfer_params": offered})
    assert status == 500
    assert "side channel" in answer["error"]["message"]
    assert decode.ask("GET", "/health")[0] == 200


def test_mooncake(service: Service) -> None:
    port = str(free_port())
    prefill = side(
        service,
        "MooncakeConnector",
        "kv_producer",
        "--tensor-parallel-size=2",
        env={"VLLM_MOONCAKE_BOOTSTRAP_PORT": port},
    )
    decode = side(service, "MooncakeConnector", "kv_consumer")
    prefill.healthy()
    decode.healthy()
    data = {"mooncake-side-channel": 1, "mooncake-transfer": 1, "mooncake-tcp": 1}
    assert decode.opened() == {"api": 1, "gloo": 1, **data}
    both = dict.fromkeys((*data, "gloo", "nccl"), 2)
    assert prefill.opened() == {"api": 1, "mooncake-bootstrap": 1, **both}
    bootstrap = f"http://{prefill.address}:{port}"
    status, registered = request("GET", f"{bootstrap}/query")
    assert (status, list(registered), sorted(registered["0"]["worker_addr"])) == (200, ["0"], ["0", "1"])
    more = {"transfer_id": "t", "remote_bootstrap_addr": bootstrap, "remote_engine_id": registered["0"]["engine_id"]}
    assert transferred(prefill, decode, more)[0] == 200
