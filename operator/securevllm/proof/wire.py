"""What gate and canary are told and what they answer, as JSON. Pure; standard library only.

The operator renders it, a container of perhaps an older release reads it (I11: templates are pinned), so a field that
is not known is ignored and every field has a default.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from enum import StrEnum
from typing import Any

GATE_VARIABLE = "SECUREVLLM_GATE"
"""Environment variable with the text of a ``GateConfig``."""
CANARY_VARIABLE = "SECUREVLLM_CANARY"
"""Environment variable with the text of a ``CanaryConfig``."""
TERMINATION_VARIABLE = "TERMINATION_LOG"
"""Environment variable with another path than Kubernetes' default; for nodes without a container runtime."""
POD_IP, POD_IPS, NODE_IP = "POD_IP", "POD_IPS", "NODE_IP"
"""Environment variables from the downward API: ``status.podIP``, ``status.podIPs``, ``status.hostIPs``; of the last two
one address of each family, joined by a comma."""


class Reach(StrEnum):
    """How an attempt to connect ended. Against a target that is known to listen, only OPEN is reachable."""

    OPEN = "open"
    """The handshake was completed, whatever came after it."""
    REFUSED = "refused"
    """A reset for the first packet, or an ICMP error: kube-router rejects so, and Linux reports it as ECONNREFUSED."""
    SILENT = "silent"
    """No answer in time: Cilium and Calico drop."""
    NO_ROUTE = "no route"
    """The own machine has no way there: says nothing about policies."""
    NO_ATTEMPT = "no attempt"
    """An error of the own machine, such as too many open files: says nothing at all."""


BLOCKED = frozenset({Reach.REFUSED, Reach.SILENT})


@dataclass(frozen=True)
class Forbidden:
    """Something that listens and that the topology does not let the pod reach.

    Attributes:
        name: for a person.
        host: name or address; ``$NAME`` is read from the environment (kubelet injects where the API server is).
        port: number, or ``$NAME``.
        node_ports: ports on which the same thing may listen on a node. A network plugin lets a pod through to its own
            node, so where the own node answers on one of them, this target says nothing.
    """

    name: str
    host: str
    port: str
    node_ports: tuple[int, ...] = ()


@dataclass(frozen=True)
class Barrier:
    """The pods of a group wait for each other.

    Attributes:
        port: of every member's gate.
        rank: number of this member, its place in ``members``, or ``$NAME``.
        members: names of all pods of the group, rank 0 first.
        world: what all members of one start have in common; a pod of an earlier start is no member. ``$NAME`` is read
            from the environment.
    """

    port: int
    rank: str
    members: tuple[str, ...]
    world: str = ""


@dataclass(frozen=True)
class GateConfig:
    """What the gate is told.

    Attributes:
        dns: a name that always resolves: the positive control.
        isolation: False: somebody has said in words that it is not looked at; only the barrier is left.
        forbidden: what must not be reachable.
        barrier: None: a pod of its own.
        stable_seconds: how long everything is tried, again and again, and has to be blocked.
    """

    dns: str
    forbidden: tuple[Forbidden, ...] = ()
    isolation: bool = True
    barrier: Barrier | None = None
    stable_seconds: float = 0.6


@dataclass(frozen=True)
class Target:
    """A socket that is probed: an address, its port, and a key that the answer is found by."""

    key: str
    address: str
    port: int


@dataclass(frozen=True)
class CanaryConfig:
    """What a canary pod is told.

    Attributes:
        listen: ports on which its listener accepts, for the positive controls of others.
        targets: what its prober connects to.
        seconds: time for all of it.
    """

    listen: tuple[int, ...] = ()
    targets: tuple[Target, ...] = ()
    seconds: float = 20.0


def dump(config: GateConfig | CanaryConfig) -> str:
    """The text of a configuration; equal configurations have equal texts."""
    return json.dumps(asdict(config), sort_keys=True, separators=(",", ":"))


def load_gate(text: str) -> GateConfig:
    """Read a ``GateConfig``.

    Raises:
        ValueError: it is not one.
    """
    raw = _judged(GateConfig, _mapping(text))
    forbidden = [
        _judged(Forbidden, item, f"forbidden[{index}].") for index, item in enumerate(raw.get("forbidden", ()))
    ]
    barrier = raw.get("barrier")
    return GateConfig(
        **_known(GateConfig, raw, "forbidden", "barrier"),
        forbidden=tuple(
            Forbidden(**_known(Forbidden, item, "node_ports"), node_ports=tuple(item.get("node_ports", ())))
            for item in forbidden
        ),
        barrier=None
        if barrier is None
        else Barrier(
            **_known(Barrier, _judged(Barrier, barrier, "barrier."), "members"), members=tuple(barrier["members"])
        ),
    )


def load_canary(text: str) -> CanaryConfig:
    """Read a ``CanaryConfig``.

    Raises:
        ValueError: it is not one.
    """
    raw = _judged(CanaryConfig, _mapping(text))
    targets = [_judged(Target, item, f"targets[{index}].") for index, item in enumerate(raw.get("targets", ()))]
    return CanaryConfig(
        **_known(CanaryConfig, raw, "listen", "targets"),
        listen=tuple(raw.get("listen", ())),
        targets=tuple(Target(**_known(Target, item)) for item in targets),
    )


def dump_answers(answers: Mapping[str, Reach]) -> str:
    """What a canary saw, short: kubelet keeps 4096 bytes of a termination message."""
    by_reach: dict[str, list[str]] = {}
    for key, reach in sorted(answers.items()):
        by_reach.setdefault(reach.value, []).append(key)
    return json.dumps(by_reach, separators=(",", ":"))


def load_answers(text: str) -> dict[str, Reach]:
    """Read what a canary saw.

    Raises:
        ValueError: it is something else.
    """
    try:
        return {key: Reach(reach) for reach, keys in _mapping(text).items() for key in keys}
    except TypeError as error:
        raise ValueError(f"not the answers of a canary: {error}") from None


def _mapping(text: str) -> dict[str, Any]:
    raw = json.loads(text)
    if not isinstance(raw, dict):
        raise ValueError("not a JSON object")  # noqa: TRY004 - the text is wrong, not the caller's type
    return raw


_FORMS: Mapping[str, tuple[str, Callable[[Any], bool]]] = {
    "str": ("a text", lambda value: isinstance(value, str)),
    "bool": ("true or false", lambda value: isinstance(value, bool)),
    "int": ("a whole number", lambda value: type(value) is int),
    "float": ("a number", lambda value: type(value) in {int, float} and math.isfinite(value)),
    "tuple[str, ...]": ("a list of texts", lambda value: _list_of(str, value)),
    "tuple[int, ...]": ("a list of whole numbers", lambda value: _list_of(int, value)),
    "tuple[Forbidden, ...]": ("a list of objects", lambda value: _list_of(dict, value)),
    "tuple[Target, ...]": ("a list of objects", lambda value: _list_of(dict, value)),
    "Barrier | None": ("an object or null", lambda value: value is None or isinstance(value, dict)),
}
"""What JSON has for a field with this annotation."""


def _list_of(kind: type, value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is kind for item in value)


def _judged(kind: Any, raw: dict[str, Any], path: str = "") -> dict[str, Any]:
    for field in fields(kind):
        words, fits = _FORMS[str(field.type)]
        if field.name not in raw:
            if field.default is MISSING:
                raise ValueError(f"{path}{field.name} is missing, which is {words}")
        elif not fits(raw[field.name]):
            raise ValueError(f"{path}{field.name} is {json.dumps(raw[field.name])[:80]}, not {words}")
    return raw


def _known(kind: Any, raw: Mapping[str, Any], *without: str) -> dict[str, Any]:
    names = {field.name for field in fields(kind)} - {*without}
    return {name: value for name, value in raw.items() if name in names}
