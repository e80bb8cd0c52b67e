"""The gate as a process, told things and watched."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from securevllm.proof.wire import GATE_VARIABLE, GateConfig, dump

ROOT = Path(__file__).parents[2]


class GateProcess:
    """``python -m securevllm gate`` in a process of its own; its log is kept."""

    def __init__(
        self, config: GateConfig, log: Path, environment: Mapping[str, str] | None = None, wrapper: Sequence[str] = ()
    ) -> None:
        self._log = log
        env = {
            "PYTHONPATH": str(ROOT / "operator"),
            "PATH": os.environ["PATH"],
            GATE_VARIABLE: dump(config),
            **(environment or {}),
        }
        self.began = time.monotonic()
        with log.open("ab") as out:
            self._process = subprocess.Popen(  # noqa: S603 - our own program
                [*wrapper, sys.executable, "-m", "securevllm", "gate"], env=env, stdout=out, stderr=out
            )

    @property
    def log(self) -> str:
        """What it has told."""
        return self._log.read_text(encoding="utf-8")

    def passed(self, seconds: float) -> float:
        """Wait until it lets the engine start; gives the seconds since its start."""
        assert self._process.wait(seconds) == 0, self.log
        return time.monotonic() - self.began

    def holds(self, seconds: float) -> None:
        """Watch it for a while: it does not end."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = self._process.wait(seconds)
            raise AssertionError(f"it ended with {code}:\n{self.log}")

    def says(self, text: str, seconds: float = 10.0) -> None:
        """Wait until its log has a text."""
        until = time.monotonic() + seconds
        while text not in self.log:
            assert time.monotonic() < until, self.log
            time.sleep(0.05)

    def send(self, number: signal.Signals) -> None:
        """Send a signal."""
        self._process.send_signal(number)

    def ended(self, seconds: float) -> int:
        """Wait until it ends; gives the exit code."""
        return self._process.wait(seconds)

    def end(self) -> int:
        """SIGTERM; gives the exit code."""
        self.send(signal.SIGTERM)
        return self.ended(10)

    def close(self) -> None:
        """End it whatever it does."""
        self._process.kill()
        self._process.wait()


@contextmanager
def gates() -> Iterator[list[GateProcess]]:
    """A list whose gates are ended with the block."""
    started: list[GateProcess] = []
    try:
        yield started
    finally:
        for gate in started:
            gate.close()
