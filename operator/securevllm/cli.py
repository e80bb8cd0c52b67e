"""The command line. Exit codes: 0 done, 1 it failed, 2 wrong usage or wrong input.

Imports of the edges are inside the commands: ``securevllm render`` in a pipeline must not pay for a client and a
watcher that it does not use.
"""

from __future__ import annotations

import ipaddress
import json
import os
import re
import socket
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

import click
import yaml

from securevllm import __version__, catalogue
from securevllm.errors import OperatorError, Problem, SpecError

_OUTPUT = click.option(
    "-o", "--output", type=click.Choice(["yaml", "json"]), default="yaml", show_default=True, help="Output format."
)
_WRONG_INPUT = 2
_DNS_LABEL = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_NO_LABEL = "lower-case letters, digits and '-', a letter or digit at both ends, at most 63 characters"
_NO_UID = "00000000-0000-0000-0000-000000000000"
_UID = re.compile(r"[A-Za-z0-9]([A-Za-z0-9-]{0,126}[A-Za-z0-9])?")
_IMAGE = re.compile(r"[\[A-Za-z0-9]\S{0,511}")
_PORT = click.IntRange(1, 65535)
_LABEL = re.compile(r"([a-z0-9.-]+/)?[A-Za-z0-9._-]+=[A-Za-z0-9._-]*")


def _label(_context: Any, _option: Any, value: str | None) -> str | None:
    if value is not None and _DNS_LABEL.fullmatch(value) is None:
        raise click.BadParameter(f"{value!r} is no name of a namespace or Service: {_NO_LABEL}")
    return value


def _labels(context: Any, option: Any, values: tuple[str, ...]) -> tuple[str, ...]:
    for value in values:
        _label(context, option, value)
    return values


def _domain(_context: Any, _option: Any, value: str) -> str:
    if not all(map(_DNS_LABEL.fullmatch, value.split("."))):
        raise click.BadParameter(f"{value!r} is no domain such as cluster.local")
    return value


_KUBECONFIG = click.option(
    "--kubeconfig",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="How to log in to the cluster.  [default: $KUBECONFIG, then ~/.kube/config; in a pod its service account]",
)
"""Of a person's commands; `run` never reads the variable."""

_NAMESPACE = click.option(
    "-n",
    "--namespace",
    default="default",
    show_default=True,
    callback=_label,
    help="For resources that name none.",
)


def _uid(_context: Any, _option: Any, value: str) -> str:
    if _UID.fullmatch(value) is None:
        raise click.BadParameter(f"{value!r} is no UID such as {_NO_UID}")
    return value


def _image(_context: Any, _option: Any, value: str | None) -> str | None:
    # An empty variable never gets here: click takes it for one that is not set, which is the default.
    if value is not None and _IMAGE.fullmatch(value) is None:
        raise click.BadParameter(f"{value!r} is no image such as registry.example.com/team/name:tag")
    return value


def _context_options(command: Any) -> Any:
    """What rendering has to know of the cluster: the same words for `run` and for `render`."""
    options = (
        click.option(
            "--operator-namespace",
            envvar="POD_NAMESPACE",
            default="secure-vllm-operator",
            show_default=True,
            callback=_label,
            help="Where the operator itself runs: its pods may ask the gateways what they serve.",
        ),
        click.option(
            "--cluster-domain",
            default="cluster.local",
            show_default=True,
            callback=_domain,
            help="Suffix of service names.",
        ),
        click.option(
            "--cluster-range", multiple=True, help="Pod, service or node range, carved out of every egress; repeatable."
        ),
        click.option(
            "--dns-namespace",
            default="kube-system",
            show_default=True,
            callback=_label,
            help="Where the DNS servers run.",
        ),
        click.option(
            "--dns-pods",
            default="k8s-app=kube-dns",
            show_default=True,
            help="Label of their pods (OpenShift: dns.operator.openshift.io/daemonset-dns=default).",
        ),
        click.option(
            "--dns-cidr",
            multiple=True,
            help="Address of DNS servers that are no pods (NodeLocal DNSCache: 169.254.20.10/32); repeatable.",
        ),
        click.option(
            "--dns-port",
            default=53,
            show_default=True,
            type=_PORT,
            help="Port on which they listen, after DNAT (OpenShift: 5353).",
        ),
        click.option(
            "--gateway-image",
            envvar="SECUREVLLM_GATEWAY_IMAGE",
            callback=_image,
            help="Envoy image of the gateways.",
        ),
        click.option(
            "--operator-image",
            envvar="SECUREVLLM_OPERATOR_IMAGE",
            callback=_image,
            help="The operator's own image; gates and canary pods run it.",
        ),
        click.option(
            "--canary-service",
            default="secure-vllm-operator-canary",
            show_default=True,
            callback=_label,
            help="Headless Service of the operator's canary listener, in its namespace.",
        ),
        click.option(
            "--canary-port",
            default=9094,
            show_default=True,
            type=_PORT,
            help="Port of the operator's canary listener: engines must not reach it.",
        ),
        click.option(
            "--pod-ips",
            envvar="POD_IPS",
            default="",
            help="Addresses of the operator's own pod (status.podIPs). With an IPv6 one among them, gateways listen on"
            " both families.",
        ),
    )
    for option in reversed(options):
        command = option(command)
    return command


_BOUNDS = click.option(
    "--bounds",
    "bounds_file",
    envvar="SECUREVLLM_BOUNDS",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="What the platform lets any resource ask for (YAML; docs/guard.md). Default: safe for any platform.",
)


def _bounds(path: Path | None) -> Any:
    from securevllm.api.bounds import PlatformBounds  # noqa: PLC0415 - see the module's docstring
    from securevllm.settings import read_bounds  # noqa: PLC0415 - see the module's docstring

    if path is None:
        return PlatformBounds()
    try:
        return read_bounds(path)
    except SpecError as error:
        _wrong(f"{path}: {error}")
    except OperatorError as error:
        _wrong(str(error))


def _context(
    *,
    operator_namespace: str,
    cluster_domain: str,
    cluster_range: tuple[str, ...],
    dns_namespace: str,
    dns_pods: str,
    dns_cidr: tuple[str, ...],
    dns_port: int,
    gateway_image: str | None,
    operator_image: str | None,
    canary_service: str,
    canary_port: int,
    pod_ips: str,
) -> Any:
    from securevllm.context import CidrPeer, Context, PodPeer, Selector, namespace  # noqa: PLC0415 - see above

    if _LABEL.fullmatch(dns_pods) is None:
        _wrong(f"--dns-pods {dns_pods!r} is not a label such as k8s-app=kube-dns")
    for cidr in (*cluster_range, *dns_cidr):
        try:
            ipaddress.ip_network(cidr)
        except ValueError as error:
            _wrong(f"{error}: write a network such as 10.96.0.0/12")
    key, _, value = dns_pods.partition("=")
    default = Context()
    return Context(
        operator=PodPeer(namespaces=namespace(operator_namespace), pods=default.operator.pods),
        cluster_domain=cluster_domain,
        dns=(
            PodPeer(namespaces=namespace(dns_namespace), pods=Selector(labels=((key, value),))),
            *(CidrPeer(cidr) for cidr in dns_cidr),
        ),
        dns_port=dns_port,
        cluster_ranges=cluster_range,
        gateway_image=gateway_image or default.gateway_image,
        operator_image=operator_image or default.operator_image,
        canary_service=(operator_namespace, canary_service),
        canary_port=canary_port,
        ipv6=_ipv6(pod_ips),
    )


def _ipv6(pod_ips: str) -> bool:
    versions = set()
    for address in filter(None, pod_ips.split(",")):
        try:
            versions.add(ipaddress.ip_address(address).version)
        except ValueError as error:
            _wrong(f"--pod-ips: {error}: write addresses such as 10.0.0.7,fd00::7")
    return 6 in versions  # noqa: PLR2004


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
def main() -> None:
    """Run vLLM on Kubernetes behind an exact route allowlist and isolated networks.

    \b
    A first look, without a cluster:
        securevllm render -f manifests/samples/quickstart.yaml
    What a deployment that you already have exposes:
        securevllm check -f vllm.yaml
    In a cluster the operator is installed with:
        kubectl apply --server-side -k manifests/install
    """  # noqa: D301 - click wants the character


@main.command(short_help="Print the versions of operator and catalogue.")
def version() -> None:
    """Print the versions of the operator and of the vLLM that its catalogue describes."""
    known = f"vLLM {catalogue.oldest()} to {catalogue.newest()}; accepted without a risk from {catalogue.floor()}"
    click.echo(f"secure-vllm-operator {__version__} (catalogue: {known})")


def _catalogued(text: str | None) -> catalogue.Version | None:
    """The vLLM version that was asked for; None: none was."""
    if text is None:
        return None
    try:
        version = catalogue.Version.parse(text)
    except ValueError as error:
        _wrong(str(error))
    nearest = catalogue.newest() if catalogue.too_new(version) else max(version, catalogue.oldest())
    if nearest != version:
        known = f"vLLM {catalogue.oldest()} to {catalogue.newest()}"
        _wrong(f"the catalogue knows {known}, not {version}: write --version {nearest}, or leave it out")
    return version


@main.command(add_help_option=True, short_help="Wait in an engine's pod until its isolation is seen.")
@click.argument("configuration", required=False)
def gate(configuration: str | None) -> None:
    """Wait, in an engine's pod, until its isolation is seen; the last init container runs it.

    \b
    CONFIGURATION is JSON, otherwise read from $SECUREVLLM_GATE:
        dns        a name that always resolves: the positive control
        forbidden  what is known to listen and must not be reachable: name, host, port
        barrier    the pods of a group: port, rank, members, world
    It never gives up: what it waits for is in its log (kubectl logs POD -c gate).
    Exit codes: 0 the engine may start, 1 the barrier's port is taken, 2 wrong configuration.
    """  # noqa: D301 - click wants the character
    from securevllm.proof import gate as program  # noqa: PLC0415 - see the module's docstring

    sys.exit(program.main([configuration] if configuration else []))


@main.command()
@_OUTPUT
def crd(output: str) -> None:
    """Print the CustomResourceDefinition, as crds/ holds it."""
    from securevllm.api.crd import crd as definition  # noqa: PLC0415 - see the module's docstring

    _print([definition()], output)


@main.command(short_help="Print every route of vLLM and what the gateway does with it.")
@click.option("--version", "text", default=None, help="vLLM version.  [default: the newest that is catalogued]")
@click.option("--profile", type=click.Choice(catalogue.profiles()), help="Only the routes of this gateway profile.")
@click.option(
    "-o", "--output", type=click.Choice(["table", "json", "md"]), default="table", show_default=True, help="Format."
)
def routes(text: str | None, profile: str | None, output: str) -> None:
    """Print every route of vLLM: its class, whether vLLM itself asks for a key, and what the gateway does with it.

    \b
        securevllm routes --profile chat
        securevllm routes --version 0.33.0 -o json | jq 'select(.vllmKey == false)'
    """  # noqa: D301 - click wants the character
    version = _catalogued(text) or catalogue.newest()
    known = [route for route in catalogue.routes_of(version).values() if profile is None or profile in route.profiles]
    rows = [
        {
            "method": route.method,
            "path": route.path,
            "class": route.category,
            "vllmKey": route.key,
            "gateway": "never" if route.never else ", ".join(route.profiles) or "routes.allow",
            "when": route.when or "always",
        }
        for route in known
    ]
    if output == "json":
        for row in rows:
            click.echo(json.dumps(row))
        return
    told = [[str(value) for value in (row | {"vllmKey": "yes" if row["vllmKey"] else "no"}).values()] for row in rows]
    _table(["METHOD", "PATH", "CLASS", "VLLM KEY", "GATEWAY", "WHEN"], told, output)


def _table(head: list[str], rows: list[list[str]], output: str) -> None:
    if output == "md":
        for line in (head, ["---"] * len(head), *rows):
            click.echo(f"| {' | '.join(line)} |")
        return
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    for line in (head, *rows):
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


@main.command(short_help="Print what engine arguments and variables may be set.")
@click.option("--version", "text", default=None, help="Only what this vLLM version has.  [default: all versions]")
@click.option("--where", type=click.Choice(["args", "env"]), help="Only one of the two.")
@click.option(
    "-o", "--output", type=click.Choice(["table", "json", "md"]), default="table", show_default=True, help="Format."
)
def guard(text: str | None, where: str | None, output: str) -> None:
    """Print what spec.engine.args and spec.engine.env may set, with which values, and which risk that needs.

    \b
        securevllm guard --version 0.33.0
        securevllm guard -o json | jq 'select(.needs != "")'
    """  # noqa: D301 - click wants the character
    from securevllm.api.guard import listing  # noqa: PLC0415 - see the module's docstring

    rows = [asdict(row) for row in listing.rows(_catalogued(text)) if where in {None, row.where}]
    if output == "json":
        for row in rows:
            click.echo(json.dumps(row))
        return
    _table(["WHERE", "NAME", "VALUE", "NEEDS", "VERSIONS"], [list(row.values()) for row in rows], output)


@main.command(short_help="Print every object that the operator would apply.")
@click.option("-f", "--filename", type=click.File("r"), required=True, help="Manifest with resources; - is stdin.")
@_NAMESPACE
@click.option(
    "--uid",
    default=_NO_UID,
    show_default=True,
    callback=_uid,
    help="UID of the resource: part of the pods' labels.",
)
@_BOUNDS
@_context_options
@_OUTPUT
def render(filename: TextIO, namespace: str, uid: str, output: str, bounds_file: Path | None, **cluster: Any) -> None:
    """Print every object that the operator would apply, without a cluster.

    \b
    Secrets with generated content are printed without it. The model counts as downloaded.
        securevllm render -f manifests/samples/quickstart.yaml
        cat my.yaml | securevllm render -f - -o json | jq .kind
    """  # noqa: D301 - click wants the character
    context = _context(**cluster)
    judged, failed = _judged(filename, namespace, uid, _bounds(bounds_file), context)
    printed: list[dict[str, Any]] = []
    for owner, accepted, metadata in judged:
        printed += _rendered(owner, accepted, metadata, context)
    _print(printed, output)
    if failed:
        sys.exit(_WRONG_INPUT)


@main.command(short_help="Print who may talk to whom and why.")
@click.option("-f", "--filename", type=click.File("r"), required=True, help="Manifest with resources; - is stdin.")
@_NAMESPACE
@_BOUNDS
@_context_options
@click.option(
    "-o",
    "--output",
    type=click.Choice(["text", "mermaid", "html", "json"]),
    default="text",
    show_default=True,
    help="Format.",
)
def explain(filename: TextIO, namespace: str, output: str, bounds_file: Path | None, **cluster: Any) -> None:
    """Print who may talk to whom and why, which routes pass the gateway, and what no policy sees; without a cluster.

    \b
        securevllm explain -f manifests/samples/quickstart.yaml
        securevllm explain -f my.yaml -o html > my.html
    """  # noqa: D301 - click wants the character
    from securevllm import explain as forms  # noqa: PLC0415 - see the module's docstring

    context = _context(**cluster)
    judged, failed = _judged(filename, namespace, _NO_UID, _bounds(bounds_file), context)
    views = [forms.view(owner, accepted, context) for owner, accepted, _ in judged]
    if output == "json":
        for view in views:
            click.echo(forms.as_json(view))
    elif output == "text":
        click.echo("\n".join(map(forms.text, views)), nl=False)
    elif views:
        click.echo(forms.mermaid(*views) if output == "mermaid" else forms.html(*views), nl=False)
    if failed:
        sys.exit(_WRONG_INPUT)


@main.command(short_help="Tell what vLLM workloads expose, and to whom.")
@click.option(
    "-f",
    "--filename",
    "paths",
    multiple=True,
    type=click.Path(exists=True, allow_dash=True, path_type=Path),
    help="YAML or JSON file, folder of such files, or - for stdin; repeatable.",
)
@click.option(
    "-n",
    "--namespace",
    callback=_label,
    help="With -f: for objects that name none. Without: the live namespace to read.",
)
@_KUBECONFIG
@click.option("--suggest", "suggested", is_flag=True, help="Print a SecureVLLMDeployment for each workload instead.")
@click.option(
    "--fail-on",
    type=click.Choice(["critical", "high", "medium", "low", "never"]),
    default="high",
    show_default=True,
    help="Exit with 1 when a finding is at least so severe.",
)
@_BOUNDS
@_context_options
@click.option(
    "-o",
    "--output",
    type=click.Choice(["text", "json"]),
    default="text",
    show_default=True,
    help="Format of the report.",
)
def check(  # noqa: PLR0917 - click gives one argument per option
    paths: tuple[Path, ...],
    namespace: str | None,
    kubeconfig: Path | None,
    suggested: bool,
    fail_on: str,
    output: str,
    bounds_file: Path | None,
    **cluster: Any,
) -> None:
    """Tell what vLLM workloads expose: routes without a key, sockets and who reaches them, flags, published holes.

    \b
    Reads SecureVLLMDeployments and ordinary Deployments, StatefulSets, DaemonSets, ReplicaSets, Jobs, CronJobs, Pods
    and LeaderWorkerSets, with the NetworkPolicies, Services, Ingresses and HTTPRoutes beside them.
        securevllm check -f vllm.yaml
        helm template my-release some/chart | securevllm check -f - -o json | jq .worst
        securevllm check -f vllm.yaml --suggest > mine.yaml
        securevllm check --namespace llm --kubeconfig ~/.kube/config
    Exit codes: 0 nothing so severe as --fail-on, 1 something is, 2 a part of the input could not be read or is a
    resource that the operator would refuse; everything else is told all the same.
    """  # noqa: D301 - click wants the character
    from securevllm import check as core  # noqa: PLC0415 - see the module's docstring

    if not paths and namespace is None:
        _wrong("check needs -f FILE, or --namespace NAME to read a live one")
    context = _context(**cluster)
    if paths:
        given: Any = (item for name, content in _contents(paths, core.MAX_BYTES) for item in core.read(name, content))
    else:
        given = _live(str(namespace), kubeconfig)
    report = core.examine(given, namespace or "default", context, _bounds(bounds_file), live=not paths)
    for problem in report.wrong:
        click.echo(f"securevllm: {core.line(str(problem))}", err=True)
    if suggested:
        _print_suggestions(core.suggestions(report))
    elif output == "json":
        click.echo(core.as_json(report))
    else:
        click.echo(core.text(report), nl=False)
    if report.wrong:
        sys.exit(_WRONG_INPUT)
    threshold = core.Severity[fail_on.upper()]
    sys.exit(int(any(finding.severity >= threshold for finding in report.every())))


def _contents(paths: tuple[Path, ...], limit: int) -> Iterator[tuple[str, str]]:
    """Name and text of every file, cut off behind the limit; a byte that is no UTF-8 becomes a mark."""
    for path in paths:
        if str(path) == "-":
            yield "<stdin>", sys.stdin.buffer.read(limit + 1).decode("utf-8", errors="replace")
            continue
        files = sorted(item for item in path.rglob("*") if item.suffix in _SUFFIXES) if path.is_dir() else [path]
        if not files:
            yield str(path), ""
        for file in files:
            with file.open("rb") as stream:
                yield str(file), stream.read(limit + 1).decode("utf-8", errors="replace")


_SUFFIXES = frozenset({".yaml", ".yml", ".json"})


def _live(namespace: str, kubeconfig: Path | None) -> list[Any]:
    from securevllm.live import snapshot  # noqa: PLC0415 - see the module's docstring

    try:
        return list(snapshot(namespace, kubeconfig))
    except OperatorError as error:
        click.echo(f"securevllm: {error}", err=True)
        sys.exit(_WRONG_INPUT)


def _print_suggestions(found: Iterator[Any]) -> None:
    for workload, suggestion in found:
        if suggestion is None:
            click.echo(f"securevllm: {workload.key}: no SecureVLLMDeployment can be made of it", err=True)
            continue
        click.echo(f"---\n# For {workload.key} ({workload.source}).")
        for note in suggestion.notes:
            click.echo(f"# Not carried over: {_one_line(note)}")
        _print([suggestion.object], "yaml")


def _one_line(words: str) -> str:
    return "".join(char if char.isprintable() else " " for char in words)


@main.command(short_help="Measure from here what of a resource can be reached.")
@click.argument("names", metavar="[NAME]...", nargs=-1)
@click.option("-n", "--namespace", default="default", show_default=True, callback=_label, help="Of the resources.")
@click.option("-A", "--all-namespaces", is_flag=True, help="All resources of the cluster.")
@click.option("--all", "every", is_flag=True, help="All resources of the namespace.")
@click.option("--status", is_flag=True, help="Show what the operator measured; makes no pods, and needs no right to.")
@click.option(
    "--from",
    "vantages",
    multiple=True,
    metavar="NAMESPACE",
    callback=_labels,
    help="Also try from a canary pod of this namespace; repeatable.",
)
@click.option(
    "--wait",
    default=0,
    type=click.IntRange(0, 86400),
    metavar="SECONDS",
    help="Wait so long for a Ready engine; with --status, for a verdict of the operator.",
)
@click.option(
    "--image",
    envvar="SECUREVLLM_OPERATOR_IMAGE",
    callback=_image,
    help="Of the canary pods.  [default: what the engines' gates run]",
)
@_KUBECONFIG
@click.option("--context", help="Context of the kubeconfig.  [default: its current one]")
@click.option(
    "-o", "--output", type=click.Choice(["table", "json"]), default="table", show_default=True, help="Format."
)
def probe(  # noqa: PLR0917 - click gives one argument per option
    names: tuple[str, ...],
    namespace: str,
    all_namespaces: bool,
    every: bool,
    status: bool,
    vantages: tuple[str, ...],
    wait: int,
    image: str | None,
    kubeconfig: Path | None,
    context: str | None,
    output: str,
) -> None:
    """Measure from here whether the engines of a resource can be reached past its gateway.

    \b
        securevllm probe llama -n llm
        securevllm probe llama -n llm --from default --from team-b
        securevllm probe --all-namespaces --status -o json | jq 'select(.isolated != "True")'
    It starts short-lived pods, as the operator itself does: a listener on every node of the engines, and pods that try,
    in the resource's namespace and in those of --from. This machine tries too, where it is on the pod network. Every
    named port of every Ready engine and router is connected to; nothing is sent. What does not answer counts as blocked
    only when a listener on the same node and port did. The pods are removed at the end, also on Ctrl-C.
    \b
    Rights: get the resource; create, list and delete pods in its namespace and in those of --from; get ConfigMaps where
    the operator refuses the spec or has not looked at it: what was accepted before is in one.
    Exit codes: 0 all isolated, 1 something can be reached, 2 could not be measured, or not all of it, or wrong usage.
    """  # noqa: D301 - click wants the character
    from securevllm import probe as edge  # noqa: PLC0415 - see the module's docstring
    from securevllm.live import user_login  # noqa: PLC0415 - see the module's docstring

    ways = {"names of resources": bool(names), "--all": every, "--all-namespaces": all_namespaces}
    given = [way for way, said in ways.items() if said]
    if len(given) != 1:
        told = f"{' and '.join(given)} do not go together" if given else "none of them is there"
        _wrong(f"probe takes names of resources (-n NAMESPACE), --all of a namespace or --all-namespaces: {told}")
    if status and vantages:
        _wrong("--from measures, and --status only tells what the operator measured: leave one of them out")
    wanted = edge.Wanted(None if all_namespaces else namespace, names, vantages, image, wait, status)
    try:
        found = edge.run(user_login(kubeconfig, context), wanted, lambda line: click.echo(line, err=True))
    except KeyboardInterrupt:
        click.echo("securevllm: interrupted; the canary pods are removed", err=True)
        sys.exit(_INTERRUPTED)
    except OperatorError as error:
        _wrong(str(error))
    _print_reports(found, output)
    if not found:
        where = "in the cluster" if all_namespaces else f"in namespace {namespace}"
        click.echo(f"securevllm: there is no SecureVLLMDeployment {where}: nothing to measure", err=True)
    sys.exit(edge.exit_code(found))


_INTERRUPTED = 130


def _print_reports(found: Sequence[Any], output: str) -> None:
    from securevllm.proof import report as forms  # noqa: PLC0415 - see the module's docstring

    for item in found:
        if output == "json":
            click.echo(json.dumps(forms.as_dict(item)))
            continue
        if item.rows:
            _table(list(forms.HEAD), forms.table(item), output)
        for line in forms.verdict(item):
            click.echo(line)


def _judged(
    stream: TextIO, namespace: str, uid: str, bounds: Any, context: Any
) -> tuple[list[tuple[Any, Any, dict[str, Any]]], bool]:
    """Owner, accepted spec and metadata of each good resource; True: another one is wrong, and it was said why."""
    from securevllm.api.parse import parse  # noqa: PLC0415 - see the module's docstring
    from securevllm.render.meta import Owner  # noqa: PLC0415 - see the module's docstring
    from securevllm.topology import check  # noqa: PLC0415 - see the module's docstring

    judged: list[tuple[Any, Any, dict[str, Any]]] = []
    failed = False
    for document in _resources(stream):
        metadata = document.get("metadata") or {}
        owner = Owner(str(metadata.get("name", "")), str(metadata.get("namespace") or namespace), uid)
        try:
            _check_namespace(owner.namespace)
            accepted = parse(owner.name, document.get("spec") or {}, bounds)
            check(accepted.spec, context)
            judged.append((owner, accepted, metadata))
        except SpecError as error:
            failed = True
            for problem in error.problems:
                click.echo(f"{stream.name}: {owner.name or '(no name)'}: {problem.reason}: {problem}", err=True)
    return judged, failed


def _check_namespace(name: str) -> None:
    if _DNS_LABEL.fullmatch(name) is None:
        told = "this is no name of a namespace"
        raise SpecError(Problem("metadata.namespace", "InvalidSpec", told, f"Use {_NO_LABEL}.", name[:80]))


def _rendered(owner: Any, accepted: Any, metadata: dict[str, Any], context: Any) -> Iterator[dict[str, Any]]:
    from securevllm.render import Observed, fetch  # noqa: PLC0415 - see the module's docstring
    from securevllm.render import render as render_resource  # noqa: PLC0415 - see the module's docstring
    from securevllm.render.meta import RESTART_ANNOTATION  # noqa: PLC0415 - see the module's docstring

    fetched = frozenset([fetch.job_name(owner, accepted.spec)])
    restart_at = str((metadata.get("annotations") or {}).get(RESTART_ANNOTATION, ""))
    rendered = render_resource(owner, accepted, context, Observed(fetched=fetched, restart_at=restart_at))
    yield rendered.deny
    yield from rendered.isolation
    yield from (item.object for item in rendered.generated)
    yield from (*rendered.configuration, *rendered.workloads)


def _resources(stream: TextIO) -> Iterator[dict[str, Any]]:
    """The SecureVLLMDeployments of a manifest; anything else is wrong input."""
    from securevllm.api import kinds  # noqa: PLC0415 - see the module's docstring

    try:
        documents = [document for document in yaml.safe_load_all(stream) if document is not None]
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        _wrong(f"{stream.name} is not YAML: {error}")
    if not documents:
        _wrong(f"{stream.name} holds no object")
    for document in documents:
        if not isinstance(document, dict):
            _wrong(f"{stream.name} holds {type(document).__name__}, not a Kubernetes object")
        if unlike := kinds.unlike_resource(document):
            _wrong(f"{stream.name} {unlike}")
        for part in ("metadata", "spec"):
            if not isinstance(document.get(part) or {}, dict):
                _wrong(f"{stream.name}: {part} is {type(document[part]).__name__}, not a mapping")
        yield document


def _wrong(message: str) -> Any:
    click.echo(f"securevllm: {message}", err=True)
    sys.exit(_WRONG_INPUT)


def _print(objects: Sequence[dict[str, Any]], output: str) -> None:
    if output == "json":
        for item in objects:
            click.echo(json.dumps(item))
    elif objects:
        click.echo(yaml.dump_all(objects, Dumper=_Dumper, sort_keys=False, width=120), nl=False)


class _Dumper(yaml.SafeDumper):
    """Block style for texts with lines, no anchors: a person reads it."""

    def ignore_aliases(self, _data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.Node:
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style="|" if "\n" in value else None)


_Dumper.add_representer(str, _text)


def _installations(_context: Any, _option: Any, values: tuple[str, ...]) -> tuple[str, ...]:
    for value in values:
        namespace, slash, lease = value.partition("/")
        if not (namespace and slash and lease) or "/" in lease:
            raise click.BadParameter(f"{value!r} is not NAMESPACE/LEASE, as status.operator of the resources says it")
    return values


_URL = re.compile(r"https?://[A-Za-z0-9.:\[\]-]{1,253}(?:/[A-Za-z0-9._~/-]{0,253})?")


def _docs_url(_context: Any, _option: Any, value: str | None) -> str | None:
    if value is not None and _URL.fullmatch(value) is None:
        raise click.BadParameter(f"{value!r} is not an address such as https://docs.example.com/secure-vllm-operator")
    return value and value.rstrip("/")


@main.command()
@click.option(
    "--namespace",
    "watch_namespace",
    callback=_label,
    envvar="SECUREVLLM_WATCH_NAMESPACE",
    help="Watch this namespace only; a Role is enough. Default: all namespaces.",
)
@click.option(
    "--identity",
    envvar="POD_NAME",
    default=None,
    help="Name among the candidates for the Lease. Default: host and pid.",
)
@click.option(
    "--kubeconfig",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Outside of a cluster. $KUBECONFIG is never read. Default: the pod's service account.",
)
@click.option("--http-host", help="Address of health, metrics and canary listener. Default: all of the pod.")
@click.option("--http-port", default=8080, show_default=True, type=click.IntRange(0, 65535), help="Their port.")
@click.option(
    "--canary-listener/--no-canary-listener",
    default=True,
    show_default=True,
    help="Listen on --canary-port; gates look for it. Off: when another process of this machine does.",
)
@click.option(
    "--canary-pods/--no-canary-pods",
    default=True,
    show_default=True,
    help="Measure with short-lived pods in the resources' namespaces, on change and every few hours. Off: Isolated is"
    " never True, because nothing shows what silence means.",
)
@click.option("--workers", default=8, show_default=True, type=click.IntRange(1, 64), help="Resources at once.")
@click.option(
    "--take-over",
    multiple=True,
    metavar="NAMESPACE/LEASE",
    callback=_installations,
    help="An installation that is gone, as status.operator names it: its resources become this one's. Repeatable."
    " Never name one that still runs.",
)
@click.option(
    "--docs-url",
    callback=_docs_url,
    help="Where your people find the folder docs/ of this release: messages of the status link there. Default: they"
    " name the page, such as docs/status.md#invalidspec.",
)
@_BOUNDS
@_context_options
@click.option(
    "--resync",
    default=600,
    show_default=True,
    type=click.IntRange(5, 86400),
    help="Seconds between two full lists of everything that is watched.",
)
@click.option("--log-format", type=click.Choice(["json", "console"]), default="json", show_default=True)
@click.option("--log-level", type=click.Choice(["DEBUG", "INFO", "WARNING"]), default="INFO", show_default=True)
def run(  # noqa: PLR0917 - click gives one argument per option
    watch_namespace: str | None,
    identity: str | None,
    kubeconfig: Path | None,
    http_host: str | None,
    http_port: int,
    canary_listener: bool,
    canary_pods: bool,
    workers: int,
    take_over: tuple[str, ...],
    docs_url: str | None,
    resync: int,
    log_format: Any,
    log_level: str,
    bounds_file: Path | None,
    **cluster: Any,
) -> None:
    """Run the operator until SIGTERM. Exit code 0: asked to stop; 1: it failed, or another one leads."""
    from securevllm.operator import run as run_operator  # noqa: PLC0415 - see the module's docstring
    from securevllm.settings import Settings  # noqa: PLC0415 - see the module's docstring
    from securevllm.status import DOCS  # noqa: PLC0415 - see the module's docstring

    settings = Settings(
        namespace=cluster["operator_namespace"],
        identity=identity or f"{socket.gethostname()}-{os.getpid()}",
        watch_namespace=watch_namespace,
        kubeconfig=kubeconfig,
        workers=workers,
        http_host=http_host,
        http_port=http_port,
        canary_listener=canary_listener,
        canary_pods=canary_pods,
        log_format=log_format,
        log_level=log_level,
        take_over=take_over,
        docs_url=docs_url or DOCS,
        resync_seconds=resync,
        context=_context(**cluster),
        bounds=_bounds(bounds_file),
    )
    try:
        run_operator(settings)
    except OperatorError as error:
        click.echo(f"securevllm: {error}", err=True)
        sys.exit(1)
