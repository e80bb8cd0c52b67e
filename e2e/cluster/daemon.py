"""Background processes that outlive the process that started them, known by pid *and* start time.

A pid alone is no identity: it is reused. Each daemon leaves `<name>.pid` in its folder with the pid, the start time of
/proc/<pid>/stat, the boot and the pid namespace; a process that differs in any of these is somebody else's and is
never signalled. Signals go through a pidfd, so that nothing can happen between the check and the signal. Linux only.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path

# Children of this process, to be reaped by it; after a restart of the starter they belong to init.
_children: dict[int, subprocess.Popen[bytes]] = {}


@dataclass(frozen=True)
class ProcessIdentity:
    """One process of this machine, unmistakably.

    Attributes:
        pid: Process id.
        start_time: Clock ticks after boot (field 22 of /proc/<pid>/stat).
        realm: Boot id and pid namespace: where `pid` means anything.
    """

    pid: int
    start_time: int
    realm: str

    @classmethod
    def of(cls, pid: int) -> ProcessIdentity:
        """Identify a process that runs now.

        Raises:
            ProcessLookupError: There is none with this pid.
        """
        start_time = _start_time(pid)
        if start_time is None:
            raise ProcessLookupError(f"no process {pid}")
        return cls(pid=pid, start_time=start_time, realm=current_realm())

    @classmethod
    def from_json(cls, text: str) -> ProcessIdentity:
        """Read what `to_json` wrote."""
        fields = json.loads(text)
        return cls(pid=int(fields["pid"]), start_time=int(fields["start_time"]), realm=str(fields["realm"]))

    def to_json(self) -> str:
        """Write all fields as a JSON object."""
        return json.dumps(asdict(self))

    def alive(self) -> bool:
        """Tell whether exactly this process runs (a zombie does not)."""
        if child := _children.get(self.pid):
            child.poll()
        return self.realm == current_realm() and _start_time(self.pid) == self.start_time

    def stop(self, grace: float) -> None:
        """End the process: SIGTERM, and SIGKILL after `grace` seconds. Somebody else's process is left alone."""
        try:
            descriptor = os.pidfd_open(self.pid)
        except ProcessLookupError:
            return
        try:
            if not self.alive():
                return
            for number, seconds in ((signal.SIGTERM, grace), (signal.SIGKILL, 10.0)):
                signal.pidfd_send_signal(descriptor, number)
                if _ended_within(descriptor, seconds):
                    break
        except ProcessLookupError:
            pass
        finally:
            os.close(descriptor)
            if child := _children.pop(self.pid, None):
                child.wait()


def current_realm() -> str:
    """Return what pids of this process are relative to: the boot and the pid namespace."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return f"{boot} {Path('/proc/self/ns/pid').readlink()}"


def start(name: str, command: list[str], folder: Path) -> ProcessIdentity:
    """Start `command` in a session of its own, which Ctrl-C of the terminal does not reach, with `folder` as cwd.

    Output is appended to `<folder>/<name>.log`, the identity is kept in `<folder>/<name>.pid`.
    """
    with (folder / f"{name}.log").open("ab") as log:
        process = subprocess.Popen(
            command, cwd=folder, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
    _children[process.pid] = process
    return record(folder, name, process.pid)


def record(folder: Path, name: str, pid: int) -> ProcessIdentity:
    """Remember a process of this name, for `stop` and `stop_all`.

    Raises:
        ProcessLookupError: It has ended already.
    """
    identity = ProcessIdentity.of(pid)
    pid_file(folder, name).write_text(identity.to_json(), encoding="ascii")
    return identity


def recorded(folder: Path, name: str) -> ProcessIdentity | None:
    """Return the daemon that `start` recorded in this folder, whether or not it still runs."""
    try:
        return ProcessIdentity.from_json(pid_file(folder, name).read_text(encoding="ascii"))
    except (FileNotFoundError, ValueError, KeyError):
        return None


def stop(folder: Path, name: str, grace: float = 5.0) -> None:
    """Stop the recorded daemon, if it still is the same process, and forget it."""
    if identity := recorded(folder, name):
        identity.stop(grace)
    pid_file(folder, name).unlink(missing_ok=True)


def stop_all(folder: Path, grace: float = 0.5) -> None:
    """Stop everything that is recorded in a folder, which may not exist."""
    for path in folder.glob("*.pid"):
        stop(folder, path.name.removesuffix(".pid"), grace)


def pid_file(folder: Path, name: str) -> Path:
    """Return where the identity of a daemon is kept."""
    return folder / f"{name}.pid"


def log_tail(folder: Path, name: str, lines: int = 8) -> str:
    """Return the end of a daemon's log, for error messages."""
    path = folder / f"{name}.log"
    return "\n".join(path.read_text(errors="replace").splitlines()[-lines:]) if path.exists() else "(no log)"


def _start_time(pid: int) -> int | None:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The command name is in parentheses and may contain anything: fields are counted from the last parenthesis.
    fields = stat.rpartition(")")[2].split()
    state, start_time = fields[0], int(fields[19])
    return None if state in "ZX" else start_time


def _ended_within(descriptor: int, seconds: float) -> bool:
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(seconds * 1000))
