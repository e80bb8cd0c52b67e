"""``vllm``, as installed, but that its processes are forked.

On the CPU vLLM starts each of its processes anew, and each imports torch and vLLM again: two to three minutes on two
cores. A fork has them. Nothing else differs; what listens, and what it says, is the same.
"""

import multiprocessing
import os
import sys

os.environ.setdefault("OMP_NUM_THREADS", "1")  # threads do not survive a fork
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
# Tensor parallelism would compile a function with g++ at the first request, which an image does not have.
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")


def main() -> None:
    """Run vLLM's own command line."""
    from vllm.utils import system_utils  # noqa: PLC0415 - after the environment is set

    system_utils.get_mp_context = lambda: multiprocessing.get_context("fork")
    from vllm.entrypoints.cli.main import main as vllm  # noqa: PLC0415 - takes the line above along

    sys.argv[0] = "vllm"
    sys.exit(vllm())


if __name__ == "__main__":
    main()
