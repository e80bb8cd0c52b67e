"""``python -m e2e.fake_vllm serve MODEL ...``."""

from e2e.fake_vllm.cli import main

main()
