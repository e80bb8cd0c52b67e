"""A control plane of processes: etcd, kube-apiserver, kube-controller-manager. No nodes, no scheduler (see `hollow`).

The only TCP port is the API server's, on 127.0.0.1: etcd listens on a Unix socket in the cluster's folder (mode
0700), the controller-manager serves nothing. So any number of clusters run side by side, and nobody else on the
machine reaches the store. Everything is in that folder: keys, data, logs, the audit log, and the pid files by which
`stop` finds the processes again.
"""

from __future__ import annotations

import socket
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

import yaml

from e2e.cluster import daemon, kubeconfig
from e2e.cluster.binaries import KUBE_APISERVER, KUBE_CONTROLLER_MANAGER, Binaries, Progress
from e2e.cluster.errors import ClusterError
from e2e.cluster.pki import Authority, write_service_account_keys

ETCD = "etcd"
# Stopped in this order, so that nobody logs a lost peer.
DAEMONS = (KUBE_CONTROLLER_MANAGER, KUBE_APISERVER, ETCD)

# Relative to the working directory (the cluster's folder): a socket path is limited to 108 bytes, a folder's is not.
ETCD_CLIENT_URL = "unix://localhost:2379"
ETCD_PEER_URL = "unix://localhost:2380"

SERVICE_RANGE = "10.96.0.0/16"
API_SERVICE_IP = "10.96.0.1"
ISSUER = "https://kubernetes.default.svc.cluster.local"

# Controllers that act on nodes, their addresses or volumes: there is no kubelet to answer them, and the node
# lifecycle controller would taint and empty a node without heartbeats.
WITHOUT_CONTROLLERS = (
    "node-ipam-controller",
    "node-lifecycle-controller",
    "taint-eviction-controller",
    "persistentvolume-attach-detach-controller",
    "persistentvolume-expander-controller",
    "ttl-controller",
)

# Who did what, one line for each finished request. Health checks are left out: they would be most of it.
AUDIT_POLICY = {
    "apiVersion": "audit.k8s.io/v1",
    "kind": "Policy",
    "omitStages": ["RequestReceived", "ResponseStarted"],
    "rules": [
        {"level": "None", "nonResourceURLs": ["/healthz*", "/livez*", "/readyz*"]},
        {"level": "Metadata"},
    ],
}

READY_SECONDS = 90.0
PORT_ATTEMPTS = 5


def start(folder: Path, binaries: Binaries, progress: Progress) -> int:
    """Start a control plane in `folder` (exists, empty) and return the port of the API server once controllers work.

    Leaves `admin.kubeconfig`, `pki/ca.crt` and `audit.log` there. On an error the caller stops what was started.

    Raises:
        ClusterError: A process ended, or was not ready in time; the message has the end of its log.
    """
    began = time.monotonic()
    pki = folder / "pki"
    hosts = ("127.0.0.1", API_SERVICE_IP, "localhost", "kubernetes", "kubernetes.default", "kubernetes.default.svc")
    authority = Authority.create(pki)
    authority.issue("apiserver", "kube-apiserver", hosts=(*hosts, "kubernetes.default.svc.cluster.local"))
    authority.issue("admin", "admin", "system:masters")
    authority.issue(KUBE_CONTROLLER_MANAGER, "system:kube-controller-manager")
    write_service_account_keys(pki)
    (folder / "audit-policy.yaml").write_text(yaml.safe_dump(AUDIT_POLICY, sort_keys=False), encoding="utf-8")

    daemon.start(ETCD, _etcd(binaries), folder)
    port = _start_on_free_port(folder, binaries.kube_apiserver)
    progress(f"kube-apiserver {binaries.version} ready after {time.monotonic() - began:.1f} s")
    # Not before /readyz: it ends when its RBAC rules do not exist yet.
    daemon.start(KUBE_CONTROLLER_MANAGER, _controller_manager(binaries), folder)
    _wait(lambda: _get(folder, port, "/api/v1/namespaces/default/serviceaccounts/default"), folder, DAEMONS)
    progress(f"controllers work after {time.monotonic() - began:.1f} s")
    return port


def start_apiserver(folder: Path, program: Path, port: int) -> None:
    """Start the API server again on its port and wait until it is ready.

    Raises:
        ClusterError: It ended or was not ready in time.
    """
    daemon.start(KUBE_APISERVER, _apiserver(program, port), folder)
    _wait(lambda: _get(folder, port, "/readyz"), folder, (KUBE_APISERVER, ETCD))


def stop_apiserver(folder: Path) -> None:
    """End the API server (its store and the controllers stay) and return when it is gone."""
    # It would wait up to a minute for its clients to close their watches.
    daemon.stop(folder, KUBE_APISERVER, grace=1.0)


def stop(folder: Path) -> None:
    """End every process of this cluster. Its state is about to be deleted, so nobody waits for a graceful end."""
    for name in DAEMONS:
        daemon.stop(folder, name, grace=0.5)


def alive(folder: Path) -> bool:
    """Tell whether any process of this cluster runs."""
    return any(identity.alive() for name in DAEMONS if (identity := daemon.recorded(folder, name)))


def _start_on_free_port(folder: Path, program: Path) -> int:
    for _ in range(PORT_ATTEMPTS):
        port = _free_port()
        server = f"https://127.0.0.1:{port}"
        for user, file in (("admin", "admin"), (KUBE_CONTROLLER_MANAGER, KUBE_CONTROLLER_MANAGER)):
            _write_kubeconfig(folder, user, file, server)
        try:
            start_apiserver(folder, program, port)
        except ClusterError:
            # Between finding a free port and binding it, another process can take it.
            if "address already in use" not in daemon.log_tail(folder, KUBE_APISERVER, lines=50):
                raise
            daemon.stop(folder, KUBE_APISERVER)
            (folder / f"{KUBE_APISERVER}.log").unlink()
        else:
            return port
    raise ClusterError(f"no free port on 127.0.0.1 after {PORT_ATTEMPTS} attempts")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _write_kubeconfig(folder: Path, name: str, file: str, server: str) -> None:
    pki = folder / "pki"
    user = {"client-certificate": str(pki / f"{file}.crt"), "client-key": str(pki / f"{file}.key")}
    kubeconfig.write(folder / f"{name}.kubeconfig", server, pki / "ca.crt", user)


def _etcd(binaries: Binaries) -> list[str]:
    return [
        str(binaries.etcd),
        "--data-dir=etcd",
        f"--listen-client-urls={ETCD_CLIENT_URL}",
        f"--advertise-client-urls={ETCD_CLIENT_URL}",
        f"--listen-peer-urls={ETCD_PEER_URL}",
        f"--initial-advertise-peer-urls={ETCD_PEER_URL}",
        f"--initial-cluster=default={ETCD_PEER_URL}",
        "--unsafe-no-fsync",  # the data ends with the cluster
        "--log-level=warn",
    ]


def _apiserver(program: Path, port: int) -> list[str]:
    return [
        str(program),
        "--bind-address=127.0.0.1",
        f"--secure-port={port}",
        # Nothing is advertised (no endpoint reconciler), but without a value it looks for a default route.
        "--advertise-address=192.0.2.1",
        "--endpoint-reconciler-type=none",
        f"--etcd-servers={ETCD_CLIENT_URL}",
        f"--service-cluster-ip-range={SERVICE_RANGE}",
        "--allow-privileged=true",
        "--authorization-mode=RBAC",
        "--client-ca-file=pki/ca.crt",
        "--tls-cert-file=pki/apiserver.crt",
        "--tls-private-key-file=pki/apiserver.key",
        f"--service-account-issuer={ISSUER}",
        "--service-account-key-file=pki/sa.pub",
        "--service-account-signing-key-file=pki/sa.key",
        "--audit-policy-file=audit-policy.yaml",
        "--audit-log-path=audit.log",
        "--audit-log-maxsize=4096",  # MiB: a rotation would look like lost events
        "--profiling=false",
        "--v=1",
    ]


def _controller_manager(binaries: Binaries) -> list[str]:
    concurrent = ("deployment", "replicaset", "statefulset", "job", "endpoint", "namespace", "service-endpoint")
    return [
        str(binaries.kube_controller_manager),
        f"--kubeconfig={KUBE_CONTROLLER_MANAGER}.kubeconfig",
        "--secure-port=0",
        "--leader-elect=false",
        "--use-service-account-credentials=true",
        f"--controllers=*,{','.join(f'-{name}' for name in WITHOUT_CONTROLLERS)}",
        "--root-ca-file=pki/ca.crt",
        "--service-account-private-key-file=pki/sa.key",
        "--cluster-signing-cert-file=pki/ca.crt",
        "--cluster-signing-key-file=pki/ca.key",
        "--allocate-node-cidrs=false",
        # The default of 20 requests a second is made for a shared API server; here it would be what tests wait for.
        "--kube-api-qps=500",
        "--kube-api-burst=1000",
        *(f"--concurrent-{name}-syncs=20" for name in concurrent),
        "--v=1",
    ]


def _wait(ready: Callable[[], bool], folder: Path, names: tuple[str, ...]) -> None:
    deadline = time.monotonic() + READY_SECONDS
    while not ready():
        for name in names:
            identity = daemon.recorded(folder, name)
            if identity is None or not identity.alive():
                raise ClusterError(f"{name} ended; the end of {folder / name}.log:\n{daemon.log_tail(folder, name)}")
        if time.monotonic() > deadline:
            raise ClusterError(
                f"{names[0]} not ready after {READY_SECONDS:.0f} s; the end of {folder / names[0]}.log:\n"
                f"{daemon.log_tail(folder, names[0])}"
            )
        time.sleep(0.05)


def _get(folder: Path, port: int, path: str) -> bool:
    context = ssl.create_default_context(cafile=folder / "pki" / "ca.crt")
    context.load_cert_chain(folder / "pki" / "admin.crt", folder / "pki" / "admin.key")
    # No proxy of the environment may stand between this process and its own loopback.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context))
    try:
        with opener.open(f"https://127.0.0.1:{port}{path}", timeout=5) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False
