"""The picture as lines: text for a terminal and for `diff`, JSON for scripts, Mermaid for a page of documentation."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from pydantic.alias_generators import to_camel

from securevllm.explain.words import CAVEAT, CLOSED, Direction, View, concern, port_list, refused, target, told


def text(seen: View) -> str:
    """Lines for a terminal, and for `diff`: one flow, route or risk a line."""
    return "".join(f"{line}\n" for line in _text_lines(seen))


def _text_lines(seen: View) -> Iterator[str]:
    yield f"{seen.namespace}/{seen.name}: {seen.model} by vLLM {seen.version} ({seen.image})"
    yield seen.url
    if seen.suspended:
        yield "Suspended: no pods of engine and gateway; the policies are kept."
    yield ""
    yield from _columns([[f"{fact.name}:", fact.words] for fact in seen.summary], indent="")
    yield from ("", "Pods")
    yield from _columns([[item.role, f"x{item.replicas}"] for item in seen.pods])
    if seen.groups:
        yield from ("", "Groups: pods that start and end as one, each a trust domain of its own")
        yield from _columns([[_names(item.names), ", ".join(item.members)] for item in seen.groups])
    yield from ("", "Sockets")
    yield from _columns(
        [
            [f"{item.role}/{item.name}", str(item.rule), item.purpose + (f"; set by {item.knob}" if item.knob else "")]
            for item in seen.sockets
        ]
    )
    yield from ("", "Flows")
    for flow in seen.flows:
        peers = f" [{told(flow.peers)}]" if flow.peers else ""
        if flow.direction is Direction.INBOUND:
            yield f"  {flow.source}{peers} -> {target(flow)} {port_list(flow.ports)}: {flow.why}"
        else:
            yield f"  {flow.source} -> {target(flow)}{peers} {port_list(flow.ports)}: {flow.why}"
    yield f"  {CLOSED}"
    yield from ("", "Routes that pass the gateway")
    yield from _columns(
        [
            [
                route.method,
                route.path,
                "streaming" if route.streaming else "",
                "vLLM asks for its key" if route.vllm_key else "vLLM asks for no key",
                f"by {route.opened_by}",
            ]
            for route in seen.routes
        ]
    )
    yield f"  {refused(seen)}"
    yield from ("", "Given up by the spec")
    yield from (f"  {risk}" for risk in seen.risks or ("nothing",))
    yield from ("", "Published holes in this vLLM")
    yield from (f"  {item.severity} {item.id}: {item.summary} ({concern(item)})" for item in seen.advisories)
    if not seen.advisories:
        yield "  none that the catalogue knows"
    yield from ("", "Not seen by any NetworkPolicy")
    yield from (f"  {item.name}: {item.why}" for item in seen.unseen)
    yield from ("", CAVEAT)


def _names(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}"


def _columns(rows: Sequence[Sequence[str]], *, indent: str = "  ") -> Iterator[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield indent + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


def as_json(seen: View) -> str:
    """One line of JSON; keys in camelCase."""
    return json.dumps(asdict(seen, dict_factory=_camel))


def _camel(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    return {to_camel(key): value for key, value in pairs if value is not None}


_PLAIN = re.compile(r"[^A-Za-z0-9 .,:/=_-]")


def mermaid(*views: View) -> str:
    """A Mermaid flowchart; resources are subgraphs, outsiders stand around them."""
    lines = ["flowchart LR"]
    for index, seen in enumerate(views):
        nodes = {item.role: f"r{index}_{place}" for place, item in enumerate(seen.pods)}
        lines.append(f"  subgraph s{index}[{_label(f'{seen.namespace}/{seen.name}')}]")
        lines += [f"    {nodes[item.role]}[{_label(f'{item.role} x{item.replicas}')}]" for item in seen.pods]
        lines.append("  end")
        for flow in seen.flows:
            for end in (flow.source, flow.destination):
                if end not in nodes:
                    nodes[end] = f"o{index}_{len(nodes)}"
                    lines.append(f"  {nodes[end]}([{_label(end)}])")
            told = f"{port_list(flow.ports)}: {flow.why}"
            lines.append(f"  {nodes[flow.source]} -->|{_label(told)}| {nodes[flow.destination]}")
    return "".join(f"{line}\n" for line in lines)


def _label(words: str) -> str:
    """A quoted label; whatever could mean something to Mermaid, Markdown or HTML is a character reference."""
    return f'"{_PLAIN.sub(lambda found: f"#{ord(found.group())};", words)}"'
