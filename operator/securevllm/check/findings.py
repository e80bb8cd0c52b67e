"""What is wrong with a workload, as findings with a code, a severity and the way out.

The severity says what somebody gains who may send packets to the pods, or, for a model's files, who made them.
Facts about vLLM come from the catalogue; the codes are explained in docs/check.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, Any

from securevllm import catalogue
from securevllm.api.advisories import FEATURE_FLAGS
from securevllm.api.guard import arguments
from securevllm.catalogue import conditions
from securevllm.catalogue.conditions import Started
from securevllm.check import exposure
from securevllm.check.command import Flag, Launch, last_values

if TYPE_CHECKING:
    from securevllm.check.exposure import Published, Reach, Socket, World
    from securevllm.check.workloads import Part, Workload


class Severity(IntEnum):
    """How bad it is, worst last; ``never`` only as a threshold."""

    INFO = 0
    LOW = 1
    MEDIUM = 2
    HIGH = 3
    CRITICAL = 4
    NEVER = 5

    @property
    def word(self) -> str:
        """In lower case."""
        return self.name.lower()


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong.

    Attributes:
        severity: how bad.
        code: CamelCase, an anchor of docs/check.md.
        message: what, one sentence without a full stop.
        fix: what to do.
    """

    severity: Severity
    code: str
    message: str
    fix: str


@dataclass(frozen=True)
class Answer:
    """A route that answers. ``sure`` False: only if the model has the task, or a hidden variable is set."""

    route: catalogue.Route
    key: bool
    sure: bool


@dataclass(frozen=True)
class Listening:
    """A socket with who may connect."""

    socket: Socket
    reach: Reach


@dataclass(frozen=True)
class Seen:
    """What was found out about a workload before it is judged.

    Attributes:
        workload: the object.
        version: whose tables are used.
        claimed: the version that the image's tag says; None: it says none.
        key: whether vLLM's own key is on; None: a hidden variable may set it.
        answers: routes of the HTTP server.
        listening: its sockets.
        published: ways to its HTTP port.
    """

    workload: Workload
    version: catalogue.Version
    claimed: catalogue.Version | None
    key: bool | None
    answers: tuple[Answer, ...]
    listening: tuple[Listening, ...]
    published: tuple[Published, ...]


_NODES = "use a SecureVLLMDeployment: --suggest prints it; or a NetworkPolicy that lets only its own pods in"


def look(workload: Workload, world: World) -> Seen:
    """Find out what there is to judge."""
    claimed = _claimed(part.image for part in workload.parts)
    version = min(max(claimed or catalogue.newest(), catalogue.oldest()), catalogue.newest())
    grouped = len({part.role for part in workload.parts}) > 1
    listening = [
        Listening(socket, exposure.reach(part.pod, socket, world))
        for part in workload.parts
        for socket in exposure.sockets(part, version, grouped=grouped)
    ]
    server = workload.server
    if server is None:
        return Seen(workload, version, claimed, None, (), tuple(listening), ())
    key = _key(server.launch)
    port = next((item.socket.first for item in listening if not item.socket.inner), 0)
    return Seen(
        workload,
        version,
        claimed,
        key,
        tuple(_answers(server.launch, version, key)),
        tuple(listening),
        tuple(exposure.published(server, port, world)),
    )


def _claimed(images: Iterable[str]) -> catalogue.Version | None:
    for image in images:
        repository, _, tag = image.partition("@")[0].rpartition(":")
        # The tags of other projects that ship vLLM count their own releases.
        if "vllm" not in repository.rpartition("/")[2]:
            continue
        try:
            return catalogue.Version.parse(tag)
        except ValueError:
            continue
    return None


def _key(launch: Launch) -> bool | None:
    root = launch.flag("--root-path")
    if root is not None and root.value == "/":
        return False  # the guarded prefixes match nothing then (serve/middleware/authenticate.py)
    if launch.flag("--api-key") is not None:
        return True
    variable = launch.variables.get("VLLM_API_KEY")
    if variable is not None:
        return variable.value != ""
    return None if launch.hidden else False


def _answers(launch: Launch, version: catalogue.Version, key: bool | None) -> Iterator[Answer]:
    started = Started(
        flags={flag.name: launch.on(flag.name) for flag in launch.flags},
        variables={name: not variable.off for name, variable in launch.variables.items()},
        tasks=_tasks(launch),
        complete=not launch.hidden,
    )
    for route in catalogue.routes_of(version).values():
        holds = conditions.holds(route.when, version, started)
        if holds is not False:
            yield Answer(route, key=route.key and key is not False, sure=holds is True)


def _tasks(launch: Launch) -> frozenset[str] | None:
    """Tasks that the flags say; None: they are the model's."""
    for name in ("--task", "--convert", "--runner"):
        flag = launch.flag(name)
        value = flag.value if flag is not None else "auto"
        if value in {"auto", "none", "", "draft"}:
            continue
        if value == "pooling":
            return conditions.POOLING
        return frozenset({{"embedding": "embed", "scoring": "score", "classification": "classify"}.get(value, value)})
    return None


# ------------------------------------------------------------------------------------------------------------- judging


def judge(seen: Seen, world: World) -> tuple[Finding, ...]:
    """Everything that is wrong, worst first."""
    found = [finding for check in _CHECKS for finding in check(seen, world)]
    return tuple(sorted(dict.fromkeys(found), key=lambda item: (-item.severity, item.code, item.message)))


def _unreadable(seen: Seen, _: World) -> Iterator[Finding]:
    for part in seen.workload.parts:
        if part.launch.unreadable:
            yield Finding(
                Severity.MEDIUM,
                "UnreadableCommand",
                f"container {part.container.get('name')}: {part.launch.unreadable}: flags and routes are not known",
                "start vLLM as `vllm serve MODEL --flags` in command or args",
            )
        if part.launch.hidden:
            yield Finding(
                Severity.LOW,
                "HiddenEnvironment",
                f"what comes from {', '.join(part.launch.hidden)} cannot be seen: it may open routes, or set a key",
                "name each variable under env, and each flag in args",
            )


def _versions(seen: Seen, _: World) -> Iterator[Finding]:
    newest = catalogue.newest()
    if seen.claimed is None:
        images = ", ".join(dict.fromkeys(part.image for part in seen.workload.parts))
        yield Finding(
            Severity.MEDIUM,
            "VersionUnreadable",
            f"image {images} does not say which vLLM it holds: told is what {seen.version} does, and no published hole",
            f"use a release tag such as vllm/vllm-openai:v{newest}",
        )
    elif not catalogue.oldest() <= seen.claimed < catalogue.Version(newest.major, newest.minor + 1):
        yield Finding(
            Severity.MEDIUM,
            "VersionUnknown",
            f"vLLM {seen.claimed} is not catalogued: told is what {seen.version} does",
            f"use vLLM {newest}",
        )


def _advisories(seen: Seen, _: World) -> Iterator[Finding]:
    if seen.claimed is None:
        return
    for advisory in catalogue.advisories_of(seen.claimed, features(part.launch for part in seen.workload.parts)):
        where = f" ({advisory.component})" if advisory.component else ""
        fixed = f"use vLLM {advisory.fixed} or newer" if advisory.fixed else "no fixed vLLM is known"
        held = "; a SecureVLLMDeployment keeps attackers away by " if advisory.controls else ""
        yield Finding(
            Severity[advisory.severity.upper()],
            "Advisory",
            f"{advisory.id}{where}: {advisory.summary}",
            fixed + held + " and ".join(advisory.controls),
        )


_CONNECTORS = {"nixl": "nixl", "mooncake": "mooncake", "p2pnccl": "p2p-nccl", "lmcache": "lmcache"}


def features(launches: Iterable[Launch]) -> frozenset[str]:
    """Features of `catalogue.FEATURES` that command lines use."""
    used = set()
    for launch in launches:
        used |= {FEATURE_FLAGS[flag.name] for flag in launch.flags if flag.name in FEATURE_FLAGS}
        transfer = " ".join(flag.written for flag in launch.flags if flag.name == "--kv-transfer-config").lower()
        used |= {feature for word, feature in _CONNECTORS.items() if word in transfer}
        if launch.number("--nnodes", 1) != 1 or launch.number("--data-parallel-size", 1) != 1 or launch.ray:
            used.add("nodes")
        if launch.number("--pipeline-parallel-size", 1) != 1:
            used.add("pipeline")
        if any("extract_hidden_states" in flag.written for flag in launch.flags):
            used.add("speculative")
        cache = launch.flag("--mm-processor-cache-type")
        if cache is not None and cache.value == "shm":
            used.add("shm-cache")
        frontend = launch.variables.get("VLLM_USE_RUST_FRONTEND")
        if frontend is not None and not frontend.off:
            used.add("rust-frontend")
    return frozenset(used)


def _exposure(reach: Reach, ways: tuple[Published, ...] = ()) -> tuple[Severity, str]:
    """How far a socket is open: the severity of a socket without any lock, and who reaches it."""
    outside = [way for way in ways if way.outside]
    if outside and reach.outside:
        return (
            Severity.CRITICAL,
            f"from outside of the cluster by {', '.join(dict.fromkeys(way.by for way in outside))}",
        )
    if reach.everybody:
        return Severity.CRITICAL, f"by {exposure.EVERYBODY}"
    if reach.peers:
        peers = "; ".join(dict.fromkeys(peer for peer, _ in reach.peers))
        return Severity.HIGH, f"by {peers}"
    return Severity.INFO, "by its own pods and its node only"


def _sockets(seen: Seen, _: World) -> Iterator[Finding]:
    found: dict[tuple[Severity, str], list[Socket]] = {}
    for item in seen.listening:
        if item.socket.inner and not item.reach.nobody:
            found.setdefault(_exposure(item.reach), []).append(item.socket)
    for (severity, who), sockets in found.items():
        # Every engine has Gloo's, also with one GPU; no way is known to run code through them.
        worst = min(severity, Severity.HIGH) if {socket.speaks for socket in sockets} == {"Gloo"} else severity
        told = dict.fromkeys(f"{socket.name} ({socket.ports}, {socket.speaks})" for socket in sockets)
        yield Finding(
            worst,
            "InternalSocketOpen",
            f"sockets without authentication can be reached {who}: {', '.join(told)}",
            _NODES,
        )


def _routes(seen: Seen, _: World) -> Iterator[Finding]:
    api = next((item for item in seen.listening if not item.socket.inner), None)
    if api is None:
        return
    severity, who = _exposure(api.reach, seen.published)
    open_routes = [answer for answer in seen.answers if not answer.key]
    if seen.key is False:
        yield Finding(
            severity if severity > Severity.INFO else Severity.LOW,
            "NoApiKey",
            f"every route answers without a key; the port can be reached {who}",
            "set VLLM_API_KEY from a Secret, and put a gateway in front: the key does not guard every route",
        )
    elif open_routes:
        yield Finding(
            min(severity, Severity.HIGH),
            "KeylessRoutes",
            f"{_count(open_routes)} without the key; the port can be reached {who}",
            "let only a gateway reach the port, with an exact allowlist of routes",
        )
    control = [answer for answer in open_routes if answer.route.category == "control" and answer.sure]
    if control:
        shown = ", ".join(f"{answer.route.method} {answer.route.path}" for answer in control[:4])
        more = f" and {len(control) - 4} more" if len(control) > 4 else ""  # noqa: PLR2004 - what fits a line
        yield Finding(
            severity,
            "ControlRoutes",
            f"without a key whoever reaches the port may control the server: {shown}{more}",
            "let only a gateway reach the port; leave out what opens them: VLLM_SERVER_DEV_MODE and the flags below",
        )


def _count(answers: list[Answer]) -> str:
    sure = sum(answer.sure for answer in answers)
    return f"{sure} routes answer, and depending on the model {len(answers) - sure} more,"


def _published(seen: Seen, _: World) -> Iterator[Finding]:
    never = [answer.route for answer in seen.answers if answer.route.never]
    for way in seen.published:
        if not way.outside:
            continue
        if way.exact:
            hit = [route for route in never if route.path == way.exact]
        else:
            below = way.prefix.rstrip("/")
            hit = [route for route in never if not below or route.path == below or route.path.startswith(f"{below}/")]
        if hit:
            names = ", ".join(dict.fromkeys(route.path for route in hit[:4]))
            yield Finding(
                Severity.HIGH,
                "RoutesPublished",
                f"{way.by} ({way.how}) leads to what no client needs: {names}{' ...' if len(hit) > 4 else ''}",  # noqa: PLR2004
                "name each path exactly, or use a SecureVLLMDeployment: its gateway has an exact allowlist",
            )


def _isolation(seen: Seen, world: World) -> Iterator[Finding]:
    for part in seen.workload.parts:
        of = f" of the {part.role}" if part.role else ""
        if part.pod.host_network:
            yield Finding(
                Severity.HIGH,
                "HostNetwork",
                f"hostNetwork{of}: no NetworkPolicy is about these pods, and every socket is one of the node",
                "leave hostNetwork out",
            )
            continue
        if not world.policies.selecting(part.pod, "Ingress"):
            yield Finding(
                Severity.HIGH,
                "NotIsolated",
                f"no NetworkPolicy of the input isolates the pods{of} for ingress",
                _NODES,
            )
        out = exposure.egress(part.pod, world)
        if out is None or any(rule.peers is None for rule in out):
            yield Finding(
                Severity.MEDIUM,
                "EgressOpen",
                f"the pods{of} may connect to everything, the metadata service of a cloud included",
                "a NetworkPolicy of type Egress that allows DNS and what is needed",
            )


def _flags(seen: Seen, _: World) -> Iterator[Finding]:
    dangers = catalogue.dangers()[0]
    for part in seen.workload.parts:
        for flag in last_values(part.launch.flags).values():
            if flag.name == "--api-key":
                yield Finding(
                    Severity.MEDIUM,
                    "KeyInArguments",
                    "--api-key stands in the pod's arguments: whoever reads the pod has the key",
                    "set VLLM_API_KEY from a Secret",
                )
            rule = refusal(flag, seen.version)
            danger = dangers.get(flag.name)
            if rule is None or (danger is None and not _names_things(flag.name)):
                continue
            severity = Severity[danger.severity.upper()] if danger is not None else Severity.MEDIUM
            why = danger.why if danger is not None else rule
            yield Finding(severity, "DangerousFlag", f"{_short(flag)}: {why}", "leave it out")


def _names_things(name: str) -> bool:
    """Whether a flag that a user may set names files, modules or hosts with some values."""
    setting = catalogue.flags().allowed.get(name)
    return setting is not None and setting.kind in {"json", "loras", "word", "choice", "path", "endpoint"}


def refusal(flag: Flag, version: catalogue.Version) -> str | None:
    """Why the guard would not let a user pass a flag with this value; None: it would."""
    if flag.value.lower() in {"false", "none"}:
        return None
    words = [f"{flag.name}={value}" for value in flag.values[:1]] or [flag.name]
    problem = next(arguments.check(words, version, mounts=(), accepted=()), None)
    return problem.rule if problem is not None else None


def _short(flag: Flag) -> str:
    return flag.written if len(flag.written) <= 60 else f"{flag.written[:57]}..."  # noqa: PLR2004 - what fits a line


def _variables(seen: Seen, _: World) -> Iterator[Finding]:
    dangers = catalogue.dangers()[1]
    safe = catalogue.environment().fixed
    for part in seen.workload.parts:
        for name, variable in part.launch.variables.items():
            danger = dangers.get(name)
            if danger is None:
                continue
            if name == "VLLM_API_KEY":
                if variable.value:
                    yield Finding(
                        Severity.MEDIUM,
                        "KeyInPlainText",
                        "VLLM_API_KEY stands in the pod in plain text: whoever reads the pod has the key",
                        "take it from a Secret with valueFrom.secretKeyRef",
                    )
                continue
            if variable.off or variable.value == safe.get(name, None) or variable.source.startswith("field "):
                continue
            shown = f"{name}={variable.value}" if variable.value is not None else f"{name} from {variable.source}"
            yield Finding(
                Severity[danger.severity.upper()], "DangerousVariable", f"{shown[:80]}: {danger.why}", "leave it out"
            )


def _media(seen: Seen, world: World) -> Iterator[Finding]:
    server = seen.workload.server
    if server is None or server.launch.flag("--allowed-media-domains") is not None:
        return
    rules = exposure.egress(server.pod, world)
    if rules is None or any(rule.peers is None for rule in rules):
        yield Finding(
            Severity.MEDIUM,
            "MediaFromAnywhere",
            "a request may name a media URL of any host, and the engine fetches it: server-side request forgery",
            "--allowed-media-domains with the hosts that are needed, VLLM_MEDIA_URL_ALLOW_REDIRECTS=0, and no egress",
        )


_POD = (
    ("hostIPC", True, Severity.MEDIUM, "HostNamespaces", "hostIPC shares memory of the node's other processes"),
    ("hostPID", True, Severity.HIGH, "HostNamespaces", "hostPID shows, and may end, the node's other processes"),
)


def _pods(seen: Seen, _: World) -> Iterator[Finding]:
    for part in seen.workload.parts:
        of = f"{part.role}: " if part.role else ""
        for name, value, severity, code, message in _POD:
            if part.spec.get(name) is value:
                yield Finding(severity, code, f"{of}{message}", f"leave {name} out")
        if _mapping(part.container.get("securityContext")).get("privileged") is True:
            yield Finding(Severity.HIGH, "Privileged", f"{of}a privileged container owns the node", "leave it out")
        if part.spec.get("automountServiceAccountToken") is not False:
            yield Finding(
                Severity.LOW,
                "TokenMounted",
                f"{of}a token of the Kubernetes API is in the pod of a program that may be made to run code",
                "automountServiceAccountToken: false",
            )
        if part.spec.get("enableServiceLinks") is not False:
            yield Finding(
                Severity.LOW,
                "ServiceLinks",
                f"{of}a Service called vllm would set VLLM_PORT, and vLLM would not start",
                "enableServiceLinks: false",
            )
        yield from _volumes(part, of)


def _volumes(part: Part, of: str) -> Iterator[Finding]:
    given = part.spec.get("volumes")
    for volume in given if isinstance(given, list) else []:
        path = _mapping(_mapping(volume).get("hostPath")).get("path")
        if path is not None:
            yield Finding(
                Severity.MEDIUM,
                "HostPath",
                f"{of}volume {_mapping(volume).get('name')} is {path} of the node: other pods may share it",
                "use a PersistentVolumeClaim or an emptyDir",
            )


def _mapping(given: Any) -> Mapping[str, Any]:
    return given if isinstance(given, Mapping) else {}


_CHECKS = (
    _unreadable, _versions, _advisories, _sockets, _routes, _published, _isolation, _flags, _variables, _media, _pods,
)  # fmt: skip
