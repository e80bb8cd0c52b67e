"""The picture as one HTML page for a reviewer: self-contained, light and dark, nothing in it is run or loaded."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from securevllm.explain.markup import Html, el
from securevllm.explain.picture import picture
from securevllm.explain.words import (
    CAVEAT,
    CLOSED,
    Advisory,
    Direction,
    Fact,
    Flow,
    Peer,
    Pods,
    View,
    concern,
    refused,
    target,
)

if TYPE_CHECKING:
    from securevllm.topology import Socket

_STYLE = """
:root{color-scheme:light dark;--ink:#1a2230;--soft:#566070;--page:#fff;--box:#f3f5f9;--line:#c9d0db;
--in:#0b62c4;--own:#1c7a43;--out:#9a4b00;--warn:#b3261e}
@media (prefers-color-scheme:dark){:root{--ink:#e6eaf0;--soft:#a3adbb;--page:#11161d;--box:#1b232d;--line:#3a4553;
--in:#79b4ff;--own:#6fd196;--out:#ffb066;--warn:#ff8a80}}
*{box-sizing:border-box}
body{margin:0 auto;padding:1.5rem;max-width:70rem;background:var(--page);color:var(--ink);
font:16px/1.5 system-ui,sans-serif;overflow-wrap:anywhere}
h1{margin:0;font-size:1.6rem}h2{margin:2rem 0 .5rem;font-size:1.15rem}p{margin:.3rem 0}
section+section{margin-top:4rem;border-top:3px double var(--line);padding-top:1.5rem}
.soft{color:var(--soft)}code{font:.92em ui-monospace,monospace}
.facts{display:grid;grid-template-columns:repeat(auto-fit,minmax(18rem,1fr));gap:.75rem;margin:1.2rem 0}
.fact{background:var(--box);border-left:4px solid var(--own);border-radius:4px;padding:.6rem .8rem}
.fact b{display:block;font-size:.82rem;color:var(--soft)}.open{border-color:var(--warn)}
.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-size:.92rem}
th,td{text-align:left;vertical-align:top;padding:.35rem .9rem .35rem 0;border-bottom:1px solid var(--line)}
th{color:var(--soft);font-weight:600}td{min-width:5rem}
td .inbound,td .internal,td .outbound,.port{white-space:nowrap}
.inbound{color:var(--in)}.internal{color:var(--own)}.outbound{color:var(--out)}.warn{color:var(--warn)}
.closed{border-left:4px solid var(--own);background:var(--box);padding:.5rem .8rem;margin-top:.6rem}
ul{margin:.3rem 0;padding-left:1.2rem}summary{cursor:pointer}
svg{display:block;width:100%;min-width:40rem;height:auto;font:14px system-ui,sans-serif}
svg rect{fill:var(--box);stroke:var(--line)}svg .pod{stroke:var(--own);stroke-width:2}
svg .frame{fill:none;stroke:var(--soft);stroke-dasharray:6 5}
svg text{fill:currentColor;text-anchor:middle}svg .name{font-weight:600}svg .small{font-size:12px;fill:var(--soft)}
svg g.edge text{font-size:12px}svg g.edge .beside{text-anchor:start}
svg line{stroke:currentColor;stroke-width:1.8}svg polygon{fill:currentColor}
"""


def html(*views: View) -> str:
    """One self-contained page, light and dark by the reader's setting; nothing in it is run or loaded."""
    title = f"Who may talk to whom: {', '.join(f'{seen.namespace}/{seen.name}' for seen in views)}"
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    head = el(
        "head",
        Html('<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'),
        Html(f'<meta http-equiv="Content-Security-Policy" content="{policy}">'),
        el("title", title),
        el("style", Html(_STYLE)),
    )
    body = el("body", *(_section(seen) for seen in views))
    return f"<!doctype html>\n{el('html', head, body, lang='en')}\n"


def _section(seen: View) -> Html:
    suspended = [el("p", el("b", "Suspended: "), "no pods of engine and gateway; the policies are kept.")]
    return el(
        "section",
        el("h1", f"{seen.namespace}/{seen.name}"),
        el("p", el("code", seen.model), f" by vLLM {seen.version}, ", el("code", seen.image), class_="soft"),
        el("p", "Clients use ", el("code", seen.url)),
        *(suspended if seen.suspended else []),
        el("p", CAVEAT, class_="soft"),
        el("div", *map(_fact, seen.summary), class_="facts"),
        el("h2", "Who may talk to whom"),
        el("div", picture(seen), class_="scroll"),
        _table(("", "From", "To", "Port", "Why"), [_flow_row(flow) for flow in seen.flows]),
        el("p", CLOSED, class_="closed"),
        el("h2", "Routes that pass the gateway"),
        _table(
            ("Method", "Path", "Answer", "vLLM's own key", "Opened by"),
            [
                (
                    el("code", route.method),
                    el("code", route.path),
                    "may stream" if route.streaming else "whole",
                    "asked for" if route.vllm_key else el("span", "not asked for: only the gateway's", class_="warn"),
                    route.opened_by,
                )
                for route in seen.routes
            ],
        ),
        el("p", refused(seen), class_="closed"),
        el("h2", "What the spec gives up"),
        el("ul", *(el("li", risk, class_="warn") for risk in seen.risks)) if seen.risks else el("p", "Nothing."),
        el("h2", "Published holes in this vLLM"),
        el("ul", *map(_advisory, seen.advisories)) if seen.advisories else el("p", "None that the catalogue knows."),
        el("h2", "What no NetworkPolicy sees"),
        el("ul", *(el("li", el("b", f"{item.name}. "), item.why) for item in seen.unseen)),
        el("h2", "What listens"),
        _table(
            ("Role", "Pods", "Socket", "Port", "Purpose", "Set by"),
            [row for item in seen.pods for row in _socket_rows(item, seen.sockets)],
        ),
    )


def _advisory(advisory: Advisory) -> Html:
    told = el("span", concern(advisory), class_="soft" if advisory.held else "warn")
    return el("li", el("b", f"{advisory.severity} {advisory.id}. "), advisory.summary, " ", told)


def _fact(fact: Fact) -> Html:
    return el("div", el("b", fact.name), fact.words, class_="fact open" if fact.open else "fact")


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> Html:
    return el(
        "div",
        el(
            "table",
            el("thead", el("tr", *(el("th", cell) for cell in head))),
            el("tbody", *(el("tr", *(el("td", cell) for cell in row)) for row in rows)),
        ),
        class_="scroll",
    )


def _flow_row(flow: Flow) -> tuple[str, ...]:
    peers = el("div", *(_html_peer(peer) for peer in flow.peers), class_="soft")
    start, end = el("b", flow.source), el("b", target(flow))
    inbound, outbound = flow.direction is Direction.INBOUND, flow.direction is Direction.OUTBOUND
    return (
        el("span", flow.direction.value, class_=flow.direction.value),
        el("div", start, peers) if inbound else start,
        el("div", end, peers) if outbound else end,
        el("div", *(el("div", str(rule), class_="port") for rule in flow.ports)),
        flow.why,
    )


def _html_peer(peer: Peer) -> Html:
    if not peer.excluded:
        return el("div", peer.words)
    summary = el("summary", f"{peer.words} except {len(peer.excluded)} ranges")
    return el("details", summary, ", ".join(peer.excluded))


def _socket_rows(pods: Pods, sockets: Iterable[Socket]) -> list[tuple[str, ...]]:
    own = [item for item in sockets if item.role == pods.role]
    count = str(pods.replicas)
    if not own:
        return [(pods.role, count, "none", "", "", "")]
    return [(pods.role, count, item.name, str(item.rule), item.purpose, el("code", item.knob)) for item in own]
