"""``python -m securevllm``, and the ``securevllm`` script."""

from __future__ import annotations

import sys


def main() -> None:
    """Run a command.

    What runs in users' pods starts without the rest: gate and canary have 64 MiB and must not pay for a client.
    """
    match sys.argv[1:]:
        case ["gate", *arguments] if not {"-h", "--help"} & {*arguments}:
            from securevllm.proof.gate import main as gate  # noqa: PLC0415 - see above

            sys.exit(gate(arguments))
        case ["canary", *arguments] if not {"-h", "--help"} & {*arguments}:
            from securevllm.proof.canary import main as canary  # noqa: PLC0415 - see above

            sys.exit(canary(arguments))
        case _:
            from securevllm.cli import main as cli  # noqa: PLC0415 - see above

            cli()


if __name__ == "__main__":
    main()
