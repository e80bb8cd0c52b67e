"""The one setting of this machine that nodes need changed, and its way back.

Every kubelet, containerd and agent holds inotify instances, and root's limit is the machine's, not a namespace's. The
value that was found is kept beside the clusters' folders; the last cluster with nodes puts it back.
"""

from __future__ import annotations

from pathlib import Path

from e2e.cluster.paths import clusters_folder

INOTIFY = Path("/proc/sys/fs/inotify/max_user_instances")
ENOUGH = 8192


def allow_many_inotify_instances() -> None:
    """Raise the limit if it is low, and remember what it was."""
    found = INOTIFY.read_text(encoding="ascii").strip()
    if int(found) < ENOUGH:
        _saved().write_text(found, encoding="ascii")
        INOTIFY.write_text(str(ENOUGH), encoding="ascii")


def restore() -> None:
    """Put the limit back, unless somebody else has changed it since."""
    if _saved().exists():
        if INOTIFY.read_text(encoding="ascii").strip() == str(ENOUGH):
            INOTIFY.write_text(_saved().read_text(encoding="ascii"), encoding="ascii")
        _saved().unlink()


def _saved() -> Path:
    return clusters_folder() / ".inotify-max-user-instances"
