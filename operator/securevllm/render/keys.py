"""Client keys: judged before Envoy sees them, because Envoy prints a duplicate key into its log."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from securevllm.render.envoy import CLIENT_ID, CLIENT_KEY, ClientKey

PROBER = "securevllm-prober"
"""The client id of the operator's own prober, which asks for what must be refused."""

_TEXT = "16 to 512 characters of A-Z a-z 0-9 . _ ~ + / = -"


@dataclass(frozen=True)
class ClientKeys:
    """What the gateway accepts, and what it does not, by name only: no key ever stands in a message."""

    keys: tuple[ClientKey, ...]
    problems: tuple[str, ...]


def judge(secrets: Mapping[str, Mapping[str, bytes]]) -> ClientKeys:
    """Keys from Secrets.

    Args:
        secrets: per Secret name its data: client id to key. A trailing newline is not part of a key.
    """
    keys: dict[str, ClientKey] = {}
    clients: set[str] = set()
    problems = []
    for secret in sorted(secrets):
        for client, value in sorted(secrets[secret].items()):
            text = value.decode("ascii", "replace").removesuffix("\n").removesuffix("\r")
            if CLIENT_ID.fullmatch(client) is None:
                problems.append(f"Secret {secret}, data key {client!r}: not a client id of at most 63 characters")
            elif client == PROBER:
                problems.append(f"Secret {secret}, client {client}: this id is the operator's own")
            elif CLIENT_KEY.fullmatch(text) is None:
                problems.append(f"Secret {secret}, client {client}: a key is {_TEXT}")
            elif text in keys:
                problems.append(f"Secret {secret}, client {client}: the same key as client {keys[text].client}")
            elif client in clients:
                problems.append(f"Secret {secret}, client {client}: another Secret has a client of this id")
            else:
                keys[text] = ClientKey(client, text)
                clients.add(client)
    ordered = tuple(sorted(keys.values(), key=lambda item: item.client))
    return ClientKeys(ordered, tuple(problems))
