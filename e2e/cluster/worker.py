"""One pod of the hollow node, from the moment it is bound until it is deleted. One asyncio task each.

In order: volumes and environment (retried until their sources exist), init containers one after another, then all
containers. Two things go on beside that: the volumes are synced when the pod changes and once a minute, and the
status is reported when it changes.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http import HTTPStatus
from pathlib import Path
from typing import Any

from e2e.cluster import daemon, environment, probes, volumes
from e2e.cluster.kube import Api, JsonObject, RefusedError
from e2e.cluster.podstatus import INITIALIZING, WAITING, Container, may_restart, pod_status
from e2e.cluster.runners import ContainerStart, Launch, Outcome, Runner
from e2e.cluster.volumes import Sources, VolumeError

# Kubelet's are 10 s, doubled up to 5 min: nobody waits for that in a test.
_FIRST_BACKOFF, _LAST_BACKOFF = 0.5, 10.0
_VOLUME_RETRY = 0.5
_EAGER_PROBE = 0.25


@dataclass(frozen=True)
class Node:
    """What all pods of a node share.

    Attributes:
        api: The API server.
        name: Name of the Node object.
        ip: Address of the node.
        dns: Address and port of the DNS server.
        folder: Folder of the node; pods have their folders in `pods/`, logs are in `logs/`.
        runner: Decides what containers run as.
        env: Variables that every container gets: where the API server is.
        resync: Seconds after which volumes are synced without a reason.
        processes: Folder in which running processes are recorded, for a clean-up after a crash.
    """

    api: Api
    name: str
    ip: str
    dns: tuple[str, int]
    folder: Path
    runner: Runner
    env: Mapping[str, str]
    resync: float
    processes: Path


@dataclass
class _Running:
    """A container that was prepared: its volumes are synced from now on."""

    spec: Mapping[str, Any]
    record: str
    rewrite: Callable[[str], str] | None = None
    process: asyncio.subprocess.Process | None = None


@dataclass
class PodWorker:
    """Runs one pod; `run` returns when the pod is gone."""

    node: Node
    pod: JsonObject
    ip: str
    _changed: asyncio.Event = field(default_factory=asyncio.Event)
    _deleted: asyncio.Event = field(default_factory=asyncio.Event)
    _dirty: asyncio.Event = field(default_factory=asyncio.Event)
    _running: dict[str, _Running] = field(default_factory=dict)
    _tokens: dict[str, tuple[str, float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        spec, metadata = self.pod["spec"], self.pod["metadata"]
        self._init = [Container(item) for item in spec.get("initContainers", [])]
        self._containers = [Container(item) for item in spec["containers"]]
        self._policy: str = spec.get("restartPolicy", "Always")
        self._start_time = _now()
        self._status: JsonObject = self.pod.get("status", {})
        self._namespace: str = metadata["namespace"]
        self._name: str = metadata["name"]
        self._uid: str = metadata["uid"]
        self._path = f"/api/v1/namespaces/{self._namespace}/pods/{self._name}"
        self._folder: Path = self.node.folder / "pods" / self._uid
        if self._init:
            for container in self._containers:
                container.state = INITIALIZING
        self._look(self.pod)

    def update(self, pod: JsonObject) -> None:
        """Take a new version of the pod; anything but a change of its status is a reason to sync."""
        if _relevant(pod) != _relevant(self.pod):
            self._changed.set()
        if _closed_gates(pod) != _closed_gates(self.pod):
            self._dirty.set()
        self.pod = pod
        self._look(pod)

    def _look(self, pod: JsonObject) -> None:
        if pod["metadata"].get("deletionTimestamp"):
            self._deleted.set()

    async def run(self) -> None:
        """Live, and terminate when the pod is being deleted. Cancelled: end everything at once."""
        self._folder.mkdir(parents=True, exist_ok=True)
        try:
            if not self._deleted.is_set():
                await self._work()
            await self._terminate()
        finally:
            try:
                await asyncio.gather(*(self._end(running, 0.0) for running in self._running.values()))
            finally:  # the pod may be seen to be gone, which cancels this, right after it was deleted
                shutil.rmtree(self._folder, ignore_errors=True)

    async def _work(self) -> None:
        """Run the containers until the pod is being deleted; then nothing is started again."""
        self._dirty.set()
        working = asyncio.gather(self._live(), self._sync_volumes(), self._report())
        deleted = asyncio.create_task(self._deleted.wait())
        either: list[asyncio.Future[Any]] = [working, deleted]
        try:
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if working.done():
                working.result()
        finally:
            for future in either:
                future.cancel()
            await asyncio.gather(*either, return_exceptions=True)

    # Containers

    async def _live(self) -> None:
        for container in self._init:
            await self._supervise(container, "OnFailure" if self._policy == "Always" else self._policy, init=True)
            if container.exit_code != 0:
                return
        for container in self._containers:
            if container.state is INITIALIZING:
                container.state = WAITING
        await asyncio.gather(*(self._supervise(container, self._policy, init=False) for container in self._containers))

    async def _supervise(self, container: Container, policy: str, *, init: bool) -> None:
        backoff = 0.0
        while True:
            decision = await self._prepare(container)
            container.container_id = f"hollow://{self._uid}/{container.spec['name']}/{container.restart_count}"
            container.state = {"running": {"startedAt": _now()}}
            if not isinstance(decision, Launch):
                if decision is Outcome.SUCCEED or init:
                    self._ended(container, 0)
                else:
                    container.started = container.ready = True
                self._dirty.set()
                return
            code = await self._execute(container, decision)
            self._ended(container, code)
            self._dirty.set()
            if not may_restart(policy, code):
                return
            await asyncio.sleep(backoff)
            backoff = min(max(_FIRST_BACKOFF, backoff * 2), _LAST_BACKOFF)
            container.restart_count += 1
            container.last_state = container.state

    async def _prepare(self, container: Container) -> Launch | Outcome:
        """Resolve the environment, ask the runner and write the volumes; wait until that is possible."""
        spec = container.spec
        while True:
            try:
                return await self._prepared(spec)
            except VolumeError as error:
                container.state = {"waiting": {"reason": "ContainerCreating", "message": str(error)}}
                self._dirty.set()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._changed.wait(), _VOLUME_RETRY)

    async def _prepared(self, spec: Mapping[str, Any]) -> Launch | Outcome:
        if refusal := probes.unsupported(spec):
            raise VolumeError(refusal)
        sources = self._sources()
        env = await environment.resolve(spec, sources, self.node.env)
        start = ContainerStart(
            pod=self.pod,
            container=spec,
            mounts=self._mounts(spec),
            ip=self.ip,
            env=env,
            command=environment.expand_all(spec.get("command"), env),
            args=environment.expand_all(spec.get("args"), env),
            dns=self.node.dns,
        )
        decision = self.node.runner(start) or Outcome.HOLD
        running = _Running(
            spec, f"{self._uid}.{spec['name']}", decision.rewrite if isinstance(decision, Launch) else None
        )
        await self._write_volumes(running, sources)
        self._running[spec["name"]] = running
        return decision

    async def _execute(self, container: Container, launch: Launch) -> int:
        name = container.spec["name"]
        running = self._running[name]
        self._termination_log(name).write_text("", encoding="utf-8")
        with self._log(name).open("ab") as log:
            try:
                process = await asyncio.create_subprocess_exec(
                    *launch.argv,
                    env={**launch.env, "TERMINATION_LOG": str(self._termination_log(name))},
                    cwd=self._folder,
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
            except OSError as error:
                log.write(f"{error}\n".encode())
                return 127  # what a shell says when there is no such program
        running.process = process
        with contextlib.suppress(ProcessLookupError):
            daemon.record(self.node.processes, running.record, process.pid)
        self._dirty.set()
        probing = asyncio.create_task(self._probe(container, process))
        try:
            return await process.wait()
        finally:
            probing.cancel()
            await asyncio.gather(probing, return_exceptions=True)
            if process.returncode is not None:
                self._clean_up(running, process)

    def _ended(self, container: Container, code: int) -> None:
        started = container.state["running"]["startedAt"]
        # A signal is reported as container runtimes do.
        code = 128 - code if code < 0 else code
        reason = "Completed" if code == 0 else "Error"
        terminated = {"exitCode": code, "reason": reason, "startedAt": started, "finishedAt": _now()}
        if message := self._message(container.spec["name"]):
            terminated["message"] = message
        container.state = {"terminated": {**terminated, "containerID": container.container_id}}
        container.started = container.ready = False

    def _termination_log(self, container: str) -> Path:
        """Stands in for /dev/termination-log, which a process of this machine must not write."""
        return self._folder / f"{container}.termination"

    def _message(self, container: str) -> str:
        path = self._termination_log(container)
        return path.read_text(encoding="utf-8")[:4096] if path.exists() else ""

    async def _probe(self, container: Container, process: asyncio.subprocess.Process) -> None:
        spec = container.spec
        if startup := spec.get("startupProbe"):
            allowed = startup.get("periodSeconds", 10) * startup.get("failureThreshold", 3)
            deadline = time.monotonic() + startup.get("initialDelaySeconds", 0) + allowed
            while not await probes.perform(startup, spec, self.ip):
                if time.monotonic() > deadline:
                    _signal_group(process, signal.SIGTERM)
                    return
                await asyncio.sleep(_EAGER_PROBE)
        container.started = True
        self._dirty.set()
        readiness = spec.get("readinessProbe")
        if not readiness:
            container.ready = True
            return
        await asyncio.sleep(readiness.get("initialDelaySeconds", 0))
        streak = 0
        while True:
            success = await probes.perform(readiness, spec, self.ip)
            streak = 0 if success == container.ready else streak + 1
            threshold = ("successThreshold", 1) if success else ("failureThreshold", 3)
            if streak >= readiness.get(*threshold):
                container.ready, streak = success, 0
                self._dirty.set()
            # Before the first success kubelet would wait a whole period; tests and demo would wait with it.
            await asyncio.sleep(readiness.get("periodSeconds", 10) if container.ready else _EAGER_PROBE)

    # Volumes

    def _mounts(self, spec: Mapping[str, Any]) -> dict[str, Path]:
        kinds = {volume["name"]: volume for volume in self.pod["spec"].get("volumes", [])}
        mounts = {}
        for mount in spec.get("volumeMounts", []):
            path = self._volume_folder(kinds[mount["name"]], spec["name"])
            mounts[mount["mountPath"].rstrip("/")] = path / mount["subPath"] if mount.get("subPath") else path
        return mounts

    def _volume_folder(self, volume: Mapping[str, Any], container: str) -> Path:
        if claim := volume.get("persistentVolumeClaim"):
            return self.node.folder / "claims" / self._namespace / str(claim["claimName"])
        if "emptyDir" in volume:
            return self._folder / "empty" / str(volume["name"])
        # Written once for each container, because a runner may rewrite the files for its own.
        return self._folder / "volumes" / container / str(volume["name"])

    async def _write_volumes(self, running: _Running, sources: Sources) -> None:
        mounted = {mount["name"] for mount in running.spec.get("volumeMounts", [])}
        for volume in self.pod["spec"].get("volumes", []):
            if volume["name"] not in mounted:
                continue
            folder = self._volume_folder(volume, running.spec["name"])
            files = await volumes.payload(volume, sources)
            if files is None:
                folder.mkdir(parents=True, exist_ok=True)
            else:
                volumes.write(folder, _rewritten(files, running.rewrite))
        for path in self._mounts(running.spec).values():
            path.mkdir(parents=True, exist_ok=True)

    async def _sync_volumes(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), self.node.resync)
            self._changed.clear()
            sources = self._sources()
            for running in list(self._running.values()):
                # A source that is gone leaves the files as they are, as kubelet does.
                with contextlib.suppress(VolumeError):
                    await self._write_volumes(running, sources)

    def _sources(self) -> Sources:
        """Make sources that read every object once: one sync sees one state."""
        found: dict[str, JsonObject | None] = {}

        async def read(kind: str, name: str) -> JsonObject | None:
            path = f"/api/v1/namespaces/{self._namespace}/{kind}/{name}"
            if path not in found:
                try:
                    found[path] = await self.node.api.get(path)
                except RefusedError as refused:
                    if refused.status != HTTPStatus.NOT_FOUND:
                        raise VolumeError(str(refused)) from refused
                    found[path] = None
            return found[path]

        return Sources(
            config_map=lambda name: read("configmaps", name),
            secret=lambda name: read("secrets", name),
            token=self._token,
            fields=environment.downward_fields(self.pod, self.ip, self.node.ip),
        )

    async def _token(self, request: dict[str, Any]) -> str:
        key = json.dumps(request, sort_keys=True)
        token, renew_at = self._tokens.get(key, ("", 0.0))
        if time.monotonic() > renew_at:
            account = self.pod["spec"].get("serviceAccountName", "default")
            path = f"/api/v1/namespaces/{self._namespace}/serviceaccounts/{account}/token"
            bound = {"apiVersion": "v1", "kind": "Pod", "name": self._name, "uid": self._uid}
            try:
                answer = await self.node.api.create(path, {"spec": {**request, "boundObjectRef": bound}})
            except RefusedError as refused:
                raise VolumeError(str(refused)) from refused
            token = answer["status"]["token"]
            self._tokens[key] = (token, time.monotonic() + 0.8 * request["expirationSeconds"])
        return token

    # Status and the end

    async def _report(self) -> None:
        while True:
            await self._dirty.wait()
            self._dirty.clear()
            await self._send_status()

    async def _send_status(self) -> None:
        status = pod_status(
            ip=self.ip,
            node_ip=self.node.ip,
            start_time=self._start_time,
            now=_now(),
            init=self._init,
            containers=self._containers,
            restart_policy=self._policy,
            previous=self._status,
            closed_gates=_closed_gates(self.pod),
        )
        if status == self._status:
            return
        self._status = status
        body = {"metadata": {"uid": self._uid}, "status": status}
        try:
            await self.node.api.merge_by_key(f"{self._path}/status", body)
        except RefusedError as refused:
            # Gone, or another pod of the same name by now: the watch will say so.
            if refused.status not in {HTTPStatus.NOT_FOUND, HTTPStatus.CONFLICT}:
                raise

    async def _terminate(self) -> None:
        """Do what kubelet does after a graceful delete: preStop, SIGTERM, the grace period, SIGKILL, gone."""
        grace = float(self.pod["metadata"].get("deletionGracePeriodSeconds") or 0)
        await asyncio.gather(*(self._end(running, grace) for running in self._running.values()))
        for container in (*self._init, *self._containers):
            if "running" in container.state:
                process = self._running[container.spec["name"]].process
                self._ended(container, process.returncode or 0 if process else 0)
        await self._send_status()
        await self.node.api.delete(self._path, {"gracePeriodSeconds": 0, "preconditions": {"uid": self._uid}})

    async def _end(self, running: _Running, grace: float) -> None:
        process = running.process
        if process is None or process.returncode is not None:
            return
        deadline = time.monotonic() + grace
        pre_stop = running.spec.get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(process.wait(), min(pre_stop, grace))
        _signal_group(process, signal.SIGTERM)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(process.wait(), max(0.0, deadline - time.monotonic()))
        _signal_group(process, signal.SIGKILL)
        await process.wait()
        self._clean_up(running, process)

    def _clean_up(self, running: _Running, process: asyncio.subprocess.Process) -> None:
        # Whatever it started ends with the container, as in a pid namespace.
        _signal_group(process, signal.SIGKILL)
        daemon.pid_file(self.node.processes, running.record).unlink(missing_ok=True)

    def _log(self, container: str) -> Path:
        return log_file(self.node.folder, self._namespace, self._name, container)


def log_file(folder: Path, namespace: str, pod: str, container: str) -> Path:
    """Return where the output of a container is kept, after the pod's end too."""
    return folder / "logs" / f"{namespace}_{pod}_{container}.log"


def _relevant(pod: JsonObject) -> tuple[Any, ...]:
    metadata = pod["metadata"]
    parts = ("labels", "annotations", "deletionTimestamp")
    return (*(metadata.get(part) for part in parts), pod["spec"])


def _closed_gates(pod: JsonObject) -> list[str]:
    """Readiness gates whose condition is not True."""
    conditions = pod.get("status", {}).get("conditions", [])
    open_gates = {condition["type"] for condition in conditions if condition["status"] == "True"}
    gates = [gate["conditionType"] for gate in pod["spec"].get("readinessGates", [])]
    return [gate for gate in gates if gate not in open_gates]


def _rewritten(files: volumes.Payload, rewrite: Callable[[str], str] | None) -> volumes.Payload:
    if rewrite is None:
        return files
    changed = dict(files)
    for path, file in files.items():
        with contextlib.suppress(UnicodeDecodeError):
            changed[path] = volumes.File(rewrite(file.content.decode()).encode(), file.mode)
    return changed


def _signal_group(process: asyncio.subprocess.Process, number: signal.Signals) -> None:
    # It leads a session of its own, so its pid names the group.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
