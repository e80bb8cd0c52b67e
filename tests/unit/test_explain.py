"""The picture: it tells every flow and every route, the four forms agree, and no word of a user can forge anything."""

from __future__ import annotations

import json
import re
from dataclasses import fields, replace
from enum import Enum
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from securevllm import catalogue, explain
from securevllm.api.parse import parse
from securevllm.context import CidrPeer, Context, PodPeer, Selector, namespace
from securevllm.explain.words import Advisory, BlindSpot, Fact, Flow, Peer, Pods, Route
from securevllm.render.gateway import allowed_routes
from securevllm.render.meta import Owner
from securevllm.topology import PortRule, Role, Socket, plan

ROOT = Path(__file__).parents[2]
FINE: dict[str, Any] = {"model": {"name": "/models/llama"}, "image": "vllm/vllm-openai:v0.33.0"}
RICH: dict[str, Any] = {
    **FINE,
    "model": {"name": "a/b", "source": {"huggingFace": {}}},
    "gateway": {
        "routes": {"profiles": ["chat", "rerank"], "allow": [{"method": "POST", "path": "/pooling"}]},
        "authentication": {"none": "I accept that everybody may ask"},
        "tls": {"disabled": "the mesh of the platform has it"},
        "clients": {"namespaceSelector": {}, "cidrs": ["0.0.0.0/0"]},
    },
    "security": {"egress": [{"to": {"cidrs": ["0.0.0.0/0"]}, "ports": [{"port": 443}], "why": "images of users"}]},
}
EVENTS = {"from": {"podSelector": {}}, "why": "the router asks for it"}
SPLIT: dict[str, Any] = {
    **FINE,
    "disaggregation": {
        "connector": "mooncake",
        "router": {"image": "vllm/vllm-router:v0.1.17"},
        "prefill": {"replicas": 2, "parallelism": {"tensor": 8, "nodes": 2}},
        "decode": {"replicas": 3, "parallelism": {"tensor": 8, "nodes": 4}},
    },
    "security": {**RICH["security"], "kvEvents": EVENTS},
}
HYBRID: dict[str, Any] = {
    **RICH,
    "model": {"name": "/models/llama"},
    "parallelism": {"data": {"size": 8, "sizeLocal": 2, "loadBalancing": "hybrid"}},
    "security": {"kvEvents": EVENTS},
}
ATTACKS = (
    "<script>alert(1)</script>",
    "</style><img src=x onerror=alert(1)>",
    '" onload="alert(1)',
    "' --> ]]> &lt;b&gt;",
    '"] --> x\nclick r0_0 "https://example.org"',
    "`**b**` #quot; %%{init: {}}%%",
    "a\nflows everything -> engine\x1b[2J\u202e",
)


def view(**spec: Any) -> explain.View:
    return explain.view(Owner("llama", "apps", "uid"), parse("llama", {**FINE, **spec}), Context())


def filled(value: Any, words: str) -> Any:
    """The value with every string of it replaced, but those of enums."""
    match value:
        case Enum():
            return value
        case str():
            return words
        case tuple():
            return tuple(filled(item, words) for item in value)
        case (
            explain.View()
            | Advisory()
            | Fact()
            | Flow()
            | Peer()
            | Pods()
            | Route()
            | BlindSpot()
            | PortRule()
            | Socket()
        ):
            return replace(value, **{field.name: filled(getattr(value, field.name), words) for field in fields(value)})
        case int() | None:
            return value
    raise AssertionError(type(value))


class Skeleton(HTMLParser):
    """Tags and names of attributes in order; the text; values of attributes."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, ...]] = []
        self.text: list[str] = []
        self.values: dict[str, set[str]] = {}
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, *(name for name, _ in attrs)))
        for name, value in attrs:
            self.values.setdefault(name, set()).add(value or "")

    def handle_endtag(self, tag: str) -> None:
        self.tags.append((f"/{tag}",))

    def handle_data(self, data: str) -> None:
        self.text.append(data)


# --------------------------------------------------------------------------------------------------- what it tells


@pytest.mark.parametrize("spec", [FINE, RICH])
def test_every_flow_socket_and_pod_of_the_topology_is_told(spec: dict[str, Any]) -> None:
    topology, seen = plan(parse("llama", spec).spec, Context()), view(**spec)
    assert [flow.why for flow in seen.flows] == [flow.why for flow in topology.flows]
    assert [len(flow.peers) for flow in seen.flows] == [len(getattr(flow, "peers", ())) for flow in topology.flows]
    assert seen.sockets == topology.sockets
    assert [(item.role, item.replicas) for item in seen.pods] == [(item.role, item.replicas) for item in topology.pods]


def test_routes_are_those_of_the_gateway_with_who_opened_them() -> None:
    accepted, seen = parse("llama", RICH), view(**RICH)
    allowed = allowed_routes(accepted.spec, accepted.version)
    assert [(route.method, route.path) for route in seen.routes] == [(route.method, route.path) for route in allowed]
    opened = {route.path: route.opened_by for route in seen.routes}
    assert opened["/v1/models"] == "chat, rerank"
    assert opened["/v2/rerank"] == "rerank"
    assert opened["/pooling"] == "routes.allow"
    assert {route.path for route in seen.routes if not route.vllm_key} >= {"/pooling"}
    assert {route.path for route in seen.routes if route.streaming} >= {"/v1/chat/completions"}
    known = catalogue.routes_of(accepted.version).values()
    assert seen.refused + len(seen.routes) == len(known)
    closed = [route for route in known if route.never or route.method == catalogue.WEBSOCKET]
    assert seen.never == len(closed) > 10


def test_the_summary_of_the_default_is_closed() -> None:
    summary = view().summary
    assert [fact for fact in summary if fact.open] == []
    assert {fact.name: fact.words for fact in summary} == {
        "Who may connect": "every pod of namespace apps",
        "What they need": "the generated client key, Secret llama-client-keys;"
        " TLS, certificate of Secret llama-gateway-tls",
        "What they may ask": "3 exact routes; the gateway refuses everything else",
        "What an engine may reach": "DNS; nothing else",
        "What other pods may reach": "DNS; nothing else",
        "What the spec gives up": "nothing",
        "Published holes": "none that the catalogue knows",
    }


def test_the_summary_of_an_open_spec_says_so() -> None:
    seen = view(**RICH)
    facts = {fact.name: fact for fact in seen.summary}
    assert facts["Who may connect"].words == "every pod of every namespace and 0.0.0.0/0"
    assert facts["What they need"].words == "no key is asked for; plain HTTP"
    assert facts["What an engine may reach"].words == "DNS; 0.0.0.0/0 except 10 ranges at TCP 443; nothing else"
    assert facts["What other pods may reach"].words == "DNS; fetch to hub at TCP 443; nothing else"
    assert facts["What the spec gives up"].words == f"{len(seen.risks)} safe defaults, listed below"
    names = {"Who may connect", "What they need", "What an engine may reach", "What the spec gives up"}
    assert {fact.name for fact in seen.summary if fact.open} == names


OLD: dict[str, Any] = {
    "image": "vllm/vllm-openai:v0.21.0",
    "security": {"accept": [{"risk": "vllmVersionBelowFloor", "why": "the model needs this version"}]},
}


def test_published_holes_of_the_version_are_told_with_what_covers_them_in_every_form_but_the_chart() -> None:
    seen = view(**OLD)
    held = next(item for item in seen.advisories if item.id == "CVE-2026-48746")
    assert (held.severity, held.held, held.fixed_in) == (
        "critical",
        catalogue.CONTROLS["gateway-headers"],
        "0.22.0",
    )
    bare = next(item for item in seen.advisories if not item.held)
    fact = next(item for item in seen.summary if item.name == "Published holes")
    assert fact.open
    number = sum(not item.held for item in seen.advisories)
    assert fact.words == f"{len(seen.advisories)} advisories, {number} without a control; listed below"
    assert json.loads(explain.as_json(seen))["advisories"][0]["fixedIn"]
    for page in (explain.text(seen), unescape(explain.html(seen))):
        assert held.held in page
        assert f"vLLM {held.fixed_in} fixes it" in page
        assert bare.summary in page
        assert "nothing here keeps an attacker away" in page
        assert {item.id for item in seen.advisories if item.id not in page} == set()
    assert view().advisories == ()
    assert "none that the catalogue knows" in explain.text(view())


def test_keys_and_certificate_of_the_user_are_named() -> None:
    gateway = {
        "authentication": {"apiKeys": {"secretRefs": [{"name": "one"}, {"name": "two"}]}},
        "tls": {"secretName": "mine"},
    }
    needed = view(gateway=gateway).summary[1]
    assert needed == Fact("What they need", "a client key of Secret one, two; TLS, certificate of Secret mine")


@pytest.mark.parametrize(
    ("peer", "words"),
    [
        (PodPeer(), "every pod of namespace apps"),
        (PodPeer(None, Selector()), "every pod of namespace apps"),
        (PodPeer(Selector()), "every pod of every namespace"),
        (PodPeer(namespace("ops"), Selector((("a", "b"),))), "pods a=b of namespace ops"),
        (PodPeer(Selector((("t", "x"), ("u", "y")))), "every pod of namespaces t=x,u=y"),
        (PodPeer(None, Selector((), (("k", "In", ("a", "b")),))), "pods k in (a,b) of namespace apps"),
        (PodPeer(None, Selector((), (("k", "NotIn", ("a",)),))), "pods k notin (a) of namespace apps"),
        (PodPeer(None, Selector((), (("k", "Exists", ()),))), "pods k of namespace apps"),
        (PodPeer(None, Selector((), (("k", "DoesNotExist", ()),))), "pods !k of namespace apps"),
        (CidrPeer("0.0.0.0/0", ("10.0.0.0/8",)), "0.0.0.0/0 except 10.0.0.0/8"),
    ],
)
def test_peers_in_words(peer: PodPeer | CidrPeer, words: str) -> None:
    accepted = parse("llama", FINE)
    seen = explain.view(Owner("llama", "apps", "uid"), accepted, Context(dns=(peer,)))
    assert f"  engine -> dns [{words}] UDP 53, TCP 53: name resolution\n" in explain.text(seen)


def test_suspended_is_said_in_text_and_html() -> None:
    seen = view(suspend=True)
    assert "Suspended" in explain.text(seen)
    assert "Suspended" in explain.html(seen)
    assert {item.replicas for item in seen.pods} == {0}


def test_what_no_policy_sees_is_also_in_the_threat_model() -> None:
    page = " ".join((ROOT / "docs" / "threat-model.md").read_text(encoding="utf-8").replace("`", "").split()).lower()
    assert [item.name for item in explain.UNSEEN if item.name.lower() not in page] == []
    assert {"RDMA", "Plain HTTP"} <= {item.name for item in explain.UNSEEN}


# ---------------------------------------------------------------------------------------------------- the four forms


@pytest.mark.parametrize("spec", [FINE, RICH])
def test_all_forms_tell_every_reason_and_the_longer_ones_every_risk(spec: dict[str, Any]) -> None:
    seen = view(**spec)
    told = {
        "text": explain.text(seen),
        "json": explain.as_json(seen),
        "html": unescape(explain.html(seen)),
        "mermaid": re.sub(r"#(\d+);", lambda found: chr(int(found[1])), explain.mermaid(seen)),
    }
    for form, page in told.items():
        assert [flow.why for flow in seen.flows if flow.why not in page] == [], form
        if form != "mermaid":
            assert [risk for risk in seen.risks if risk not in page] == [], form
            assert [item.why for item in seen.unseen if item.why not in page] == [], form
            assert [route.path for route in seen.routes if route.path not in page] == [], form
            excluded = {part for flow in seen.flows for peer in flow.peers for part in peer.excluded}
            assert {part for part in excluded if part not in page} == set(), form


def test_json_has_the_names_of_kubernetes() -> None:
    data = json.loads(explain.as_json(view(**RICH)))
    assert set(data) == {field.name for field in fields(explain.View)}
    assert set(data["routes"][0]) == {"method", "path", "streaming", "vllmKey", "openedBy"}
    assert data["flows"][0]["ports"] == [{"port": 8080, "protocol": "TCP"}]
    assert data["flows"][0]["direction"] == "inbound"


def test_words_are_one_printable_line() -> None:
    egress = [{"to": {"podSelector": {}}, "ports": [{"port": 1}], "why": ATTACKS[-1]}]
    seen = view(security={"egress": egress})
    assert seen.flows[-1].why == r"a\u000aflows everything -> engine\u001b[2J\u202e"
    assert all(line.isprintable() for line in explain.text(seen).splitlines())
    assert explain.text(seen).count("\n") == explain.text(
        view(security={"egress": [{**egress[0], "why": "a b c d e f"}]})
    ).count("\n")


# -------------------------------------------------------------------------------------------------------------- HTML


@given(words=st.sampled_from(ATTACKS) | st.text(max_size=40))
def test_no_word_becomes_markup(words: str) -> None:
    assume(words not in set(Role))  # `filled` writes them into roles too, which no user does: the drawing places those
    seen = view(**RICH)
    harmless, attacked = (Skeleton(explain.html(filled(seen, text))) for text in ("x", words))
    assert attacked.tags == harmless.tags
    assert attacked.values == harmless.values


def test_words_are_shown_as_they_are() -> None:
    seen = view(**RICH)
    assert ATTACKS[0] in Skeleton(explain.html(filled(seen, ATTACKS[0]))).text


def test_nothing_is_loaded_and_nothing_runs() -> None:
    page = Skeleton(explain.html(view(**RICH)))
    assert {tag[0] for tag in page.tags} & {"script", "link", "img", "iframe", "object", "embed", "form", "a"} == set()
    assert {name for name in page.values if name.startswith("on")} == set()
    assert set(page.values) & {"src", "href", "style", "srcset", "action"} == set()
    style = explain.html(view()).split("<style>")[1].split("</style>")[0]
    assert re.findall(r"url\(|@import|@font-face", style) == []
    assert "default-src 'none'; style-src 'unsafe-inline'" in page.values["content"]
    assert "@media (prefers-color-scheme:dark)" in style


def test_every_colour_has_a_dark_form() -> None:
    light, dark = re.findall(r":root\{(.*?)\}", explain.html(view()), re.DOTALL)
    names = re.findall(r"--(\w+):", light)
    assert names == re.findall(r"--(\w+):", dark)
    assert re.findall(r"#[0-9a-f]{3,6}", explain.html(view()).split("</style>")[0].split(dark)[1]) == []


def test_tags_are_balanced() -> None:
    stack: list[str] = []
    for tag, *_ in Skeleton(explain.html(view(), view(**RICH))).tags:
        if tag.startswith("/"):
            assert stack.pop() == tag[1:]
        elif tag != "meta":
            stack.append(tag)
    assert stack == []


def test_several_resources_are_one_page() -> None:
    page = explain.html(view(), view(**RICH))
    assert page.count("<section>") == page.count("<svg ") == 2
    assert page.count("<html") == page.count("<h1>") - 1 == 1


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (RICH, 3 + 2 + 2 + 1),
        (SPLIT, 6 + 2 + 3 + 1),  # workers publish no events: with nodes only the head schedules
        (HYBRID, 2 + 2 + 1 + 1),
    ],
    ids=["one pod", "prefill and decode", "hybrid"],
)
def test_boxes_of_the_picture_stay_in_it_and_apart(spec: dict[str, Any], expected: int) -> None:
    picture = explain.html(view(**spec)).split("<svg")[1].split("</svg>")[0]
    _, top, width, height = map(int, re.findall(r'viewBox="(\S+) (\S+) (\S+) (\S+)"', picture)[0])
    boxes = [
        tuple(map(int, found))
        for found in re.findall(r'<rect class="(?:pod)?" x="(\d+)" y="(\d+)" width="(\d+)" height="(\d+)"', picture)
    ]
    assert len(boxes) == expected
    for index, (x, y, wide, high) in enumerate(boxes):
        assert x >= 0
        assert x + wide <= width
        assert top <= y
        assert y + high <= top + height
        for other_x, other_y, other_wide, other_high in boxes[index + 1 :]:
            assert x + wide <= other_x or other_x + other_wide <= x or y + high <= other_y or other_y + other_high <= y


def test_groups_are_told_once_for_all_that_are_alike() -> None:
    seen = view(**SPLIT)
    assert [(item.names, len(item.members)) for item in seen.groups] == [(("p0", "p1"), 2), (("d0", "d1", "d2"), 4)]
    text = explain.text(seen)
    assert "p0 to p1  prefill, prefill-worker" in text
    within = [flow for flow in seen.flows if flow.why.startswith("one model replica")]
    assert {(flow.source, flow.destination) for flow in within} == {
        ("prefill", "prefill-worker"),
        ("prefill-worker", "prefill"),
        ("decode", "decode-worker"),
        ("decode-worker", "decode"),
        ("decode-worker", "decode-worker"),
    }
    assert any(fact.name == "Who reads KV events" and fact.open for fact in seen.summary)
    assert "9 pods, each with each" in explain.html(seen)


# ----------------------------------------------------------------------------------------------------------- Mermaid

_LABEL = r'"((?:[A-Za-z0-9 .,:/=_-]|#\d+;)*)"'
_GRAMMAR = {
    "subgraph": re.compile(rf"  subgraph (s\d+)\[{_LABEL}\]"),
    "node": re.compile(rf" +([ro]\d+_\d+)(?:\[{_LABEL}\]|\(\[{_LABEL}\]\))"),
    "edge": re.compile(rf"  ([ro]\d+_\d+) -->\|{_LABEL}\| ([ro]\d+_\d+)"),
    "end": re.compile(r"  end"),
}


def parsed(chart: str) -> list[tuple[str, tuple[str, ...]]]:
    """Statements of a flowchart; fails at a line that is none."""
    head, *lines = chart.splitlines()
    assert head == "flowchart LR"
    found = []
    for line in lines:
        kinds = [(kind, match.groups()) for kind, rule in _GRAMMAR.items() if (match := rule.fullmatch(line))]
        assert len(kinds) == 1, line
        found.append((kinds[0][0], tuple(group for group in kinds[0][1] if group is not None)))
    return found


def test_mermaid_has_an_arrow_per_flow_between_known_nodes() -> None:
    views = (view(), view(**RICH))
    statements = parsed(explain.mermaid(*views))
    nodes = [told[0] for kind, told in statements if kind == "node"]
    edges = [told for kind, told in statements if kind == "edge"]
    assert len(nodes) == len(set(nodes))
    assert len(edges) == sum(len(seen.flows) for seen in views)
    names = {told[0]: told[1].split(" x")[0] for kind, told in statements if kind == "node"}
    assert [(names[start], names[end]) for start, _, end in edges] == [
        (flow.source, flow.destination) for seen in views for flow in seen.flows
    ]


@given(words=st.sampled_from(ATTACKS) | st.text(max_size=40))
def test_no_word_becomes_a_statement_of_mermaid(words: str) -> None:
    seen = view(**RICH)
    harmless, attacked = (parsed(explain.mermaid(filled(seen, text))) for text in ("x", words))
    assert [kind for kind, _ in attacked] == [kind for kind, _ in harmless]
