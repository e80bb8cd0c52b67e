"""What the operator may ask for, and what it did ask for: `make test`'s tier `rights` compares the two.

The tests of the API tier write down what the audit logs of their clusters say (`remember`), one file for each cluster,
in the folder that `SVLLM_RIGHTS` names. Run as a program with that folder, this tells which rights no test has used.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from tests.api.operator_process import INSTALL, OPERATOR_NAMESPACE, SERVICE_ACCOUNT

if TYPE_CHECKING:
    from e2e.cluster import Cluster
    from securevllm.api.kinds import KubeObject

Right = tuple[str, str, str]
"""API group, resource with subresource, verb."""

FOLDER = "SVLLM_RIGHTS"
"""Environment variable with the folder for what was used; absent: nothing is written down."""

OURS = {"kind": "ServiceAccount", "name": SERVICE_ACCOUNT, "namespace": OPERATOR_NAMESPACE}
"""Subject of the bindings of an installation."""

NEVER_ASKED: Mapping[Right, str] = {
    ("securevllm.io", "securevllmdeployments/finalizers", "update"): (
        "the admission plugin OwnerReferencesPermissionEnforcement asks for it, where it is on, when a child is written"
    ),
}
"""Rights that no request may show, and why they are there."""

_ACCOUNTS = f"system:serviceaccount:{OPERATOR_NAMESPACE}:"
_AGENTS = ("securevllm", "kopf")
"""User agents of the operator: its own client's and its watcher's. Some tests ask as its account, too."""


def granted(installed: Sequence[KubeObject]) -> set[Right]:
    """Rights of the operator's service account."""
    roles = {(obj["kind"], obj["metadata"]["name"]): obj for obj in installed if obj["kind"] in {"Role", "ClusterRole"}}
    bound = [obj["roleRef"] for obj in installed if OURS in obj.get("subjects", ())]
    assert bound
    return {
        (group, name, verb)
        for reference in bound
        for rule in roles[reference["kind"], reference["name"]]["rules"]
        for group in rule["apiGroups"]
        for name in rule["resources"]
        for verb in rule["verbs"]
    }


def by_operators(cluster: Cluster) -> list[dict[str, Any]]:
    """Requests by the accounts of operators, as the audit log has them."""
    return [event for event in cluster.audit_events() if event["user"].get("username", "").startswith(_ACCOUNTS)]


def used(events: Iterable[Mapping[str, Any]]) -> set[Right]:
    """Rights that answered requests have needed."""
    found: set[Right] = set()
    for event in events:
        if "objectRef" not in event:
            # ClusterRole system:discovery, which everybody has: kopf asks which resources there are.
            assert event["requestURI"].startswith("/api"), event
            continue
        reference = event["objectRef"]
        name = "/".join(filter(None, (reference.get("resource", ""), reference.get("subresource", ""))))
        where = (reference.get("apiGroup", ""), name)
        found.add((*where, event["verb"]))
        if event["verb"] == "patch" and event["responseStatus"]["code"] == 201:
            found.add((*where, "create"))  # an apply that creates is asked for both
    return found


def forbidden(events: Iterable[Mapping[str, Any]], starts: Sequence[datetime] = ()) -> list[str]:
    """What was asked for without the right to it.

    Left out: what a namespace refuses because it ends, and what an API server refuses that has just started and does
    not know its rules yet.

    Args:
        events: of the audit log.
        starts: when the API server was started again.
    """

    def starting(moment: datetime) -> bool:
        return any(start <= moment < start + timedelta(seconds=20) for start in starts)

    return [
        f"{event['verb']} {event['requestURI']} at {event['requestReceivedTimestamp']}"
        for event in events
        if _refused(event) and not starting(datetime.fromisoformat(event["requestReceivedTimestamp"]))
    ]


def _refused(event: Mapping[str, Any]) -> bool:
    return bool(event.get("annotations", {}).get("authorization.k8s.io/decision") == "forbid")


def remember(name: str, events: Iterable[Mapping[str, Any]]) -> None:
    """Write down which rights were used, if somebody wants to know; a watch counts once it has ended."""
    if folder := os.environ.get(FOLDER):
        Path(folder).mkdir(parents=True, exist_ok=True)
        own = [event for event in events if event.get("userAgent", "").startswith(_AGENTS) and not _refused(event)]
        found = sorted(used(own))
        (Path(folder) / f"{name}.json").write_text(json.dumps(found), encoding="utf-8")


def unused(folder: Path, installed: Sequence[KubeObject]) -> set[Right]:
    """Rights of an installation that nobody has used."""
    found = {tuple(right) for path in folder.glob("*.json") for right in json.loads(path.read_text(encoding="utf-8"))}
    return granted(installed) - found - NEVER_ASKED.keys()


def _installed() -> list[KubeObject]:
    """Roles and bindings of `manifests/install`."""
    files = [INSTALL.parent / "rbac" / "operator.yaml", INSTALL.parent / "rbac" / "binding.yaml"]
    files.append(INSTALL.parent / "base" / "lease.yaml")
    return [obj for path in files for obj in yaml.safe_load_all(path.read_text(encoding="utf-8"))]


def main(arguments: Sequence[str]) -> int:
    """Tell which rights no test has used; returns the exit code."""
    left = sorted(unused(Path(arguments[0]), _installed()))
    for group, name, verb in left:
        print(f"no API test makes the operator {verb} {name}{f'.{group}' if group else ''}")  # noqa: T201
    if left:
        print("take the right out of manifests/rbac/operator.yaml (make chart), or test what needs it")  # noqa: T201
    return 1 if left else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
