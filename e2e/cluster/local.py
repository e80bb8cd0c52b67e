"""A control plane of processes: etcd, kube-apiserver, kube-controller-manager, and kube-scheduler if there are nodes.

Without nodes (`hollow` stands in for one) the only TCP port is the API server's, on 127.0.0.1; with nodes it is on this
machine's address on their network (`network`). Etcd listens on a Unix socket in the cluster's folder (mode 0700), the
others serve nothing. So any number of clusters run side by side, and nobody else on the machine reaches the store.
Everything is in that folder: keys, data, logs, the audit log, and the pid files by which `stop` finds the processes
again.
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
from e2e.cluster.binaries import (
    CILIUM_AGENT,
    KUBE_APISERVER,
    KUBE_CONTROLLER_MANAGER,
    KUBE_PROXY,
    KUBE_SCHEDULER,
    Binaries,
    Progress,
    program,
)
from e2e.cluster.errors import ClusterError
from e2e.cluster.network import API_PORT, SERVICE_RANGE, Plan
from e2e.cluster.pki import Authority, write_service_account_keys

ETCD = "etcd"
# Stopped in this order, so that nobody logs a lost peer.
DAEMONS = (KUBE_SCHEDULER, KUBE_CONTROLLER_MANAGER, KUBE_APISERVER, ETCD)

# Relative to the working directory (the cluster's folder): a socket path is limited to 108 bytes, a folder's is not.
ETCD_CLIENT_URL = "unix://localhost:2379"
ETCD_PEER_URL = "unix://localhost:2380"

API_SERVICE_IP = "10.96.0.1"
ISSUER = "https://kubernetes.default.svc.cluster.local"

# Certificates that the API server shows as a client: to kubelet, and to aggregated API servers.
_TO_KUBELET = "apiserver-kubelet"
_AGGREGATOR = "front-proxy"

# Controllers that act on nodes, their addresses or volumes: without nodes there is no kubelet to answer them, and the
# node lifecycle controller would taint and empty a node without heartbeats.
WITHOUT_CONTROLLERS = (
    "node-ipam-controller",
    "node-lifecycle-controller",
    "taint-eviction-controller",
    "persistentvolume-attach-detach-controller",
    "persistentvolume-expander-controller",
    "ttl-controller",
)

# Who did what, one line for each finished request; of what isolates and of what makes pods also for which owner. Health
# checks are left out: they would be most of it.
AUDIT_POLICY = {
    "apiVersion": "audit.k8s.io/v1",
    "kind": "Policy",
    "omitStages": ["RequestReceived", "ResponseStarted"],
    "rules": [
        {"level": "None", "nonResourceURLs": ["/healthz*", "/livez*", "/readyz*"]},
        {
            "level": "Request",
            "verbs": ["create", "update", "patch"],
            "resources": [
                {"group": "networking.k8s.io", "resources": ["networkpolicies"]},
                {"group": "apps", "resources": ["deployments", "statefulsets"]},
                {"group": "batch", "resources": ["jobs"]},
            ],
            "omitManagedFields": True,
        },
        {"level": "Metadata"},
    ],
}

READY_SECONDS = 90.0
PORT_ATTEMPTS = 5


def start(folder: Path, binaries: Binaries, progress: Progress, plan: Plan | None = None) -> int:
    """Start a control plane in `folder` (exists, empty) and return the port of the API server once controllers work.

    Leaves `admin.kubeconfig`, `pki/ca.crt` and `audit.log` there, and with a plan what its nodes need: their
    kubeconfigs and certificates. On an error the caller stops what was started.

    Raises:
        ClusterError: A process ended, or was not ready in time; the message has the end of its log.
    """
    began = time.monotonic()
    pki = folder / "pki"
    authority = Authority.create(pki)
    hosts = (_address(plan), API_SERVICE_IP, "localhost", "kubernetes", "kubernetes.default", "kubernetes.default.svc")
    authority.issue("apiserver", "kube-apiserver", hosts=(*hosts, "kubernetes.default.svc.cluster.local"))
    for user, (common_name, organization, names) in _users(plan).items():
        authority.issue(user, common_name, organization, hosts=names)
    write_service_account_keys(pki)
    (folder / "audit-policy.yaml").write_text(yaml.safe_dump(AUDIT_POLICY, sort_keys=False), encoding="utf-8")

    daemon.start(ETCD, _etcd(binaries), folder)
    port = _start_on_free_port(folder, binaries.kube_apiserver, plan)
    progress(f"kube-apiserver {binaries.version} ready after {time.monotonic() - began:.1f} s")
    # Not before /readyz: they end when their RBAC rules do not exist yet.
    daemon.start(KUBE_CONTROLLER_MANAGER, _controller_manager(binaries, plan), folder)
    if plan:
        daemon.start(KUBE_SCHEDULER, _scheduler(), folder)
    started = DAEMONS if plan else tuple(name for name in DAEMONS if name != KUBE_SCHEDULER)
    account = "/api/v1/namespaces/default/serviceaccounts/default"
    _wait(lambda: _get(folder, _server(plan, port), account), folder, started)
    progress(f"controllers work after {time.monotonic() - began:.1f} s")
    return port


def start_apiserver(folder: Path, program: Path, port: int, plan: Plan | None = None) -> None:
    """Start the API server again on its port and wait until it is ready.

    Raises:
        ClusterError: It ended or was not ready in time.
    """
    daemon.start(KUBE_APISERVER, _apiserver(program, port, plan), folder)
    _wait(lambda: _get(folder, _server(plan, port), "/readyz"), folder, (KUBE_APISERVER, ETCD))


def stop_apiserver(folder: Path) -> None:
    """End the API server (its store and the controllers stay) and return when it is gone."""
    # It would wait up to a minute for its clients to close their watches.
    daemon.stop(folder, KUBE_APISERVER, grace=1.0)


def restart_controllers(folder: Path) -> None:
    """End the controllers and start them again, as they were started; returns when they run."""
    identity = daemon.recorded(folder, KUBE_CONTROLLER_MANAGER)
    if identity is None or not identity.alive():
        raise ClusterError(f"{KUBE_CONTROLLER_MANAGER} does not run; see {folder / KUBE_CONTROLLER_MANAGER}.log")
    command = Path(f"/proc/{identity.pid}/cmdline").read_text(encoding="utf-8").rstrip("\0").split("\0")
    daemon.stop(folder, KUBE_CONTROLLER_MANAGER)
    daemon.start(KUBE_CONTROLLER_MANAGER, command, folder)


def stop(folder: Path) -> None:
    """End every process of this cluster. Its state is about to be deleted, so nobody waits for a graceful end."""
    for name in DAEMONS:
        daemon.stop(folder, name, grace=0.5)


def alive(folder: Path) -> bool:
    """Tell whether any process of this cluster runs."""
    return any(identity.alive() for name in DAEMONS if (identity := daemon.recorded(folder, name)))


def _address(plan: Plan | None) -> str:
    return plan.gateway if plan else "127.0.0.1"


def _server(plan: Plan | None, port: int) -> str:
    return f"https://{_address(plan)}:{port}"


def _users(plan: Plan | None) -> dict[str, tuple[str, str | None, tuple[str, ...]]]:
    """Who gets a certificate and a kubeconfig: file name -> common name, organization, names as a server."""
    users: dict[str, tuple[str, str | None, tuple[str, ...]]] = {
        "admin": ("admin", "system:masters", ()),
        KUBE_CONTROLLER_MANAGER: (f"system:{KUBE_CONTROLLER_MANAGER}", None, ()),
    }
    if plan:
        users[KUBE_SCHEDULER] = (f"system:{KUBE_SCHEDULER}", None, ())
        users[KUBE_PROXY] = (f"system:{KUBE_PROXY}", None, ())
        users[CILIUM_AGENT] = (CILIUM_AGENT, "system:masters", ())
        users[_TO_KUBELET] = (_TO_KUBELET, "system:masters", ())
        users[_AGGREGATOR] = (_AGGREGATOR, None, ())
        users |= {node: (f"system:node:{node}", "system:nodes", (node, plan.node_ips(node)[0])) for node in plan.nodes}
    return users


def _start_on_free_port(folder: Path, program: Path, plan: Plan | None) -> int:
    for attempt in range(PORT_ATTEMPTS):
        # Somebody may listen on all addresses of this machine, the link's included.
        port = API_PORT + attempt if plan else _free_port()
        for user in _users(plan):
            _write_kubeconfig(folder, user, _server(plan, port))
        try:
            start_apiserver(folder, program, port, plan)
        except ClusterError:
            # Between finding a free port and binding it, another process can take it.
            if "address already in use" not in daemon.log_tail(folder, KUBE_APISERVER, lines=50):
                raise
            daemon.stop(folder, KUBE_APISERVER)
            (folder / f"{KUBE_APISERVER}.log").unlink()
        else:
            return port
    raise ClusterError(f"no free port on {_address(plan)} after {PORT_ATTEMPTS} attempts")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _write_kubeconfig(folder: Path, name: str, server: str) -> None:
    # Relative to the kubeconfig, for all but people: a node sees the folder at another place.
    pki = folder / "pki" if name == "admin" else Path("pki")
    user = {"client-certificate": str(pki / f"{name}.crt"), "client-key": str(pki / f"{name}.key")}
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


def _apiserver(program: Path, port: int, plan: Plan | None) -> list[str]:
    return [
        str(program),
        f"--bind-address={_address(plan)}",
        f"--secure-port={port}",
        *(_apiserver_for_nodes(plan) if plan else _apiserver_alone()),
        f"--etcd-servers={ETCD_CLIENT_URL}",
        f"--service-cluster-ip-range={','.join(plan.service_ranges) if plan else SERVICE_RANGE}",
        "--allow-privileged=true",
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


def _apiserver_alone() -> list[str]:
    return [
        # Nothing is advertised (no endpoint reconciler), but without a value it looks for a default route.
        "--advertise-address=192.0.2.1",
        "--endpoint-reconciler-type=none",
        "--authorization-mode=RBAC",
    ]


def _apiserver_for_nodes(plan: Plan) -> list[str]:
    return [
        f"--advertise-address={plan.gateway}",
        "--authorization-mode=Node,RBAC",
        "--enable-admission-plugins=NodeRestriction",
        f"--kubelet-client-certificate=pki/{_TO_KUBELET}.crt",
        f"--kubelet-client-key=pki/{_TO_KUBELET}.key",
        "--kubelet-certificate-authority=pki/ca.crt",
        "--kubelet-preferred-address-types=InternalIP",
        # Webhooks and aggregated APIs are reached at their pods: kube-proxy does not run on this machine.
        "--enable-aggregator-routing=true",
        "--requestheader-client-ca-file=pki/ca.crt",
        f"--requestheader-allowed-names={_AGGREGATOR}",
        "--requestheader-username-headers=X-Remote-User",
        "--requestheader-group-headers=X-Remote-Group",
        "--requestheader-extra-headers-prefix=X-Remote-Extra-",
        f"--proxy-client-cert-file=pki/{_AGGREGATOR}.crt",
        f"--proxy-client-key-file=pki/{_AGGREGATOR}.key",
    ]


def _controller_manager(binaries: Binaries, plan: Plan | None) -> list[str]:
    concurrent = ("deployment", "replicaset", "statefulset", "job", "endpoint", "namespace", "service-endpoint")
    without = () if plan else WITHOUT_CONTROLLERS
    pods, services = (plan.pod_ranges, plan.service_ranges) if plan else ((), ())
    ranges = [f"--cluster-cidr={','.join(pods)}", f"--service-cluster-ip-range={','.join(services)}"] if plan else []
    return [
        str(binaries.kube_controller_manager),
        f"--kubeconfig={KUBE_CONTROLLER_MANAGER}.kubeconfig",
        "--secure-port=0",
        "--leader-elect=false",
        "--use-service-account-credentials=true",
        "--flex-volume-plugin-dir=flex-volumes",  # the default is a folder of this machine
        f"--controllers={','.join(('*', *(f'-{name}' for name in without)))}",
        "--root-ca-file=pki/ca.crt",
        "--service-account-private-key-file=pki/sa.key",
        "--cluster-signing-cert-file=pki/ca.crt",
        "--cluster-signing-key-file=pki/ca.key",
        f"--allocate-node-cidrs={'true' if plan else 'false'}",
        *ranges,
        # The default of 20 requests a second is made for a shared API server; here it would be what tests wait for.
        "--kube-api-qps=500",
        "--kube-api-burst=1000",
        *(f"--concurrent-{name}-syncs=20" for name in concurrent),
        "--v=1",
    ]


def _scheduler() -> list[str]:
    kubeconfig = f"--kubeconfig={KUBE_SCHEDULER}.kubeconfig"
    return [str(program(KUBE_SCHEDULER)), kubeconfig, "--secure-port=0", "--leader-elect=false", "--v=1"]


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


def _get(folder: Path, server: str, path: str) -> bool:
    context = ssl.create_default_context(cafile=folder / "pki" / "ca.crt")
    context.load_cert_chain(folder / "pki" / "admin.crt", folder / "pki" / "admin.key")
    # No proxy of the environment may stand between this process and its own loopback.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context))
    try:
        with opener.open(f"{server}{path}", timeout=5) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False
