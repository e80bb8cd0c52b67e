"""The report as text for people and as one JSON object for pipelines."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from securevllm.check.exposure import EVERYBODY, Reach
from securevllm.check.findings import Finding, Listening, Seen, Severity

if TYPE_CHECKING:
    from securevllm.check.documents import Wrong
    from securevllm.check.resource import Resource


@dataclass(frozen=True)
class Checked:
    """A workload with what was found."""

    seen: Seen
    findings: tuple[Finding, ...]

    @property
    def key(self) -> str:
        """``Kind namespace/name``."""
        return self.seen.workload.key


@dataclass(frozen=True)
class Report:
    """Everything that is told.

    Attributes:
        objects: how many objects were read.
        workloads: those that run vLLM, in the order of the input.
        resources: SecureVLLMDeployments.
        findings: about the input as a whole.
        wrong: what could not be read.
    """

    objects: int
    workloads: tuple[Checked, ...]
    resources: tuple[Resource, ...]
    findings: tuple[Finding, ...]
    wrong: tuple[Wrong, ...] = field(default=())

    def every(self) -> Iterator[Finding]:
        """All findings."""
        yield from self.findings
        for item in self.workloads:
            yield from item.findings
        for resource in self.resources:
            yield from resource.findings

    @property
    def worst(self) -> Severity:
        """The severity of the worst finding; INFO when there is none."""
        return max((finding.severity for finding in self.every()), default=Severity.INFO)


def line(text: str) -> str:
    """The text as one printable line: a name out of a manifest must not steer a terminal."""
    return "".join(char if char.isprintable() else f"\\u{ord(char):04x}" for char in text)


def text(report: Report) -> str:
    """Lines for a person."""
    return "".join(f"{line(one)}\n" for one in _lines(report))


def _lines(report: Report) -> Iterator[str]:
    for item in report.workloads:
        yield from _workload(item)
    for resource in report.resources:
        yield f"{resource.key} ({resource.source})"
        asked = "without any key" if _keyless(resource) else "with a client's key"
        yield f"  vLLM {resource.accepted.version}; {len(resource.routes)} routes pass the gateway, {asked}:"
        yield from _wrapped(f"{route.method} {route.path}" for route in resource.routes)
        yield "  Who may connect"
        for listening in resource.listening:
            socket = listening.socket
            yield f"    {socket.role} {socket.name}, {socket.ports}: {who(listening.reach)}"
        yield from _findings(resource.findings)
        yield ""
    if report.findings:
        yield "The input as a whole"
        yield from _findings(report.findings)
        yield ""
    count = len(report.workloads) + len(report.resources)
    told = [
        f"{number} {severity.word}"
        for severity in reversed(Severity)
        if (number := sum(finding.severity is severity for finding in report.every()))
    ]
    yield f"objects: {report.objects}, with vLLM: {count}; findings: {', '.join(told) or 'none'}"


def _keyless(resource: Resource) -> bool:
    return resource.accepted.spec.gateway.authentication.none is not None


def _workload(item: Checked) -> Iterator[str]:
    seen = item.seen
    yield f"{seen.workload.key} ({seen.workload.source})"
    key = {True: "on, for some prefixes", False: "off", None: "not known"}[seen.key]
    claimed = f"vLLM {seen.claimed}" if seen.claimed else f"unknown vLLM, told as {seen.version}"
    images = ", ".join(dict.fromkeys(part.image for part in seen.workload.parts))
    yield f"  {claimed} ({images})" + (f"; vLLM's own key: {key}" if seen.workload.server else "; no HTTP server")
    yield "  Who may connect"
    for listening in seen.listening:
        socket = listening.socket
        role = f"{socket.role} " if socket.role else ""
        yield f"    {role}{socket.name}, {socket.ports}, {socket.speaks}: {who(listening.reach)}"
    for way in seen.published:
        outside = "from outside: " if way.outside else ""
        yield f"    {outside}{way.by}: {way.how}"
    for sure, heading in ((True, "Answers without a key"), (False, "Also, if the model or a hidden setting has it")):
        found = [
            f"{item.route.method} {item.route.path}" for item in seen.answers if not item.key and item.sure is sure
        ]
        if found:
            yield f"  {heading}: {len(found)} routes"
            yield from _wrapped(found)
    yield from _findings(item.findings)
    yield ""


def who(reach: Reach) -> str:
    """Who may connect, in words."""
    if reach.everybody:
        return EVERYBODY
    peers = [f"{peer} ({rule})" for peer, rule in reach.peers]
    if reach.own:
        peers.insert(0, "its own pods")
    return "; ".join(peers) or "nobody but its node"


def _wrapped(words: Iterable[str], width: int = 110) -> Iterator[str]:
    current = ""
    for word in words:
        if current and len(current) + len(word) > width:
            yield f"    {current},"
            current = ""
        current = f"{current}, {word}" if current else word
    if current:
        yield f"    {current}"


def _findings(findings: tuple[Finding, ...]) -> Iterator[str]:
    yield "  Findings" if findings else "  No findings"
    for finding in findings:
        if finding.code == "Advisory":  # there are many, and each has one way out
            yield f"    {finding.severity.word:<8} {finding.code}: {finding.message}: {finding.fix}"
            continue
        yield f"    {finding.severity.word:<8} {finding.code}: {finding.message}"
        yield f"             {finding.fix}"


def as_json(report: Report) -> str:
    """One JSON object; keys in camelCase."""
    return json.dumps(
        {
            "objects": report.objects,
            "worst": report.worst.word,
            "workloads": [_workload_json(item) for item in report.workloads],
            "resources": [
                {
                    "kind": "SecureVLLMDeployment",
                    "namespace": item.owner.namespace,
                    "name": item.owner.name,
                    "source": str(item.source),
                    "vllmVersion": str(item.accepted.version),
                    "clientKey": not _keyless(item),
                    "routes": [{"method": route.method, "path": route.path} for route in item.routes],
                    "sockets": [_socket_json(one) for one in item.listening],
                    "findings": [_finding_json(finding) for finding in item.findings],
                }
                for item in report.resources
            ],
            "findings": [_finding_json(finding) for finding in report.findings],
            "errors": [str(item) for item in report.wrong],
        }
    )


def _workload_json(item: Checked) -> dict[str, Any]:
    seen = item.seen
    return {
        "kind": seen.workload.kind,
        "namespace": seen.workload.namespace,
        "name": seen.workload.name,
        "source": str(seen.workload.source),
        "images": list(dict.fromkeys(part.image for part in seen.workload.parts)),
        "vllmVersion": str(seen.claimed) if seen.claimed else None,
        "toldAs": str(seen.version),
        "apiKey": seen.key,
        "sockets": [_socket_json(one) for one in seen.listening],
        "published": [
            {"by": way.by, "how": way.how, "outside": way.outside, "exact": way.exact, "prefix": way.prefix}
            for way in seen.published
        ],
        "routes": [
            {
                "method": one.route.method,
                "path": one.route.path,
                "class": one.route.category,
                "key": one.key,
                "certain": one.sure,
            }
            for one in seen.answers
        ],
        "findings": [_finding_json(finding) for finding in item.findings],
    }


def _socket_json(one: Listening) -> dict[str, Any]:
    return {
        "role": one.socket.role,
        "name": one.socket.name,
        "firstPort": one.socket.first,
        "lastPort": one.socket.last,
        "protocol": one.socket.protocol,
        "speaks": one.socket.speaks,
        "everybody": one.reach.everybody,
        "ownPods": one.reach.own,
        "peers": [{"peer": peer, "rule": rule} for peer, rule in one.reach.peers],
    }


def _finding_json(finding: Finding) -> dict[str, str]:
    return {
        "severity": finding.severity.word,
        "code": finding.code,
        "message": finding.message,
        "fix": finding.fix,
    }
