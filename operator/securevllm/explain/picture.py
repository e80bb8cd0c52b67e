"""The flows as a drawing (SVG). Its labels are names of roles and numbers only: no word of a user has to fit."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from securevllm.explain.markup import Html, el
from securevllm.explain.words import Direction, View, count
from securevllm.topology import Outside

if TYPE_CHECKING:
    from securevllm.topology import PortRule


_WIDE, _HIGH, _GAP = 170, 60, 140
_TOP, _MIDDLE, _BOTTOM = 20, 165, 320
_MANY_PORTS = 3
_OUTSIDE = {
    Outside.CLIENTS.value: "who may ask",
    Outside.OPERATOR.value: "probes, reads back",
    Outside.DNS.value: "name servers of the cluster",
    Outside.HUB.value: "any public address",
    Outside.DECLARED.value: "spec.security.egress",
}


@dataclass(frozen=True)
class _Box:
    x: int
    y: int
    wide: int = _WIDE

    @property
    def centre(self) -> int:
        return self.x + self.wide // 2


def picture(seen: View) -> Html:
    """Who connects on the left, a column per role, whom they reach above, DNS below: no arrow crosses a box."""
    roles = [item.role for item in seen.pods]
    sources = list(dict.fromkeys(flow.source for flow in seen.flows if flow.direction is Direction.INBOUND))
    columns = {role: _Box(_WIDE + _GAP + place * (_WIDE + _GAP), _MIDDLE) for place, role in enumerate(roles)}
    end = max((box.x for box in columns.values()), default=_WIDE) + _WIDE
    dns = _Box(_WIDE + _GAP, _BOTTOM, end - _WIDE - _GAP)
    step = _HIGH + 24
    first = _MIDDLE - step * (len(sources) - 1) // 2
    left = {name: _Box(1, first + place * step) for place, name in enumerate(sources)}

    labels: dict[tuple[Direction, str, str], list[PortRule]] = {}
    for flow in seen.flows:
        labels.setdefault((flow.direction, flow.source, flow.destination), []).extend(flow.ports)
    boxes = [_box(columns[item.role], item.role, count(item.replicas, "pod"), pod=True) for item in seen.pods]
    boxes += [_box(box, name, _OUTSIDE.get(name, "")) for name, box in left.items()]
    edges: list[Html] = []
    above: list[int] = []
    for (direction, source, destination), ports in labels.items():
        told = _short(ports)
        if direction is Direction.INBOUND:
            start, to = left[source], columns[destination]
            y = start.y + _HIGH // 2
            # The arrow ends within the height of the box, whatever the number of sources.
            down = min(max(y, to.y + 8), to.y + _HIGH - 8)
            edges.append(_edge(direction, (start.x + start.wide, y), (to.x, down), told))
        elif direction is Direction.INTERNAL:
            y = _MIDDLE + _HIGH // 2
            edges.append(_edge(direction, (columns[source].x + _WIDE, y), (columns[destination].x, y), told))
        elif destination == Outside.DNS:
            x = columns[source].centre
            edges.append(_edge(direction, (x, _MIDDLE + _HIGH), (x, _BOTTOM), told))
        else:
            x = columns[source].centre
            above.append(_TOP)
            boxes.append(_box(_Box(columns[source].x, _TOP), destination, _OUTSIDE.get(destination, "")))
            edges.append(_edge(direction, (x, _MIDDLE), (x, _TOP + _HIGH), told))
    if any(flow.destination == Outside.DNS for flow in seen.flows):
        boxes.append(_box(dns, Outside.DNS.value, _OUTSIDE[Outside.DNS.value]))
    frame = _rect(_Box(dns.x - 16, _MIDDLE - 24, dns.wide + 32), high=_HIGH + 48, class_="frame")
    bottom = max([_BOTTOM + _HIGH, *(box.y + _HIGH for box in left.values())])
    top = min([_MIDDLE - 24, *(box.y for box in left.values()), *above]) - 4
    return el(
        "svg",
        frame,
        *edges,
        *boxes,
        viewBox=f"0 {top} {end + 18} {bottom + 4 - top}",
        role="img",
        aria_label="The flows of the table below as a picture",
    )


def _short(ports: Iterable[PortRule]) -> str:
    """Ports for the label of an arrow; the table has all of them."""
    distinct = sorted({rule.port for rule in ports})
    return f"port {', '.join(map(str, distinct))}" if len(distinct) < _MANY_PORTS else f"{len(distinct)} ports"


def _rect(box: _Box, *, high: int = _HIGH, class_: str = "") -> Html:
    return el(
        "rect",
        class_=class_,
        x=str(box.x),
        y=str(box.y),
        width=str(box.wide),
        height=str(high),
        rx="8",
    )


def _box(box: _Box, name: str, below: str, *, pod: bool = False) -> Html:
    return el(
        "g",
        _rect(box, class_="pod" if pod else ""),
        el("text", name, class_="name", x=str(box.centre), y=str(box.y + 26)),
        el("text", below, class_="small", x=str(box.centre), y=str(box.y + 45)),
    )


def _edge(direction: Direction, start: tuple[int, int], end: tuple[int, int], told: str) -> Html:
    (x1, y1), (x2, y2) = start, end
    upright = x1 == x2
    sign = 1 if y2 > y1 else -1
    points = f"{x2},{y2} {x2 - 5},{y2 - 9 * sign} {x2 + 5},{y2 - 9 * sign}" if upright else ""
    points = points or f"{x2},{y2} {x2 - 9},{y2 - 5} {x2 - 9},{y2 + 5}"
    middle = ((x1 + x2) // 2 + (10 if upright else -8), (y1 + y2) // 2 + (4 if upright else -8))
    return el(
        "g",
        el("line", x1=str(x1), y1=str(y1), x2=str(x2), y2=str(y2)),
        el("polygon", points=points),
        el("text", told, class_="beside" if upright else "", x=str(middle[0]), y=str(middle[1])),
        class_=f"edge {direction.value}",
    )
