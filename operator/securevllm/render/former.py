"""What groups still run although the spec has moved on: kept until their turn has come, so that drift is repaired.

Groups are rolled one after the other, and each when all others serve, so an old one may wait for hours. Until then its
StatefulSets are to be what they were: somebody who edits one chooses what the next pod of it is. Its templates stay
under the seal, beside those that are wanted, as long as something that is there carries their hash.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from securevllm.render import engine
from securevllm.render.meta import stamp

if TYPE_CHECKING:
    from securevllm.api import types as api
    from securevllm.render.accepted import GroupMemory, Pin
    from securevllm.render.meta import Object, Owner
    from securevllm.topology import Group

_NAME = re.compile(r"(?:was/[0-9a-f]+/)?(?P<name>(?P<shape>[a-z]+/(?P<pods>\d+)x(?P<ranks>\d+))(?:/head|/others)?)")


@dataclass(frozen=True)
class Templates:
    """The templates of one side, as they were rolled out.

    Attributes:
        pods: of a group.
        ranks: data-parallel ranks of a pod.
        pins: by their name, the head's first.
    """

    pods: int
    ranks: int
    pins: Mapping[str, Pin]

    @property
    def objects(self) -> tuple[Object, ...]:
        """Templates of the head, and of the others if there are any."""
        return tuple(pin.template for pin in self.pins.values())


def templates(pins: Mapping[str, Pin]) -> dict[str, Templates]:
    """All that are complete, by the hash that their pods carry.

    Args:
        pins: by name; those of groups, as ``engine.pin_names`` has them, and former ones, as ``kept`` has them.
    """
    found: dict[tuple[str, str], dict[str, Pin]] = {}
    shapes: dict[tuple[str, str], tuple[int, int]] = {}
    for name in sorted(pins):
        match = _NAME.fullmatch(name)
        if match is not None:
            place = name.removesuffix(match["name"]), match["shape"]
            found.setdefault(place, {})[match["name"]] = pins[name]
            shapes[place] = int(match["pods"]), int(match["ranks"])
    sets = [Templates(*shapes[place], pins) for place, pins in found.items()]
    return {engine.template_hash(item.pods, item.objects): item for item in sets if len(item.pins) == min(item.pods, 2)}


def kept(known: Mapping[str, Templates], wanted: Collection[str], carried: Collection[str]) -> dict[str, Pin]:
    """Pins to keep beside those that are wanted.

    Args:
        known: by hash.
        wanted: hashes of what is rendered.
        carried: hashes on StatefulSets and pods that are there.
    """
    return {
        f"was/{hashed}/{name}": pin
        for hashed, item in known.items()
        if hashed in carried and hashed not in wanted
        for name, pin in item.pins.items()
    }


def groups(
    owner: Owner,
    spec: api.Spec,
    known: Mapping[str, Templates],
    rendered: Collection[engine.RenderedGroup],
    *,
    carried: Mapping[str, Collection[str]],
    memory: Mapping[str, GroupMemory],
) -> Iterator[engine.RenderedGroup]:
    """The groups that carry something else than what is rendered, as they were rolled out.

    Args:
        owner: the resource.
        spec: the accepted one; whether it is suspended counts.
        known: templates by hash.
        rendered: groups as they are wanted.
        carried: by group: hashes on its StatefulSets and pods.
        memory: of the groups: their epochs.
    """
    for wanted in rendered:
        group: Group = wanted.group
        hashed = next((item for item in carried.get(group.name, ()) if item in known), wanted.template)
        if hashed == wanted.template:
            continue
        epoch = memory[group.name].epoch if group.name in memory else 0
        item = known[hashed]
        workloads = engine.stateful_sets(
            owner, spec, group, (item.pods, item.ranks), item.objects, pair=(hashed, epoch)
        )
        yield engine.RenderedGroup(group, hashed, epoch, tuple(map(stamp, workloads)))
