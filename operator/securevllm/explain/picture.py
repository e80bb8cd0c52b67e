"""The flows as a drawing (SVG). Its labels are names of roles and numbers only: no word of a user has to fit.

Clients and the operator stand on the left, one column of roles follows the other as requests do, other outsiders stand
above, DNS below. Prefill stands above decode; a worker stands beside the head of its group.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from securevllm.explain.markup import Html, el
from securevllm.explain.words import Direction, View, count
from securevllm.topology import Outside, Role

if TYPE_CHECKING:
    from securevllm.topology import PortRule


_WIDE, _HIGH, _GAP = 170, 60, 140
_STEP = _HIGH + 24
_NARROW = 150
_MIDDLE, _APART = 300, 60
_MANY_PORTS = 3
_OUTSIDE = {
    Outside.CLIENTS.value: "who may ask",
    Outside.OPERATOR.value: "probes, reads back",
    Outside.DNS.value: "name servers of the cluster",
    Outside.HUB.value: "any public address",
    Outside.DECLARED.value: "spec.security.egress",
    Outside.READERS.value: "spec.security.kvEvents",
    Outside.MONITORING.value: "spec.security.metrics",
}
_COLUMNS = (
    ((Role.GATEWAY,),),
    ((Role.ROUTER,),),
    ((Role.ENGINE,), (Role.PREFILL, Role.DECODE)),
    ((Role.ENGINE_WORKER,), (Role.PREFILL_WORKER, Role.DECODE_WORKER)),
    ((Role.FETCH,),),
)
"""Columns from left to right; in each, who stands there alone, or one above the other."""
_UPPER = frozenset({Role.PREFILL, Role.PREFILL_WORKER})
_LOWER = frozenset({Role.DECODE, Role.DECODE_WORKER})


_Point = tuple[int, int]


@dataclass(frozen=True)
class _Box:
    x: int
    y: int
    wide: int = _WIDE

    @property
    def centre(self) -> int:
        return self.x + self.wide // 2

    @property
    def right(self) -> int:
        return self.x + self.wide

    @property
    def middle(self) -> int:
        return self.y + _HIGH // 2

    @property
    def bottom(self) -> int:
        return self.y + _HIGH


@dataclass(frozen=True)
class _Places:
    """Where everybody stands; those above by name and by the column that they have to do with."""

    roles: dict[str, _Box]
    left: dict[str, _Box]
    above: dict[tuple[str, int], _Box]
    dns: _Box

    def everything(self) -> list[_Box]:
        return [*self.roles.values(), *self.left.values(), *self.above.values(), self.dns]


def picture(seen: View) -> Html:
    """The drawing; no arrow crosses a box."""
    roles = _roles([item.role for item in seen.pods])
    labels: dict[tuple[Direction, str, str], list[PortRule]] = {}
    for flow in seen.flows:
        labels.setdefault((flow.direction, flow.source, flow.destination), []).extend(flow.ports)
    mutual = {source for (_, source, to) in labels if source == to}
    pods = [
        _box(
            roles[item.role],
            item.role,
            count(item.replicas, "pod") + (", each with each" if item.role in mutual else ""),
            pod=True,
        )
        for item in seen.pods
    ]

    centre = (min(box.y for box in roles.values()) + max(box.bottom for box in roles.values())) // 2
    first = min(box.x for box in roles.values())
    beside = list(dict.fromkeys(source for (way, source, to) in labels if _beside(way, roles, to)))
    top = centre - (_STEP * len(beside) - (_STEP - _HIGH)) // 2
    left = {name: _Box(1, top + place * _STEP) for place, name in enumerate(beside)}
    above = _above(labels, roles)
    dns = _Box(first, max(box.bottom for box in roles.values()) + 95, max(box.right for box in roles.values()) - first)
    places = _Places(roles, left, above, dns)
    edges = [
        _edge(way, *_ends(way, source, to, places), "" if _crosses(way, source, to) else _short(ports))
        for (way, source, to), ports in labels.items()
        if source != to
    ]
    outside = [_box(box, name, _OUTSIDE.get(name, "")) for name, box in left.items()]
    outside += [_box(box, name, _OUTSIDE.get(name, "")) for (name, _), box in above.items()]
    if any(to == Outside.DNS for _, _, to in labels):
        outside.append(_box(dns, Outside.DNS.value, _OUTSIDE[Outside.DNS.value]))
    frame = _frame(roles.values())
    everything = places.everything()
    upper, lower = min(box.y for box in everything) - 28, max(box.bottom for box in everything) + 4
    return el(
        "svg",
        frame,
        *edges,
        *pods,
        *outside,
        viewBox=f"0 {upper} {max(box.right for box in everything) + 18} {lower - upper}",
        role="img",
        aria_label="The flows of the table below as a picture",
    )


def _roles(present: Iterable[str]) -> dict[str, _Box]:
    """A box for each role; one row, or two where prefill stands above decode."""
    known = [[role.value for role in choice if role in present] for column in _COLUMNS for choice in column]
    placed = {role for column in known for role in column}
    columns = [*filter(None, known), *([role] for role in present if role not in placed)]
    found: dict[str, _Box] = {}
    for place, column in enumerate(columns):
        for role in column:
            y = _MIDDLE + (_APART if role in _LOWER else -_APART if role in _UPPER else 0)
            found[role] = _Box(_WIDE + _GAP + place * (_WIDE + _GAP), y)
    return found


def _crosses(way: Direction, source: str, to: str) -> bool:
    """Whether the arrow crosses another one: between prefill and decode, two from a head to the other side's worker."""
    upper = {source in _UPPER, to in _UPPER}
    workers = {source.endswith("-worker"), to.endswith("-worker")}
    return way is Direction.INTERNAL and {source, to} <= _UPPER | _LOWER and len(upper) == len(workers) == 2  # noqa: PLR2004 - both


def _beside(way: Direction, roles: dict[str, _Box], to: str) -> bool:
    """Whether somebody who opens connections stands on the left: before the first role, the gateway."""
    return way is Direction.INBOUND and roles[to].x == min(box.x for box in roles.values())


def _above(labels: Iterable[tuple[Direction, str, str]], roles: dict[str, _Box]) -> dict[tuple[str, int], _Box]:
    """Other outsiders, by name and column: each stands above the column that it has to do with."""
    ceiling = min(box.y for box in roles.values()) - 145
    found: dict[tuple[str, int], _Box] = {}
    for way, source, to in labels:
        inside, other = (to, source) if way is Direction.INBOUND else (source, to)
        if way is Direction.INTERNAL or other == Outside.DNS or _beside(way, roles, inside):
            continue
        column = roles[inside].x
        before = sum(x == column for _, x in found)
        found.setdefault((other, column), _Box(column + before * (_NARROW + 5), ceiling, _NARROW))
    return found


def _ends(way: Direction, source: str, to: str, places: _Places) -> tuple[_Point, _Point]:
    """Where an arrow begins and ends."""
    roles, left = places.roles, places.left
    if way is Direction.INTERNAL:
        return _between(roles[source], roles[to])
    if way is Direction.INBOUND and source in left and _beside(way, roles, to):
        start, end = left[source], roles[to]
        # The arrow ends within the height of the box, whatever the number of sources.
        return (start.right, start.middle), (end.x, min(max(start.middle, end.y + 8), end.bottom - 8))
    inside, other = (roles[to], source) if way is Direction.INBOUND else (roles[source], to)
    column = [box for box in roles.values() if box.x == inside.x]
    if other == Outside.DNS:
        return (inside.centre, max(box.bottom for box in column)), (inside.centre, places.dns.y)
    box = places.above[other, inside.x]
    upper = (box.centre, box.bottom)
    lower = (min(box.centre, inside.right - 12), min(item.y for item in column))
    return (upper, lower) if way is Direction.INBOUND else (lower, upper)


def _between(one: _Box, other: _Box) -> tuple[_Point, _Point]:
    """From box to box; there and back are two arrows side by side."""
    if one.x == other.x:
        shift = -40 if one.y < other.y else 40
        if one.y < other.y:
            return (one.centre + shift, one.bottom), (other.centre + shift, other.y)
        return (one.centre + shift, one.y), (other.centre + shift, other.bottom)
    if one.x < other.x:
        return (one.right, one.middle - 14), (other.x, other.middle - 14)
    return (one.x, one.middle + 14), (other.right, other.middle + 14)


def _frame(boxes: Iterable[_Box]) -> Html:
    """What belongs to the resource."""
    inside = list(boxes)
    x, y = min(box.x for box in inside) - 16, min(box.y for box in inside) - 24
    wide, high = max(box.right for box in inside) + 16 - x, max(box.bottom for box in inside) + 24 - y
    return _rect(_Box(x, y, wide), high=high, class_="frame")


def _short(rules: Iterable[PortRule]) -> str:
    """Ports for the label of an arrow; the table has all of them."""
    distinct = dict.fromkeys(map(str, rules))
    if all(words.startswith("TCP") for words in distinct):
        distinct = dict.fromkeys(words.removeprefix("TCP").strip(", ") for words in distinct)
    return ", ".join(distinct) if len(distinct) < _MANY_PORTS else f"{len(distinct)} ports"


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


def _edge(direction: Direction, start: _Point, end: _Point, told: str) -> Html:
    (x1, y1), (x2, y2) = start, end
    length = max(1.0, math.hypot(x2 - x1, y2 - y1))
    along, across = ((x2 - x1) / length, (y2 - y1) / length), (-(y2 - y1) / length, (x2 - x1) / length)
    tips = [(x2 - 9 * along[0] + side * across[0], y2 - 9 * along[1] + side * across[1]) for side in (5, -5)]
    points = " ".join(f"{round(x)},{round(y)}" for x, y in [(x2, y2), *tips])
    upright = abs(along[1]) > abs(along[0])
    # The way back has its label below the arrow, so that the two of a pair do not meet.
    middle = ((x1 + x2) // 2 + (10 if upright else 0), (y1 + y2) // 2 + (4 if upright else -7 if x2 > x1 else 17))
    return el(
        "g",
        el("line", x1=str(x1), y1=str(y1), x2=str(x2), y2=str(y2)),
        el("polygon", points=points),
        el("text", told, class_="beside" if upright else "", x=str(middle[0]), y=str(middle[1])),
        class_=f"edge {direction.value}",
    )
