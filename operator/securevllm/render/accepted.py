"""What was accepted last, kept in a ConfigMap: the spec, the pod templates that it was rolled out with, and epochs.

The spec outlives a bad edit and an operator restart (I6). The templates outlive an operator upgrade (I11): as long as
what a template depends on is the same, the pinned one is applied again, and a newer rendering is only reported.

Whoever may write ConfigMaps could otherwise choose a pod template for the operator to apply, so the content carries a
seal: an HMAC whose key is in the engine's Secret, under a data key that no pod mounts.
"""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import lru_cache
from typing import Any, Literal

from securevllm.render.meta import Object, Owner, digest

SUFFIX = "accepted"
SPEC = "spec.json"
"""Key of the accepted spec."""
_PINS, _GROUPS, _SEAL = "templates.json", "groups.json", "seal"


@dataclass(frozen=True)
class Pin:
    """A template and the hash of what it was made from."""

    inputs: str
    template: Object


@dataclass(frozen=True)
class GroupMemory:
    """What is remembered of a group: a group that was half replaced must be known as such after a restart.

    Attributes:
        epoch: number of its present start; all its pods carry it.
        since: when this epoch was decided on, unix seconds.
        restarts: how often in a row it broke and started anew, for the back-off.
        members: uids of the pods that formed it, by rank; empty until all of them existed at once.
        why: what broke the epoch before; empty for any other start.
    """

    epoch: int = 0
    since: int = 0
    restarts: int = 0
    members: tuple[str, ...] = ()
    why: str = ""


@dataclass(frozen=True)
class Kept:
    """Content of the ConfigMap; a group without memory has never been restarted."""

    spec: dict[str, Any]
    pins: Mapping[str, Pin]
    groups: Mapping[str, GroupMemory] = field(default_factory=dict)


@dataclass(frozen=True)
class Settled:
    """The template to apply, and whether a fresh rendering would differ."""

    pin: Pin
    outdated: bool


def settle(
    fresh: Object,
    inputs: Any,
    pin: Pin | None,
    policy: Literal["WithSpec", "Always"],
    *,
    before: Sequence[Any] = (),
) -> Settled:
    """Keep the pinned template while its inputs are the same.

    Args:
        fresh: the template as this release renders it.
        inputs: what it depends on.
        pin: what was rolled out last.
        policy: of the spec.
        before: the same inputs as earlier releases wrote them down. A pin of theirs is kept as it is, so that after a
            rollback they know it again.
    """
    hashed = digest(inputs)
    if pin is None or policy == "Always" or pin.inputs not in {hashed, *map(digest, before)}:
        return Settled(Pin(hashed, fresh), outdated=False)
    return Settled(pin, outdated=pin.template != fresh)


def config_map(owner: Owner, kept: Kept, seal_key: bytes) -> Object:
    """The ConfigMap ``<name>-accepted``."""
    pins = {name: {"inputs": pin.inputs, "template": pin.template} for name, pin in kept.pins.items()}
    data = {SPEC: _text(kept.spec), _PINS: _text(pins)}
    if kept.groups:
        data[_GROUPS] = _text({name: asdict(memory) for name, memory in kept.groups.items()})
    data[_SEAL] = _seal(seal_key, owner.uid, *_sealed(data))
    return owner.object("v1", "ConfigMap", SUFFIX, "operator", data=data)


def read(owner: Owner, data: Mapping[str, str], seal_key: bytes) -> Kept | None:
    """Content that carries a valid seal; None otherwise: it is treated as lost, never as true."""
    expected = _seal(seal_key, owner.uid, *_sealed(data))
    if not hmac.compare_digest(data.get(_SEAL, "").encode(), expected.encode()):  # text would have to be ASCII
        return None
    pins = {name: Pin(pin["inputs"], pin["template"]) for name, pin in json.loads(data[_PINS]).items()}
    remembered = json.loads(data.get(_GROUPS, "{}"))
    groups = {name: _memory(item) for name, item in remembered.items()}
    return Kept(json.loads(data[SPEC]), pins, groups)


def _memory(kept: Mapping[str, Any]) -> GroupMemory:
    """Fields that a newer release has added are left out: after a rollback its groups must go on."""
    known = {item.name: kept[item.name] for item in fields(GroupMemory) if item.name in kept}
    return GroupMemory(**known | {"members": tuple(known.get("members", ()))})


def fingerprint(seal_key: bytes, secret: bytes) -> str:
    """Stands for a secret where people may look: with the key of the seal, a guess cannot be tried offline."""
    return hmac.new(seal_key, secret, hashlib.sha256).hexdigest()[:16] if secret else ""


def name(owner: Owner) -> str:
    """Name of the ConfigMap."""
    return owner.child(SUFFIX)


def _sealed(data: Mapping[str, str]) -> list[str]:
    """The parts under the seal; one that is taken away or added changes their number, and with it the seal.

    Never add a part: after a rollback the older release would not find the seal valid, and what is not sealed counts as
    lost, so that every engine would get a new template. A new field goes into one of the parts.
    """
    return [data.get(SPEC, ""), data.get(_PINS, ""), *([data[_GROUPS]] if _GROUPS in data else [])]


def _text(value: Any) -> str:
    return _indented(json.dumps(value, sort_keys=True))


@lru_cache(maxsize=1024)
def _indented(text: str) -> str:
    # json indents in Python, six times slower than it writes one line; of most resources nothing has changed.
    return json.dumps(json.loads(text), indent=1)


def _seal(key: bytes, *parts: str) -> str:
    # Lengths in front: moving text from one part to the next must not keep the seal.
    message = b"".join(len(part.encode()).to_bytes(8, "big") + part.encode() for part in parts)
    return hmac.new(key, message, hashlib.sha256).hexdigest()
