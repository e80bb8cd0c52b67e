"""``python -m securevllm`` on a machine whose wall clock is wrong: ``skewed.py FILE ARGUMENT ...``.

FILE holds how wrong, in seconds, and is read at every look at the clock, so that a test can let it jump while the
operator runs. No time namespace has a wall clock of its own, and the operator has no option for it. Clocks that count
since the start of the machine stay right; a process that is stopped for a while sees those jump, too.
"""

from __future__ import annotations

import sys
import time
from datetime import datetime, timedelta, tzinfo
from pathlib import Path

import securevllm.operator  # noqa: F401 - with every module that looks at a clock
from securevllm.__main__ import main

_right_time = time.time
_file = Path(sys.argv.pop(1))


def _wrong() -> float:
    return float(_file.read_text(encoding="ascii"))


class _Skewed(datetime):
    @classmethod
    def now(cls, tz: tzinfo | None = None) -> datetime:  # type: ignore[override]
        # A plain one: libraries compare types.
        return datetime.now(tz) + timedelta(seconds=_wrong())


for name, module in [*sys.modules.items()]:
    if name.startswith("securevllm.") and getattr(module, "datetime", None) is datetime:
        module.datetime = _Skewed  # type: ignore[attr-defined]
time.time = lambda: _right_time() + _wrong()
main()
