"""Is a live object what was rendered? Pure.

Three questions, because no single one is enough:

* Is everything that we say there, with our value? (``covers``)
* Did somebody *add* something? Forced server-side apply repairs the fields that we send and never removes
  what others added, so ``additions`` walks their ``managedFields`` against what was rendered.
* Did anything else move since our last write? Some fields belong to no manager: ``hostNetwork`` makes the API server
  fill in ``hostPort``, which stays when ``hostNetwork`` goes. ``footprint`` remembers the whole object.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from enum import Enum, auto
from typing import Any

from securevllm.api.units import quantity
from securevllm.render.meta import HASH_ANNOTATION, Object, digest

RESTARTED_AT = "kubectl.kubernetes.io/restartedAt"
"""``kubectl rollout restart``: a user's wish, not drift."""

_CONTROLLER_ANNOTATIONS = (
    "deployment.kubernetes.io/",
    "pv.kubernetes.io/",
    "volume.kubernetes.io/",
    # Load balancers and OpenShift's build tokens note here what they made.
    "cloud.google.com/",
    "metallb.io/",
    "metallb.universe.tf/",
    "networking.gke.io/",
    "openshift.io/",
    "service.beta.kubernetes.io/",
    "service.kubernetes.io/",
)
_SERVER_METADATA = (
    "creationTimestamp",
    "deletionGracePeriodSeconds",
    "deletionTimestamp",
    "generation",
    "managedFields",
    "resourceVersion",
    "selfLink",
    "uid",
)

_QUANTITY_FIELDS = frozenset({"limits", "requests", "sizeLimit"})

# Most of their fields are immutable, and controllers fill in others: never written back as a whole.
_CREATED_ONCE = frozenset({"Job", "PersistentVolumeClaim"})

# OpenShift adds its own to every ServiceAccount.
_CONTROLLER_FIELDS = {"ServiceAccount": frozenset({"secrets", "imagePullSecrets"})}


class Action(Enum):
    """What to do about a child."""

    KEEP = auto()
    APPLY = auto()
    REPLACE = auto()
    RECREATE = auto()


def judge(rendered: Object, live: Object, settled: str | None) -> Action:
    """Compare.

    Args:
        rendered: with its hash annotation.
        live: as the API server holds it.
        settled: ``footprint`` after our last write; None when this process has not written it yet.
    """
    said = live["metadata"].get("annotations", {}).get(HASH_ANNOTATION)
    if rendered["kind"] in _CREATED_ONCE:
        changed = said != rendered["metadata"]["annotations"][HASH_ANNOTATION]
        # A Job that has not ended is made anew; a claim can grow; what is done stays as it is.
        return _ONCE[rendered["kind"]](live) if changed else Action.KEEP
    if said != rendered["metadata"]["annotations"][HASH_ANNOTATION]:
        return Action.APPLY
    if settled is not None:
        return Action.KEEP if footprint(rendered, live) == settled else Action.REPLACE
    if not covers(rendered, live):
        return Action.APPLY
    return Action.REPLACE if next(additions(rendered, live), None) is not None else Action.KEEP


def _job(live: Object) -> Action:
    complete = any(
        item["type"] == "Complete" and item["status"] == "True" for item in live.get("status", {}).get("conditions", ())
    )
    return Action.KEEP if complete else Action.RECREATE


_ONCE: Mapping[str, Callable[[Object], Action]] = {"Job": _job, "PersistentVolumeClaim": lambda _: Action.APPLY}


def covers(rendered: Any, live: Any, *, quantities: bool = False) -> bool:
    """Whether ``live`` has everything of ``rendered``; more is allowed, in objects, not in lists.

    Args:
        rendered: an object or a part of one.
        live: the same part as the API server holds it.
        quantities: texts are quantities; anywhere else ``1000m`` is not ``1``.
    """
    if rendered == live:
        return True
    if isinstance(rendered, dict):
        if not isinstance(live, dict):
            return False
        # The API server drops an empty map or list, and keeps no field for it.
        return all(
            covers(value, live.get(key, type(value)()), quantities=quantities or key in _QUANTITY_FIELDS)
            for key, value in rendered.items()
        )
    if isinstance(rendered, list | tuple):
        if not isinstance(live, list) or len(rendered) != len(live):
            return False
        return all(covers(ours, theirs, quantities=quantities) for ours, theirs in zip(rendered, live, strict=True))
    return quantities and _same_quantity(rendered, live)


def _same_quantity(ours: Any, theirs: Any) -> bool:
    """``1000m`` is stored as ``1``."""
    try:
        return isinstance(ours, str) and isinstance(theirs, str) and quantity(ours) == quantity(theirs)
    except ValueError:
        return False


def additions(rendered: Object, live: Object) -> Iterator[str]:
    """Paths that somebody owns and that were not rendered, ``.status`` and controllers' own notes aside."""
    for entry in live["metadata"].get("managedFields", ()):
        # Our own entries count: anybody may write under our name, and what we wrote by PUT no later apply removes.
        if entry.get("subresource") == "status":
            continue
        ignored = _CONTROLLER_FIELDS.get(rendered["kind"], frozenset())
        yield from _added(entry.get("fieldsV1", {}), rendered, "", ignored)


def _added(fields: Mapping[str, Any], rendered: Any, path: str, ignored: frozenset[str]) -> Iterator[str]:
    """Walk ``fieldsV1`` (sigs.k8s.io/structured-merge-diff: f: field, k: list key, v: set value, i: index)."""
    for key, inner in fields.items():
        if key == ".":
            continue
        kind, _, name = key.partition(":")
        here = f"{path}.{name}"
        if _is_note(path, name) or here == ".status" or here.removeprefix(".") in ignored:
            continue
        found, child = _step(kind, name, rendered)
        if not found:
            yield here
        else:
            yield from _added(inner, child, here, ignored)


def _step(kind: str, name: str, node: Any) -> tuple[bool, Any]:
    if kind == "f" and isinstance(node, dict):
        return name in node, node.get(name)
    if kind == "k" and isinstance(node, list | tuple):
        wanted = json.loads(name)
        for item in node:
            if isinstance(item, dict) and wanted.items() <= item.items():
                return True, item
    if kind == "v" and isinstance(node, list | tuple):
        return json.loads(name) in node, None
    return False, None


def _is_note(path: str, name: str) -> bool:
    """Annotations that controllers write for themselves, and a user's restart."""
    if path == ".metadata.annotations":
        return name.startswith(_CONTROLLER_ANNOTATIONS)
    if path == ".metadata":
        return name in ("finalizers", *_SERVER_METADATA)
    return path == ".spec.template.metadata.annotations" and name == RESTARTED_AT


def footprint(rendered: Object, live: Object) -> str:
    """Hash of everything that only we, or drift, would change; an annotation that we render is ours."""
    metadata = {key: value for key, value in live["metadata"].items() if key not in (*_SERVER_METADATA, "finalizers")}
    notes = metadata.get("annotations", {})
    ours = rendered["metadata"].get("annotations", {})
    metadata["annotations"] = {k: v for k, v in notes.items() if k in ours or not k.startswith(_CONTROLLER_ANNOTATIONS)}
    ignored = _CONTROLLER_FIELDS.get(live["kind"], frozenset()) | {"metadata", "status"}
    body = {key: value for key, value in live.items() if key not in ignored}
    restarted = _restarted_at(live)
    if restarted is not None:
        body = json.loads(json.dumps(body))
        template = body["spec"]["template"]["metadata"]["annotations"]
        del template[RESTARTED_AT]
    return digest([metadata, body])


def _restarted_at(live: Object) -> str | None:
    template = live.get("spec", {}).get("template", {})
    value: str | None = template.get("metadata", {}).get("annotations", {}).get(RESTARTED_AT)
    return value


def replacement(rendered: Object, live: Object) -> Object:
    """The body of a PUT that leaves nothing but what was rendered, and what can only be as it is.

    ``metadata.resourceVersion`` makes it safe against a concurrent writer.
    """
    body: Object = json.loads(json.dumps(rendered))
    metadata = live["metadata"]
    body["metadata"]["resourceVersion"] = metadata["resourceVersion"]
    body["metadata"]["uid"] = metadata["uid"]
    if metadata.get("finalizers"):
        body["metadata"]["finalizers"] = metadata["finalizers"]
    for key, value in metadata.get("annotations", {}).items():
        if key.startswith(_CONTROLLER_ANNOTATIONS):
            body["metadata"].setdefault("annotations", {}).setdefault(key, value)
    for name in _CONTROLLER_FIELDS.get(body["kind"], ()):
        if name in live:
            body[name] = live[name]
    if body["kind"] == "Service":
        _keep_allocated(body["spec"], live["spec"])
    restarted = _restarted_at(live)
    if restarted is not None:
        body["spec"]["template"]["metadata"].setdefault("annotations", {})[RESTARTED_AT] = restarted
    return body


def _keep_allocated(spec: dict[str, Any], live: Mapping[str, Any]) -> None:
    """Addresses and ports of a Service, allocated once and immutable."""
    for name in ("clusterIP", "clusterIPs", "ipFamilies", "ipFamilyPolicy", "healthCheckNodePort"):
        if name in live:
            spec.setdefault(name, live[name])
    allocated = {port["port"]: port["nodePort"] for port in live.get("ports", ()) if "nodePort" in port}
    for port in spec.get("ports", ()):
        if port["port"] in allocated and spec.get("type") != "ClusterIP":
            port["nodePort"] = allocated[port["port"]]
