"""``python -m securevllm``."""

from __future__ import annotations

from securevllm.cli import main

main()
