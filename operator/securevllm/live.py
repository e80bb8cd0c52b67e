"""Reads what `securevllm check` needs of a live namespace. Only reads, and no Secrets.

A kind that is not installed has no objects; one that may not be read is said so, and everything else is read.
"""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

from securevllm.api import kinds
from securevllm.api.kinds import Kind
from securevllm.check import Document, Source, Wrong, objects
from securevllm.cluster import Kubernetes, Login, connect
from securevllm.errors import ApiError, Forbidden, NotFound, OperatorError

_BINDINGS = Kind(
    "admissionregistration.k8s.io/v1",
    "ValidatingAdmissionPolicyBinding",
    "validatingadmissionpolicybindings",
    namespaced=False,
)
_KINDS = (
    kinds.SECURE_VLLM_DEPLOYMENT,
    kinds.DEPLOYMENT,
    kinds.STATEFUL_SET,
    Kind("apps/v1", "DaemonSet", "daemonsets"),
    kinds.REPLICA_SET,
    kinds.JOB,
    Kind("batch/v1", "CronJob", "cronjobs"),
    Kind("leaderworkerset.x-k8s.io/v1", "LeaderWorkerSet", "leaderworkersets"),
    kinds.POD,
    kinds.SERVICE,
    kinds.CONFIG_MAP,
    kinds.NETWORK_POLICY,
    Kind("networking.k8s.io/v1", "Ingress", "ingresses"),
    Kind("gateway.networking.k8s.io/v1", "HTTPRoute", "httproutes"),
    Kind("inference.networking.k8s.io/v1", "InferencePool", "inferencepools"),
    Kind("cilium.io/v2", "CiliumNetworkPolicy", "ciliumnetworkpolicies"),
    Kind("projectcalico.org/v3", "NetworkPolicy", "networkpolicies"),
    Kind("crd.projectcalico.org/v1", "NetworkPolicy", "networkpolicies"),
    Kind("security.istio.io/v1", "AuthorizationPolicy", "authorizationpolicies"),
    _BINDINGS,
    Kind("policy.networking.k8s.io/v1alpha1", "AdminNetworkPolicy", "adminnetworkpolicies", namespaced=False),
)


def snapshot(namespace: str, kubeconfig: Path | None) -> list[Document | Wrong]:
    """Read a namespace.

    Args:
        namespace: its name.
        kubeconfig: how to log in; None: as `user_login` finds out.

    Raises:
        OperatorError: the login cannot be read, or nothing answers.
    """
    return asyncio.run(_snapshot(namespace, user_login(kubeconfig)))


def user_login(kubeconfig: Path | None, context: str | None = None) -> Login:
    """How a person's command logs in.

    Args:
        kubeconfig: None: ``$KUBECONFIG``, then ``~/.kube/config``, then the pod's service account.
        context: of the kubeconfig; None: its current one.

    Raises:
        OperatorError: ``$KUBECONFIG`` is not one file, or a context is named and there is no kubeconfig to have it.
    """
    kubeconfig = kubeconfig or _ambient()
    if kubeconfig is None:
        default = Path.home() / ".kube" / "config"
        kubeconfig = default if default.is_file() else None
    if kubeconfig is None and context is not None:
        # The pod's own cluster would be another one than the person means.
        raise OperatorError(
            f"--context {context} is one of a kubeconfig, and there is none (~/.kube/config): name it with --kubeconfig"
            " FILE, or leave --context out to log in with the pod's service account"
        )
    return Login(kubeconfig, context=context)


def _ambient() -> Path | None:
    """The file of ``$KUBECONFIG``. kubectl merges several; which of them is meant would be a guess."""
    files = [part for part in os.environ.get("KUBECONFIG", "").split(os.pathsep) if part]
    if len(files) > 1:
        raise OperatorError("$KUBECONFIG lists several files; name one with --kubeconfig")
    if files and not Path(files[0]).is_file():
        raise OperatorError(f"$KUBECONFIG names {files[0]}, which is no file; name one with --kubeconfig")
    return Path(files[0]) if files else None


async def _snapshot(namespace: str, login: Login) -> list[Document | Wrong]:
    async with connect(login, fence=lambda: False) as client:
        found = await asyncio.gather(*(_list(client, kind, namespace) for kind in _KINDS))
    return [item for part in found for item in part]


async def _list(client: Kubernetes, kind: Kind, namespace: str) -> list[Document | Wrong]:
    place = f"{kind.resource} of namespace {namespace}" if kind.namespaced else kind.resource
    try:
        listing = await client.list(kind, namespace if kind.namespaced else None)
    except NotFound:
        return []
    except Forbidden as error:
        return [Wrong(Source(place), f"may not be read: {error}")]
    except ApiError as error:
        if not error.status:
            raise
        return [Wrong(Source(place), f"cannot be read: {error}")]
    return [found for item in listing.items for found in objects(Source(place), item)]
