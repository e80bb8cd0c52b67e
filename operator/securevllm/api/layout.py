"""Rules of the fields that shape a topology: parallelism, disaggregation, ports."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING

from securevllm import catalogue
from securevllm.api import shape
from securevllm.api.guard import values
from securevllm.api.guard.pod import is_gpu
from securevllm.errors import Problem

if TYPE_CHECKING:
    from securevllm.api import types as api

_LAST_PORT = 65535


def _sides(spec: api.Spec) -> list[tuple[str, api.Parallelism]]:
    """Every parallelism that is used, with the field that it stands in."""
    split = spec.disaggregation
    if split is None:
        return [("spec.parallelism", spec.parallelism)]
    return [
        ("spec.disaggregation.prefill.parallelism", split.prefill.parallelism),
        ("spec.disaggregation.decode.parallelism", split.decode.parallelism),
    ]


def engine_pods(spec: api.Spec) -> int:
    """Pods that run vLLM, in all replicas of all sides."""
    split = spec.disaggregation
    replicas = [spec.replicas] if split is None else [split.prefill.replicas, split.decode.replicas]
    return sum(
        count * shape.shape(parallelism).pods for count, (_, parallelism) in zip(replicas, _sides(spec), strict=True)
    )


def world(spec: api.Spec) -> Iterator[Problem]:
    """The numbers multiply, and the GPUs of a pod are those of the parallelism, or none at all (a CPU engine)."""
    sides = _sides(spec)
    found = [problem for field, parallelism in sides for problem in shape.problems(parallelism, field)]
    yield from found
    if found:
        return
    needed = {shape.shape(parallelism).gpus for _, parallelism in sides}
    resources = spec.engine.resources
    if resources is None:
        return
    gpus = {name: value for name, value in (resources.requests | resources.limits).items() if is_gpu(name)}
    if len(gpus) > 1:
        yield Problem(
            "spec.engine.resources",
            "InvalidSpec",
            "one kind of GPU per pod",
            "Keep one of them.",
            ", ".join(sorted(gpus)),
        )
    for name in gpus:
        if len(needed) > 1:
            yield Problem(
                f"spec.engine.resources.limits.{name}",
                "WorldMismatch",
                "prefill and decode pods need different numbers of GPUs",
                "Leave resources out, or give both sides parallelism with the same number of GPUs in a pod.",
                ", ".join(map(str, sorted(needed))),
            )
            continue
        [world] = needed
        # Kubernetes wants a limit for an extended resource, and the request, if there is one, equal to it.
        for part, value in (("limits", resources.limits.get(name, 0)), ("requests", resources.requests.get(name))):
            if value is not None and str(value) != str(world):
                yield Problem(
                    f"spec.engine.resources.{part}.{name}",
                    "InvalidSpec",
                    f"the parallelism needs {world} GPUs in each pod",
                    f"Write {world}, or leave resources out.",
                    str(value),
                )


def _opened(spec: api.Spec) -> set[str]:
    """What the spec opens, as the column ``when`` of the socket catalogue says it."""
    opened = {"api"}
    for _, parallelism in _sides(spec):
        if shape.shape(parallelism).pods > 1:
            opened |= {"group", "nodes" if parallelism.data is None else "data"}
    if spec.disaggregation is not None:
        opened.add(spec.disaggregation.connector)
    if spec.security.kv_events is not None:
        opened.add("kv-events")
    if spec.security.metrics is not None:
        opened.add("metrics")
    return opened


def ports(spec: api.Spec) -> Iterator[Problem]:
    """Two sockets that meet on a pod need two ports, and a port that nothing opens is a misunderstanding."""
    opened = _opened(spec)
    chosen = spec.ports.model_dump(by_alias=True, exclude_none=True)
    rows = [row for row in catalogue.sockets().values() if row.spec]
    for row in rows:
        if row.spec in chosen and row.when not in opened:
            rule = _GONE.get(row.when) or f"nothing opens it without {_OPENED_BY[row.when]}"
            yield Problem(f"spec.ports.{row.spec}", "PortUnused", rule, "Leave it out.", str(chosen[row.spec]))
    ranks = max((parallelism.data.size if parallelism.data else 1) for _, parallelism in _sides(spec))
    used = [
        (row.spec, first, first + (ranks - 1 if row.per == "rank" else 0))
        for row in rows
        if row.when in opened
        for first in (chosen.get(row.spec, row.port),)
    ]
    for (one, first, last), (other, start, end) in itertools.combinations(sorted(used), 2):
        if first <= end and start <= last:
            names = [name for name in (one, other) if name in chosen]
            yield Problem(
                f"spec.ports.{names[0] if names else one}",
                "PortConflict",
                f"{one} ({_span(first, last)}) and {other} ({_span(start, end)}) would listen on the same port",
                "Choose another port for one of them; one that is numbered by data-parallel rank needs as many as there"
                " are ranks.",
                str(chosen.get(names[0])) if names else "",
            )
    for name, _, last in used:
        if last > _LAST_PORT:
            yield Problem(
                f"spec.ports.{name}",
                "PortConflict",
                f"it is numbered by data-parallel rank, and {ranks} ranks end above {_LAST_PORT}",
                f"Choose {_LAST_PORT + 1 - ranks} or less.",
                str(chosen.get(name, "")),
            )


def _span(first: int, last: int) -> str:
    return str(first) if first == last else f"{first}-{last}"


_GONE = {
    "offline": "a server draws a random port instead, which the policy of its group covers",
    "p2p-nccl": "it belonged to the P2pNccl connector, which vLLM 0.24 removed; NIXL's is nixlSideChannel",
}
_OPENED_BY = {
    "group": "several pods in one replica",
    "nodes": "parallelism.nodes above 1",
    "data": "parallelism.data over several pods",
    "nixl": "disaggregation.connector nixl",
    "mooncake": "disaggregation.connector mooncake",
    "kv-events": "security.kvEvents",
    "metrics": "security.metrics",
}


_REFUSED = {
    "mooncakeStore": "its store is a service of its own, without authentication",
    "moriio": "it reads the addresses of its peers from a header of the request",
    "lmcache": "its servers take pickle from whoever reaches them",
    "p2pNccl": "vLLM 0.24 removed it, and before it took the addresses of peers from a header of the request",
}
"""Connectors whose sockets are in the catalogue, for ``securevllm check``, and that are not rendered."""


def blocks(spec: api.Spec) -> Iterator[Problem]:
    """Blocks that do not go together."""
    split = spec.disaggregation
    if split is None:
        return
    if split.connector not in catalogue.connectors():
        yield Problem(
            "spec.disaggregation.connector",
            "NotSupportedYet",
            _REFUSED[split.connector],
            "For now: use nixl, or mooncake.",
            split.connector,
        )
    if "parallelism" in spec.model_fields_set:
        yield Problem(
            "spec.parallelism",
            "InvalidSpec",
            "with disaggregation each side has its own",
            "Write it below disaggregation.prefill and disaggregation.decode.",
        )
    if spec.replicas != 1:
        yield Problem(
            "spec.replicas",
            "InvalidSpec",
            "with disaggregation each side has its own",
            "Set disaggregation.prefill.replicas and disaggregation.decode.replicas.",
            str(spec.replicas),
        )
    yield from _router_arguments(split.router.args)
    for field, side in (("prefill", split.prefill), ("decode", split.decode)):
        data = side.parallelism.data
        if data is not None and data.load_balancing != "internal":
            yield Problem(
                f"spec.disaggregation.{field}.parallelism.data.loadBalancing",
                "NotSupportedYet",
                "the router knows one address for each replica",
                "For now: use internal.",
                data.load_balancing,
            )


def _router_arguments(args: tuple[str, ...]) -> Iterator[Problem]:
    """Exact names only: the router's parser is Python's argparse, which takes unambiguous prefixes."""
    flags = catalogue.router_flags()
    seen: set[str] = set()
    for index, argument in enumerate(args):
        name, equals, value = argument.partition("=")
        setting = flags.allowed.get(name)
        rule, fix = "", "Leave it out."
        if name in flags.owned:
            rule, fix = "the operator sets this flag", f"Use instead: {flags.owned[name]}."
        elif setting is None:
            rule = "only exact names of the allowlist may be passed: a flag can open what the operator closed"
            fix = f"May be set: {', '.join(sorted(flags.allowed))}."
        elif name in seen:
            rule, fix = "a flag may stand only once", "Remove one of the two."
        elif (setting.kind == "none") == bool(equals):
            rule = "this flag takes no value" if equals else "this flag needs a value"
            fix = f"Write {name} alone." if equals else f"Write {name}=...."
        elif equals:
            try:
                values.check(setting, value, ())
            except values.Refused as refused:
                rule, fix = refused.rule, refused.fix
        seen.add(name)
        if rule:
            yield Problem(f"spec.disaggregation.router.args[{index}]", "ArgumentRefused", rule, fix, argument)


def versions(spec: api.Spec, version: catalogue.Version) -> Iterator[Problem]:
    """What the version does not have yet, or no more."""
    rows = [row for row in catalogue.sockets().values() if row.spec]
    for when in sorted(_opened(spec)):
        lacking = [row for row in rows if row.when == when and version not in row.versions]
        if lacking:
            since = ", ".join(f"since {row.versions.since}" for row in lacking if row.versions.since is not None)
            yield Problem(
                _FIELDS[when],
                "VersionLacks",
                f"vLLM {version} does not have it ({since})",
                "Use a newer image.",
            )


_FIELDS = {
    "nodes": "spec.parallelism.nodes",
    "nixl": "spec.disaggregation.connector",
    "mooncake": "spec.disaggregation.connector",
}
