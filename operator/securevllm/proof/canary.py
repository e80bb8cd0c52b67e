"""What a canary pod runs: a listener that is known to listen, and a prober in the resource's namespace.

Two containers, one program: ``securevllm canary listen`` accepts on the engines' ports until it is ended, so that
others can show that they reach *something* on this node; ``securevllm canary probe`` connects to the targets and
leaves what it saw as its termination message. Standard library only; no token.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import AsyncExitStack

from securevllm.proof.dial import Listener, accepting, dial
from securevllm.proof.gate import leave, termination_log
from securevllm.proof.wire import (
    BLOCKED,
    CANARY_VARIABLE,
    POD_IPS,
    CanaryConfig,
    Reach,
    Target,
    dump_answers,
    load_canary,
)

_DIAL_SECONDS = 1.5
_AT_ONCE = 32
_PAUSE = 0.5


async def listen(config: CanaryConfig, addresses: Sequence[str]) -> None:
    """Accept on all ports of all addresses, for ever.

    Raises:
        OSError: a port cannot be opened.
    """
    async with AsyncExitStack() as stack:
        for port in config.listen:
            await stack.enter_async_context(Listener([accepting(address, port) for address in addresses]))
        await asyncio.Event().wait()


async def probe(config: CanaryConfig) -> dict[str, Reach]:
    """Try every target; what does not answer is tried again once, because one lost packet looks like a policy."""
    slots = asyncio.Semaphore(_AT_ONCE)

    async def attempt(target: Target) -> Reach:
        async with slots:
            reach = await dial(target.address, target.port, _DIAL_SECONDS)
        if reach not in BLOCKED:
            return reach
        await asyncio.sleep(_PAUSE)
        async with slots:
            return await dial(target.address, target.port, _DIAL_SECONDS)

    reaches = await asyncio.gather(*map(attempt, config.targets))
    return {target.key: reach for target, reach in zip(config.targets, reaches, strict=True)}


def main(arguments: list[str]) -> int:
    """``securevllm canary listen|probe``, configuration in ``$SECUREVLLM_CANARY``.

    Returns:
        Exit code: 0 done, 1 a port cannot be opened or not all was tried in time, 2 wrong usage or configuration.
    """
    try:
        config = load_canary(os.environ.get(CANARY_VARIABLE, ""))
    except ValueError as error:
        return _failed(2, f"{error}: give it as JSON in ${CANARY_VARIABLE}")
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    if arguments == ["listen"]:
        try:
            asyncio.run(listen(config, os.environ.get(POD_IPS, "0.0.0.0").split(",")))  # noqa: S104 - without a pod
        except OSError as error:
            return _failed(1, f"cannot listen: {error}")
        return 0
    if arguments != ["probe"]:
        return _failed(2, "usage: securevllm canary listen|probe")
    try:
        answers = asyncio.run(asyncio.wait_for(probe(config), config.seconds))
    except TimeoutError:
        return _failed(1, f"not all targets were tried within {config.seconds:g} s")
    text = dump_answers(answers)
    sys.stdout.write(f"{text}\n")
    leave(termination_log(), text)
    return 0


def _failed(code: int, text: str) -> int:
    sys.stderr.write(f"securevllm canary: {text}\n")
    return code
