"""Where binaries and running clusters are kept.

Both follow the XDG base directory specification, so that nothing of this package lives in the checkout. The
environment is read at each call: tests point it somewhere else.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

APPLICATION = "secure-vllm-operator"


def cache_folder() -> Path:
    """Return the folder of things that can be made again (binaries), without creating it."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute() / APPLICATION


def clusters_folder() -> Path:
    """Return the folder with one folder for each started cluster, without creating it."""
    state = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state")
    return state.absolute() / APPLICATION / "clusters"


@contextmanager
def locked(path: Path, on_wait: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Hold an exclusive lock across processes; `path` exists while it is held.

    The lock ends with the process, however that ends. `on_wait` is called once when somebody else holds it.
    """
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    waited = False
    while True:
        with path.open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if not waited:
                    on_wait()
                waited = True
                fcntl.flock(file, fcntl.LOCK_EX)
            # The holder before removed the file: this is a lock on nothing, and somebody may hold the new one.
            if not _same_file(file.fileno(), path):
                continue
            try:
                yield
            finally:
                path.unlink()
            return


def _same_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
