"""Reads the command line of a container: does it start vLLM, with which flags and variables.

Kubernetes' rules for ``command`` and ``args``, a shell's for ``sh -c`` as far as words and separators go, and those of
vLLM's parser for flags (vllm/utils/argparse_utils.py, 0.33.0): ``--a=b`` and ``--a b``, underscores, unambiguous
prefixes, JSON keys after a dot, the last of a repeated flag wins. What cannot be read is said so, never guessed to be
harmless.
"""

from __future__ import annotations

import functools
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from securevllm import catalogue

_IMAGE = re.compile(r"vllm|llm-d-(cuda|xpu|hpu|cpu|rocm|gpu)|(^|/)llm-d$")
_NO_SERVER = re.compile(
    r"router|sidecar|scheduler|operator|controller|exporter|bench|gateway|proxy|epp|simulator|-sim$"
)
_SHELLS = frozenset({"sh", "bash", "ash", "dash", "zsh"})
_MODULES = frozenset({"vllm.entrypoints.openai.api_server", "vllm.entrypoints.api_server", "vllm.entrypoints.cli.main"})
_RAY_SCRIPT = "multi-node-serving.sh"
_ASSIGNMENT = re.compile(r"[A-Za-z_][A-Za-z0-9_]*=")
_REFERENCE = re.compile(r"\$\((?P<kubernetes>[A-Za-z_][A-Za-z0-9_]*)\)|\$\{?(?P<shell>[A-Za-z_][A-Za-z0-9_]*)\}?")
_ALONE = re.compile(r"--(enable|disable|no|trust|use|skip|return|calculate|ignore|allow-credentials)(-|$)")
_ALONE_TOO = frozenset(
    {
        *("--headless", "--grpc", "--enforce-eager", "--async-scheduling", "--tokens-only", "--numa-bind"),
        *("--data-parallel-hybrid-lb", "--data-parallel-external-lb", "--data-parallel-multi-port-external-lb"),
        *("--head", "--block"),
    }
)
_OTHER_FLAGS = frozenset({"--runner", "--task", "--convert", "--data-parallel-backend", "--gpu-memory-utilization"})


@dataclass(frozen=True)
class Variable:
    """An environment variable. ``value`` None: it comes from ``source``, and nobody can see it here."""

    value: str | None
    source: str = ""

    @property
    def off(self) -> bool:
        """Whether it is set to what vLLM reads as no."""
        return self.value is not None and self.value.strip().lower() in {"", "0", "false", "no", "off"}


@dataclass(frozen=True)
class Flag:
    """A flag as vLLM's parser understands it. ``written``: as it stands there."""

    name: str
    values: tuple[str, ...]
    written: str

    @property
    def value(self) -> str:
        """The first value, or nothing."""
        return self.values[0] if self.values else ""


@dataclass(frozen=True)
class Launch:
    """What a container starts.

    Attributes:
        serves: an HTTP server of vLLM.
        model: what it serves; empty when it is not said.
        flags: in order.
        variables: environment of the container.
        hidden: where further variables or flags come from that cannot be seen.
        ray: ``head`` or ``worker`` of a Ray cluster; empty: neither.
        dashboard: Ray's dashboard listens on more than the loopback address.
        unreadable: why the command cannot be read; empty: it can.
    """

    serves: bool = False
    model: str = ""
    flags: tuple[Flag, ...] = ()
    variables: Mapping[str, Variable] = field(default_factory=dict)
    hidden: tuple[str, ...] = ()
    ray: str = ""
    dashboard: bool = False
    unreadable: str = ""

    def flag(self, name: str) -> Flag | None:
        """The last one of that name: it wins."""
        return next((flag for flag in reversed(self.flags) if flag.name == name), None)

    def number(self, name: str, default: int) -> int | None:
        """The number that a flag sets; None: it is set to what cannot be read here."""
        flag = self.flag(name)
        if flag is None:
            return default
        return int(flag.value) if re.fullmatch(r"[0-9]{1,9}", flag.value) else None

    def on(self, name: str) -> bool:
        """Whether a flag without a value is given, and not taken back."""
        given = [flag.name for flag in self.flags if flag.name in {name, f"--no-{name[2:]}"}]
        return bool(given) and given[-1] == name


def is_vllm_image(image: str) -> bool:
    """Whether the repository of an image is named like one of vLLM."""
    repository = re.sub(r":[^/:]*$", "", image.partition("@")[0])
    return bool(_IMAGE.search(repository)) and not _NO_SERVER.search(repository.rpartition("/")[2])


def launch(container: Mapping[str, Any], variables: Mapping[str, Variable], hidden: tuple[str, ...]) -> Launch | None:
    """Read a container; None: it does not run vLLM.

    Args:
        container: a core/v1 Container.
        variables: its environment.
        hidden: sources of further variables.
    """
    command, args = _words(container.get("command")), _words(container.get("args"))
    ours = is_vllm_image(str(container.get("image") or ""))
    # The image's own entry point is `vllm serve`, or in old releases the module with the same flags.
    started = ["vllm"] if args[:1] == ["serve"] else ["vllm", "serve"]
    words = command + args if command else args if _is_program(args) or not ours else [*started, *args]
    words = [_expand(word, variables, in_shell=False) for word in words]
    try:
        found = [part for simple in _simple(words, variables) for part in _read(simple)]
    except ValueError as error:
        return Launch(variables=variables, hidden=hidden, unreadable=f"{error}") if ours else None
    if not found:
        if not ours or not _may_be_a_script(words):
            return None
        return Launch(
            variables=variables, hidden=hidden, unreadable=f"{' '.join(words)[:120]!r} is a program of its own"
        )
    served = next((part for part in found if part.serves), Launch())
    ray = next((part for part in found if part.ray), Launch())
    hidden += tuple(f"file {flag.value} of --config" for flag in served.flags if flag.name == "--config")
    return Launch(served.serves, served.model, served.flags, variables, hidden, ray.ray, ray.dashboard)


def environment(
    container: Mapping[str, Any], config: Mapping[str, Mapping[str, str]]
) -> tuple[dict[str, Variable], tuple[str, ...]]:
    """Variables of a container, and the sources of those that cannot be seen.

    Args:
        container: a core/v1 Container.
        config: data of the ConfigMaps of the same namespace, by name.
    """
    variables: dict[str, Variable] = {}
    hidden = []
    for entry in _mappings(container.get("envFrom")):
        prefix = str(entry.get("prefix") or "")
        for kind in ("configMapRef", "secretRef"):
            reference = entry.get(kind)
            if not isinstance(reference, Mapping):
                continue
            data = config.get(str(reference.get("name"))) if kind == "configMapRef" else None
            if data is None:
                hidden.append(f"{kind.removesuffix('Ref')} {reference.get('name')}")
                continue
            source = f"configMap {reference.get('name')}"
            variables |= {prefix + key: Variable(str(value), source) for key, value in data.items()}
    for entry in _mappings(container.get("env")):
        name, value, elsewhere = entry.get("name"), entry.get("value"), entry.get("valueFrom")
        if not isinstance(name, str):
            continue
        if isinstance(elsewhere, Mapping):
            variables[name] = _from_elsewhere(elsewhere, config)
        else:
            variables[name] = Variable(_expand("" if value is None else str(value), variables, in_shell=False))
    return variables, tuple(hidden)


def _from_elsewhere(given: Mapping[str, Any], config: Mapping[str, Mapping[str, str]]) -> Variable:
    for kind, reference in given.items():
        if not isinstance(reference, Mapping):
            continue
        if kind == "configMapKeyRef":
            data = config.get(str(reference.get("name")), {})
            return Variable(data.get(str(reference.get("key"))), f"configMap {reference.get('name')}")
        if kind == "secretKeyRef":
            return Variable(None, f"secret {reference.get('name')}/{reference.get('key')}")
        return Variable(None, f"{kind.removesuffix('Ref')} {reference.get('fieldPath') or reference.get('resource')}")
    return Variable(None, "unknown source")


def _mappings(given: Any) -> list[Mapping[str, Any]]:
    return [item for item in given if isinstance(item, Mapping)] if isinstance(given, list) else []


def _words(given: Any) -> list[str]:
    return [str(item) for item in given if item is not None] if isinstance(given, list) else []


def _expand(text: str, variables: Mapping[str, Variable], *, in_shell: bool) -> str:
    """Replace references to variables whose value is known; others stay as they are written."""

    def known(match: re.Match[str]) -> str:
        name = match["kubernetes"] or (match["shell"] if in_shell else "") or ""
        value = variables[name].value if name in variables else None
        return match[0] if value is None else value

    return _REFERENCE.sub(known, text)


def _base(word: str) -> str:
    return word.rpartition("/")[2]


def _is_program(args: Sequence[str]) -> bool:
    return bool(args) and (_base(args[0]) in {*_SHELLS, "vllm", "ray", "env"} or _base(args[0]).startswith("python"))


def _may_be_a_script(words: Sequence[str]) -> bool:
    """A vLLM image with an own command: not one that obviously does something else."""
    return bool(words) and _base(words[0]) not in {"sleep", "true", "cp", "chown", "mkdir", "ls", "cat", "nvidia-smi"}


def _simple(words: list[str], variables: Mapping[str, Variable]) -> Iterator[list[str]]:
    """The simple commands: of the script when a shell runs one, otherwise the one command."""
    if words and _base(words[0]) in _SHELLS:
        for index, word in enumerate(words[1:], 1):
            if re.fullmatch(r"-[a-z]*c[a-z]*", word) and index + 1 < len(words):
                yield from _script(_expand(words[index + 1], variables, in_shell=True))
                return
    yield words


def _script(text: str) -> Iterator[list[str]]:
    lexer = shlex.shlex(text.replace("\\\n", " "), posix=True, punctuation_chars=";&|<>\n")
    lexer.whitespace, lexer.commenters, lexer.whitespace_split = " \t\r", "", True
    current: list[str] = []
    comment = redirected = False
    for word in lexer:
        if word.strip(";&|\n") == "" and word:
            comment = comment and "\n" not in word
            if not comment:
                yield current
                current, redirected = [], False
        elif word.strip("<>&|") == "":
            redirected = True
        elif comment or word.startswith("#"):
            comment = True
        elif redirected:
            redirected = False
        else:
            current.append(word)
    yield current


def _read(words: Sequence[str]) -> Iterator[Launch]:
    """What one simple command starts: at most one thing, found behind wrappers such as exec or numactl."""
    for index, word in enumerate(words):
        base, rest = _base(word), words[index + 1 :]
        if base == "vllm" and rest[:1] == ["serve"]:
            yield _server(rest[1:])
            return
        if base.startswith("python") and "-m" in rest:
            module = rest[rest.index("-m") + 1 : rest.index("-m") + 2]
            if module and module[0] in _MODULES:
                after = rest[rest.index("-m") + 2 :]
                yield _server(after[1:] if after[:1] == ["serve"] else after)
                return
        if (base == "ray" and rest[:1] == ["start"]) or base == _RAY_SCRIPT:
            role = "head" if "--head" in rest or rest[:1] == ["leader"] else "worker"
            host = next((flag.value for flag in _flags(rest)[0] if flag.name == "--dashboard-host"), "localhost")
            yield Launch(ray=role, dashboard=host not in {"localhost", "127.0.0.1", "::1"})
            return


def _server(words: Sequence[str]) -> Launch:
    flags, positional = _flags(words)
    model = next((flag for flag in reversed(flags) if flag.name == "--model"), None)
    name = positional[0] if positional else model.value if model else ""
    return Launch(serves=True, model=name, flags=tuple(flags))


def _flags(words: Sequence[str]) -> tuple[list[Flag], list[str]]:
    flags: list[Flag] = []
    positional: list[str] = []
    index = 0
    while index < len(words):
        word = words[index]
        index += 1
        if not word.startswith("-") or word == "-":
            if not _ASSIGNMENT.match(word) or positional:
                positional.append(word)
            continue
        written, equals, value = word.partition("=")
        name = canonical(written)
        if equals:
            flags.append(Flag(name, (value,), word))
            continue
        values: list[str] = []
        while index < len(words) and not words[index].startswith("-") and not _stands_alone(name):
            values.append(words[index])
            index += 1
        flags.append(Flag(name, tuple(values), " ".join((word, *values))))
        if len(values) > 1 and not positional and name not in _LISTS:
            # `--dtype auto MODEL`: only the first word is the flag's.
            flags[-1] = Flag(name, tuple(values[:1]), f"{word} {values[0]}")
            positional += values[1:]
    return flags, positional


_LISTS = frozenset(
    {
        *("--served-model-name", "--allowed-media-domains", "--middleware", "--lora-modules", "--api-key"),
        *("--allowed-origins", "--allowed-methods", "--allowed-headers", "--logits-processors"),
    }
)


@functools.cache
def _known() -> frozenset[str]:
    flags = catalogue.flags()
    risky, dangerous = catalogue.risky_flags(), catalogue.dangers()[0]
    return frozenset({*flags.owned, *flags.allowed, *risky, *dangerous, *_LISTS, *_OTHER_FLAGS})


@functools.cache
def canonical(written: str) -> str:
    """The full name of a flag: short form, underscores, JSON key and unambiguous prefix resolved."""
    if not written.startswith("--"):
        return catalogue.flags().short.get(written, written)
    name = written.partition(".")[0].replace("_", "-").rstrip("+")
    if name in _known():
        return name
    negated = name.startswith("--no-")
    bare = f"--{name[5:]}" if negated else name
    matches = sorted(one for one in _known() if one.startswith(bare))
    if bare not in _known() and len(matches) == 1:
        bare = matches[0]
    return f"--no-{bare[2:]}" if negated else bare


def _stands_alone(name: str) -> bool:
    return name in _ALONE_TOO or _ALONE.match(name) is not None


def last_values(flags: Iterable[Flag]) -> dict[str, Flag]:
    """The flag that wins, by name."""
    return {flag.name: flag for flag in flags}
