"""I11 over releases: what an earlier one has pinned is known again, so that an upgrade restarts nobody.

The hashes were printed by the code of those releases. One that does not fit any more restarts every engine of every
cluster that is upgraded: mend `inputs`, never the hash.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

from securevllm.api.parse import parse
from securevllm.context import Context
from securevllm.render import Observed, Rendered, render
from securevllm.render.accepted import Pin, read
from securevllm.render.meta import Owner

OWNER = Owner("llama", "apps", "uid-1")
SMALLEST: dict[str, Any] = {"model": {"name": "/models/llama"}, "image": "vllm/vllm-openai:v0.33.0"}
HUB = {"to": {"cidrs": ["203.0.113.0/24"]}, "ports": [{"port": 443}], "why": "images are there"}
READERS = {"from": {"cidrs": ["203.0.113.0/24"]}, "why": "the cache router reads them"}


@dataclass(frozen=True)
class Former:
    """A spec that an earlier release has accepted, and what it wrote down: workload to hash of the inputs."""

    name: str
    spec: dict[str, Any]
    pins: dict[str, str]


RELEASE_0_1_0 = [
    Former("plain", {}, {"engine": "9b03bc9b9bb5c0bf", "gateway": "4193e95b1864bba5"}),
    Former(
        "engine",
        {
            "imagePullSecrets": [{"name": "pull"}],
            "parallelism": {"tensor": 2},
            "ports": {"api": 8080},
            "engine": {"args": ["--max-model-len=4096"]},
        },
        {"engine": "a79565215d6565f9", "gateway": "6e2153d04ec99f9e"},
    ),
    Former(
        "media", {"security": {"media": {"allowedDomains": ["images.example.com"]}}}, {"engine": "07b0bed897393744"}
    ),
    Former(
        "gateway",
        {"gateway": {"limits": {"requestBody": "1Mi"}, "tls": {"secretName": "own"}}},
        {"engine": "9b03bc9b9bb5c0bf", "gateway": "e5cf8837f8fda473"},
    ),
    Former(
        "open",
        {
            "gateway": {
                "authentication": {"none": "I accept that anybody asks"},
                "tls": {"disabled": "the ingress has it"},
            }
        },
        {"engine": "9b03bc9b9bb5c0bf", "gateway": "434f8a7d410a2431"},
    ),
]
BEFORE_0_2_0 = [
    Former("plain", {}, {"engine": "30d7d273db5fbe0f", "gateway": "4193e95b1864bba5"}),
    Former(
        "proxy",
        {"security": {"egress": [{**HUB, "proxy": "http://p.example.com:443"}]}},
        {"engine": "4936fd75b1dd1ca7"},
    ),
    Former("kv-events", {"security": {"kvEvents": READERS}}, {"engine": "184b2c8aba82209c"}),
    Former(
        "nodes",
        {"parallelism": {"tensor": 2, "nodes": 2}},
        {"engine/2x1/head": "a01cc791b1e62ae6", "engine/2x1/others": "a01cc791b1e62ae6"},
    ),
    Former(
        "prefill-decode",
        {
            "disaggregation": {
                "connector": "nixl",
                "router": {"image": "vllm/vllm-router:v0.1.17"},
                "decode": {"parallelism": {"tensor": 2}},
            }
        },
        {"prefill/1x1": "ca008044e95ab3bb", "decode/1x1": "c7a9e89087c19be7", "router": "a5b8d16e73149a38"},
    ),
]


def old_template(spec: dict[str, Any], workload: str) -> Any:
    """A template that no release renders."""
    fresh = render(OWNER, parse(OWNER.name, spec), Context(), Observed())
    pins = kept_of(fresh)
    assert workload in pins, f"no such workload: {', '.join(pins)}"
    template = pins[workload].template
    return {**template, "spec": {**template["spec"], "terminationGracePeriodSeconds": 7}}


def kept_of(rendered: Rendered) -> dict[str, Pin]:
    kept = read(OWNER, rendered.configuration[0]["data"], b"")
    assert kept is not None
    return dict(kept.pins)


@pytest.mark.parametrize("former", [*RELEASE_0_1_0, *BEFORE_0_2_0], ids=lambda former: former.name)
def test_what_an_earlier_release_has_pinned_stays_and_is_only_reported(former: Former) -> None:
    spec = {**SMALLEST, **former.spec}
    pins = {name: Pin(inputs, old_template(spec, name)) for name, inputs in former.pins.items()}
    rendered = render(OWNER, parse(OWNER.name, spec), Context(), Observed(pins=pins))
    kept = kept_of(rendered)
    # As it was, hash included: after a rollback the earlier release looks for its own.
    assert {name: kept[name] for name in pins} == pins
    assert set(rendered.outdated) >= {name.partition("/")[0] for name in pins}


@pytest.mark.parametrize("former", [*RELEASE_0_1_0, *BEFORE_0_2_0], ids=lambda former: former.name)
@pytest.mark.parametrize(
    "change",
    [
        {"engine": {"args": ["--max-model-len=2048"]}},
        {"image": "registry.example.com/vllm-openai:v0.33.0"},
        {
            "security": {
                "kvEvents": {**READERS, "why": "another reader"},
                "gate": {"disabled": "the network is measured"},
            }
        },
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_change_of_the_spec_still_rolls_the_engines(former: Former, change: dict[str, Any]) -> None:
    spec = {**SMALLEST, **former.spec}
    pins = {name: Pin(inputs, old_template(spec, name)) for name, inputs in former.pins.items()}
    rendered = render(OWNER, parse(OWNER.name, {**spec, **change}), Context(), Observed(pins=pins))
    kept = kept_of(rendered)
    for name, pin in pins.items():
        if name not in {"gateway", "router"}:
            assert kept[name].template != pin.template


def test_what_0_1_0_will_find_after_a_rollback_is_what_it_would_have_written() -> None:
    """A new pin has the hash that 0.1.0 gives the same spec, as long as the spec asks for nothing that it lacks."""
    for former in RELEASE_0_1_0:
        kept = kept_of(render(OWNER, parse(OWNER.name, {**SMALLEST, **former.spec}), Context(), Observed()))
        assert {name: kept[name].inputs for name in former.pins} == former.pins
