"""Shell commands of the documentation: each is executed by a test, or says why not."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]

SEQUENCES = (("install.md",), ("install.md", "upgrade.md"), ("getting-started.md",))
"""Pages of docs/ whose commands tests/api/test_docs_commands.py runs, in the order in which somebody would."""
EXECUTED = frozenset(ROOT / "docs" / page for pages in SEQUENCES for page in pages)

_BLOCK = re.compile(r"(?:<!-- not run: (?P<why>[^>]+) -->\n\n)?```sh\n(?P<text>.*?)```", re.DOTALL)


def blocks(page: Path) -> Iterator[str]:
    """The blocks of a page that are not marked as not executable here."""
    for found in _BLOCK.finditer(page.read_text(encoding="utf-8")):
        if not found["why"]:
            yield found["text"]
