"""Mode Enforce: the Service that Envoy follows selects nothing while isolation is known to be broken.

Removing a policy would enforce nothing, and Envoy follows DNS: with the last endpoint gone it answers 503 within
seconds. Pods and policies stay as they are; health checks and measurements go on.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from securevllm.api.types import GROUP
from securevllm.render.meta import HASH_ANNOTATION, Object, Owner, stamp

if TYPE_CHECKING:
    from securevllm.render import Rendered

CLOSED_LABEL = f"{GROUP}/closed"
"""No pod carries it: labels of this prefix are the operator's."""


def closed(owner: Owner, rendered: Rendered) -> Rendered:
    """The same with no way from the gateway to an engine."""
    followed = owner.child(rendered.topology.entry.value)
    return replace(
        rendered,
        configuration=tuple(
            _closed(obj) if (obj["kind"], obj["metadata"]["name"]) == ("Service", followed) else obj
            for obj in rendered.configuration
        ),
    )


def _closed(service: Object) -> Object:
    spec = service["spec"] | {"selector": service["spec"]["selector"] | {CLOSED_LABEL: "isolation"}}
    metadata = dict(service["metadata"])
    notes = {name: value for name, value in metadata["annotations"].items() if name != HASH_ANNOTATION}
    # An empty map would make another hash than none.
    metadata = (
        {**metadata, "annotations": notes} if notes else {k: v for k, v in metadata.items() if k != "annotations"}
    )
    return stamp(service | {"spec": spec, "metadata": metadata})
