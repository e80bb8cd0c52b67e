"""`python -m e2e.cluster`: start, look at and stop clusters by hand."""

from __future__ import annotations

import argparse
import shlex
import sys

from e2e.cluster import lifecycle
from e2e.cluster.binaries import KUBE_APISERVER, KUBE_CONTROLLER_MANAGER, binaries_folder, build
from e2e.cluster.errors import ClusterError

DEFAULT_NAME = "default"


def main(arguments: list[str]) -> int:
    """Run one command and return the exit code: 0 done, 1 not possible (the reason is on stderr), 2 wrong usage."""
    parser = argparse.ArgumentParser(prog="python -m e2e.cluster", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for command, run, description in (
        ("up", _up, "start a cluster that stays until `down`, and say how to use it"),
        ("down", _down, "stop a cluster: exactly the processes that `up` started"),
        ("env", _env, 'print shell exports: eval "$(python -m e2e.cluster env)"'),
        ("status", _status, "list the clusters of this machine and user"),
        ("build", _build, "build the programs now (4 to 10 minutes with empty Go caches, once)"),
    ):
        subparser = commands.add_parser(command, help=description)
        subparser.set_defaults(run=run)
        if run in {_up, _down, _env}:
            subparser.add_argument("--name", default=DEFAULT_NAME)
    options = parser.parse_args(arguments)
    try:
        options.run(options)
    except ClusterError as error:
        _say(f"error: {error}")
        return 1
    except KeyboardInterrupt:
        _say("interrupted: nothing was left running")
        return 130
    return 0


def _up(options: argparse.Namespace) -> None:
    cluster = lifecycle.load(options.name) or lifecycle.start(options.name, owner=None, progress=_say)
    print(f"cluster {cluster.name}: Kubernetes {cluster.version} ({cluster.provider}) at {cluster.server}")
    print(f"  kubectl --kubeconfig {cluster.kubeconfig} get namespaces")
    print(f'  eval "$(python -m e2e.cluster env --name {cluster.name})"    for this shell, tests included')
    print(f"  logs and audit log: {cluster.folder}")
    print(f"  python -m e2e.cluster down --name {cluster.name}")


def _down(options: argparse.Namespace) -> None:
    existed = lifecycle.stop(options.name)
    print(f"cluster {options.name}: {'stopped' if existed else 'there is none'}")


def _env(options: argparse.Namespace) -> None:
    cluster = lifecycle.load(options.name)
    if cluster is None:
        raise ClusterError(f"cluster {options.name} does not run: python -m e2e.cluster up --name {options.name}")
    path = shlex.quote(str(cluster.kubeconfig))
    # No comments behind them: zsh does not take any in `eval`.
    print(f"export KUBECONFIG={path}\nexport SVLLM_KUBECONFIG={path}")


def _status(_options: argparse.Namespace) -> None:
    for name in lifecycle.names():
        cluster = lifecycle.load(name)
        print(f"{name}: {f'{cluster.provider} {cluster.version} {cluster.server}' if cluster else 'not running'}")


def _build(_options: argparse.Namespace) -> None:
    build([KUBE_APISERVER, KUBE_CONTROLLER_MANAGER], _say)
    print(f"built: {binaries_folder()}")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
