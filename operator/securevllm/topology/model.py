"""Who exists, what listens, who may talk to whom and why: the types, as plain frozen data."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from securevllm.context import Peer

LAST_PORT = 65535


class Role(StrEnum):
    """Kinds of pods that the operator makes. A *worker* is a member of a group that has no HTTP server."""

    GATEWAY = "gateway"
    ROUTER = "router"
    ENGINE = "engine"
    ENGINE_WORKER = "engine-worker"
    PREFILL = "prefill"
    PREFILL_WORKER = "prefill-worker"
    DECODE = "decode"
    DECODE_WORKER = "decode-worker"
    FETCH = "fetch"

    @property
    def headless(self) -> bool:
        """Whether the pods have no HTTP server (``--headless``)."""
        return self in {Role.ENGINE_WORKER, Role.PREFILL_WORKER, Role.DECODE_WORKER}


VLLM = (Role.ENGINE, Role.ENGINE_WORKER, Role.PREFILL, Role.PREFILL_WORKER, Role.DECODE, Role.DECODE_WORKER)
"""Pods that run vLLM."""

WORKER_OF = {
    Role.ENGINE: Role.ENGINE_WORKER,
    Role.PREFILL: Role.PREFILL_WORKER,
    Role.DECODE: Role.DECODE_WORKER,
}


class Outside(StrEnum):
    """Kinds of peers that the operator does not make."""

    CLIENTS = "clients"
    OPERATOR = "operator"
    DNS = "dns"
    HUB = "hub"
    DECLARED = "declared"
    READERS = "readers"
    MONITORING = "monitoring"


@dataclass(frozen=True)
class PortRule:
    """One destination port, or a range of them; 0: drawn by the kernel."""

    port: int
    protocol: str = "TCP"
    last: int | None = None

    def __str__(self) -> str:
        if (self.port, self.last) == (1, LAST_PORT):
            return f"{self.protocol}, every port"
        if self.port == 0:
            return f"{self.protocol}, a random port"
        return f"{self.protocol} {self.port}" if self.last is None else f"{self.protocol} {self.port}-{self.last}"


@dataclass(frozen=True)
class Socket:
    """A listening socket of a role.

    Attributes:
        role: who listens.
        name: port name, unique within the role.
        port: number; 0: drawn by the kernel, which only a flow to ``every_port`` covers.
        protocol: TCP or UDP.
        purpose: one phrase for a person.
        knob: what sets the port in the program that listens.
        last: last port of a range; None: one port.
    """

    role: Role
    name: str
    port: int
    protocol: str
    purpose: str
    knob: str
    last: int | None = None

    @property
    def rule(self) -> PortRule:
        """The port as a destination."""
        return PortRule(self.port, self.protocol, self.last)


def every_port(role: Role, purpose: str) -> Socket:
    """All TCP ports of a role: Gloo, NCCL, ZMQ and UCX draw random ones, which no list can name."""
    return Socket(role, "any", 1, "TCP", purpose, "", LAST_PORT)


@dataclass(frozen=True)
class Inbound:
    """Peers outside may open connections to a socket."""

    source: Outside
    peers: tuple[Peer, ...]
    to: Socket
    why: str


@dataclass(frozen=True)
class Internal:
    """Pods of a role may open connections to a socket of another role of the same resource."""

    source: Role
    to: Socket
    why: str


@dataclass(frozen=True)
class Mesh:
    """The pods of one group may open connections to each other, on every TCP port."""

    group: str
    why: str


@dataclass(frozen=True)
class Outbound:
    """Pods of a role may open connections to peers outside."""

    source: Role
    to: Outside
    peers: tuple[Peer, ...]
    ports: tuple[PortRule, ...]
    why: str


Flow = Inbound | Internal | Mesh | Outbound


@dataclass(frozen=True)
class Pods:
    """All pods of one role. Without a group, N pods are N worlds: no flow joins two of them."""

    role: Role
    replicas: int


@dataclass(frozen=True)
class Group:
    """One model replica whose pods have names of their own, and start and end as one.

    Attributes:
        name: ``e0``, ``p0``, ``d0``: side and number; value of the group label.
        members: role of each pod, by rank. The first is the head.
    """

    name: str
    members: tuple[Role, ...]

    @property
    def role(self) -> Role:
        """The role of the head: engine, prefill or decode."""
        return self.members[0]


@dataclass(frozen=True)
class Topology:
    """Who exists, what listens, who may talk to whom.

    Attributes:
        pods: every role, with all its pods (those of groups included); none while suspended.
        groups: model replicas that are groups; suspended, they keep their policies. Empty: engines are a Deployment.
        sockets: what listens.
        flows: what is allowed; nothing else is.
    """

    pods: tuple[Pods, ...]
    sockets: tuple[Socket, ...]
    flows: tuple[Flow, ...]
    groups: tuple[Group, ...] = ()

    def socket(self, role: Role, name: str) -> Socket:
        """The socket of that name.

        Raises:
            KeyError: the topology has no such socket.
        """
        for socket in self.sockets:
            if (socket.role, socket.name) == (role, name):
                return socket
        raise KeyError(f"{role}/{name}")

    @property
    def entry(self) -> Role:
        """Who gets the requests that passed the gateway: the router, or the engines."""
        return Role.ROUTER if any(item.role is Role.ROUTER for item in self.pods) else Role.ENGINE
