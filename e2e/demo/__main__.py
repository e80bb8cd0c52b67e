"""`python -m e2e.demo [--on nodes|hollow] [--keep]`: run the demo; exit code 1 with a reason when it cannot."""

from __future__ import annotations

import argparse
import signal
import sys
from contextlib import ExitStack

from e2e import demo
from e2e.cluster import ClusterError, lifecycle, nodes
from e2e.demo import hollow, on_nodes
from e2e.demo.tell import DemoError, Teller

NODES, HOLLOW = "nodes", "hollow"


def main(arguments: list[str] | None = None) -> int:
    """Run the demo and return the exit code: 0 it went as told, 1 it did not, 2 wrong usage, 130 interrupted."""
    parser = argparse.ArgumentParser(prog="make demo", description=demo.__doc__)
    parser.add_argument("--keep", action="store_true", help="stay up at the end, until Ctrl-C")
    parser.add_argument(
        "--on", choices=(NODES, HOLLOW), help="what runs the pods (default: nodes where they can start at once)"
    )
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    tell = Teller()
    try:
        where, why = (options.on, "") if options.on else stage()
        if why:
            tell.plain(why)
        with ExitStack() as stack:
            (on_nodes if where == NODES else hollow).show(stack, tell, keep=options.keep)
            if options.keep:
                _stay()
            tell.step("Cleaning up")
    except (DemoError, ClusterError) as error:
        print(f"\nThe demo stopped: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nInterrupted; everything that was started has been ended.", file=sys.stderr)
        return 130
    tell.line("everything that was started has been ended")
    return 0


def stage() -> tuple[str, str]:
    """Choose what runs the pods; and say what would have to be done for real nodes, where that is in anybody's hands.

    Raises:
        ClusterError: See `lifecycle.choose_provider`.
    """
    if lifecycle.choose_provider() != "local":
        return HOLLOW, ""
    if nodes.at_once():
        return NODES, ""
    return HOLLOW, (
        "Without real nodes, so nothing enforces the policies. On Linux, `sudo make e2e-deps` (about 25 minutes, once)"
        " lets `sudo make demo` run on two real nodes, with an attacker."
    )


def _stay() -> None:
    try:
        signal.pause()
    except KeyboardInterrupt:
        print()


if __name__ == "__main__":
    sys.exit(main())
