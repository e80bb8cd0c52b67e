"""`python -m e2e.cluster`: start, look at and stop clusters by hand."""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import sys
import time
from pathlib import Path

from e2e.cluster import lifecycle, nodes
from e2e.cluster.binaries import (
    ARGO_CD,
    ARGO_CD_PROGRAMS,
    CONTROL_PLANE,
    DEFINED_ELSEWHERE,
    binaries_folder,
    build,
    find_or_build,
    unpack,
)
from e2e.cluster.errors import ClusterError
from e2e.cluster.paths import cache_folder

DEFAULT_NAME = "default"


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return the exit code: 0 done, 1 not possible (the reason is on stderr), 2 wrong usage."""
    parser = argparse.ArgumentParser(prog="python -m e2e.cluster", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for command, run, description in (
        ("up", _up, "start a cluster that stays until `down`, and say how to use it"),
        ("down", _down, "stop a cluster: exactly the processes that `up` started"),
        ("env", _env, 'print shell exports: eval "$(python -m e2e.cluster env)"'),
        ("status", _status, "list the clusters of this machine and user, with their nodes"),
        ("load-image", _load_image, "import docker-archive files (docker save, buildah push) into every node"),
        ("build", _build, "build the programs of the control plane now (4 to 10 minutes with empty Go caches, once)"),
        ("deps", _dependencies, "build, install and pack all that nodes need, now (about 25 minutes, once)"),
        ("argocd", _argo_cd, "build Argo CD for its test, now (up to an hour with empty Go caches, once)"),
    ):
        subparser = commands.add_parser(command, help=description, description=description)
        subparser.set_defaults(run=run)
        if run in {_up, _down, _env, _load_image}:
            subparser.add_argument("--name", default=DEFAULT_NAME, help="of the cluster (default: %(default)s)")
        if run is _up:
            subparser.add_argument(
                "--nodes",
                type=int,
                default=0,
                choices=range(9),
                metavar="N",
                help="real nodes (Linux, root), up to 8; none by default: an API server alone",
            )
            subparser.add_argument(
                "--cni",
                default="cilium",
                choices=("cilium", "bridge"),
                help="network plugin: cilium enforces NetworkPolicies, bridge does not (default: %(default)s)",
            )
        if run in {_build, _dependencies, _argo_cd}:
            subparser.add_argument(
                "--background", action="store_true", help="let everything else on the machine go first"
            )
        if run is _load_image:
            subparser.add_argument("file", nargs="+", type=Path)
    options = parser.parse_args(arguments)
    try:
        # Also a build has processes of its own to end.
        with lifecycle.signals_raise():
            options.run(options)
    except ClusterError as error:
        _say(f"error: {error}")
        return 1
    except KeyboardInterrupt:
        _say("interrupted: nothing was left running")
        return 130
    return 0


def _up(options: argparse.Namespace) -> None:
    cluster = lifecycle.load(options.name) or lifecycle.start(
        options.name, owner=None, progress=_say, node_count=options.nodes, cni=options.cni
    )
    print(f"cluster {cluster.name}: Kubernetes {cluster.version} ({cluster.provider}) at {cluster.server}")
    print(f"  kubectl --kubeconfig {cluster.kubeconfig} get namespaces")
    print(f'  eval "$(python -m e2e.cluster env --name {cluster.name})"    for this shell, tests included')
    print(f"  logs and audit log: {cluster.folder}")
    if cluster.nodes:
        print(f"  a shell in a node: {' '.join(cluster.nodes[0].command('sh'))}")
    print(f"  python -m e2e.cluster down --name {cluster.name}")


def _down(options: argparse.Namespace) -> None:
    existed = lifecycle.stop(options.name)
    print(f"cluster {options.name}: {'stopped' if existed else 'there is none'}")


def _env(options: argparse.Namespace) -> None:
    path = shlex.quote(str(_running(options.name).kubeconfig))
    # No comments behind them: zsh does not take any in `eval`.
    print(f"export KUBECONFIG={path}\nexport SVLLM_KUBECONFIG={path}")


def _status(_options: argparse.Namespace) -> None:
    for name in lifecycle.names():
        cluster = lifecycle.load(name)
        print(f"{name}: {f'{cluster.provider} {cluster.version} {cluster.server}' if cluster else 'not running'}")
        for node in cluster.nodes if cluster else ():
            print(f"  {node.name} {node.ip} {node.cni} {node.folder}")


def _load_image(options: argparse.Namespace) -> None:
    cluster = _running(options.name)
    for file in options.file:
        cluster.load_archive(file)
        print(f"{file}: imported into {cluster.name}")


def _build(options: argparse.Namespace) -> None:
    if _nothing_to_build():
        return
    if options.background:
        _step_back()
    build(CONTROL_PLANE, _say)
    _unpack_definitions()
    print(f"built: {binaries_folder()}")


def _dependencies(options: argparse.Namespace) -> None:
    if _nothing_to_build():
        return
    if options.background:
        _step_back()
    began = time.monotonic()
    nodes.check_machine()
    find_or_build(_say)
    nodes.prepare("cilium", _say)
    _unpack_definitions()
    print(f"all that nodes need is in {cache_folder()} ({time.monotonic() - began:.0f} s)")


def _argo_cd(options: argparse.Namespace) -> None:
    if options.background:
        _step_back()
    build(ARGO_CD_PROGRAMS, _say)
    print(f"built: {ARGO_CD.folder}")


def _unpack_definitions() -> None:
    """Have what tests look for beside the programs, as far as it can be had: without it a few are skipped."""
    for component in DEFINED_ELSEWHERE:
        try:
            unpack(component, _say)
        except ClusterError as error:
            _say(f"no definitions of {component.title}: {error}")


def _nothing_to_build() -> bool:
    provider = lifecycle.choose_provider()
    if provider == "local":
        return False
    print(f"nothing to build: {provider} provides the cluster")
    return True


def _step_back() -> None:
    os.nice(10)
    # Linux weighs sessions before processes (sched(7), autogroup): in a session of its own, nice alone changes nothing.
    with contextlib.suppress(OSError):
        os.setsid()
    with contextlib.suppress(OSError):
        Path("/proc/self/autogroup").write_text("10", encoding="ascii")


def _running(name: str) -> lifecycle.Cluster:
    cluster = lifecycle.load(name)
    if cluster is None:
        raise ClusterError(f"cluster {name} does not run: python -m e2e.cluster up --name {name}")
    return cluster


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
