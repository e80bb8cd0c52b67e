"""``spec.engine.args``: every spelling that vLLM's parser takes is understood, judged, and written anew.

vLLM's parser (vllm/utils/argparse_utils.py, 0.11 to 0.33) takes unambiguous prefixes, underscores, short forms,
``--flag value`` and ``--flag=value``, repeated flags of which the last wins, and JSON by dotted keys. It moves dotted
keys *behind all other arguments*: a user's ``--kv-transfer-config.kv_connector`` would win over any flag of the
operator. So no spelling of the user reaches vLLM: flags are read here, exact names of the allowlist only, and
``canonical`` writes each once as ``--flag=value``, with dotted keys folded into one JSON value.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from securevllm import catalogue
from securevllm.api.guard import values
from securevllm.api.guard.values import Refused
from securevllm.errors import Problem

REASON = "ArgumentRefused"
_NEGATIVE = re.compile(r"-[0-9]+(\.[0-9]+)?")
"""What argparse takes for a value although it begins with "-"."""
_SHOWN = 120


@dataclass
class Argument:
    """One flag, whatever its spelling.

    Attributes:
        index: position of its first spelling.
        name: the exact name, ``--no-...`` included.
        setting: its row.
        texts: values, none for a switch.
        json: the value of a flag that takes JSON.
        whole: whether its JSON was given in one piece; dotted keys cannot be added to that.
    """

    index: int
    name: str
    setting: catalogue.Setting
    texts: list[str] = field(default_factory=list)
    json: dict[str, Any] | None = None
    whole: bool = False

    @property
    def field(self) -> str:
        """Path in the spec."""
        return _field(self.index)

    def spelled(self) -> list[str]:
        """The one spelling that is rendered."""
        if self.json is not None:
            return [f"{self.name}={values.write(self.json)}"]
        if self.setting.kind == "loras":
            return [self.name, *(values.write_lora(values.loras(text)) for text in self.texts)]
        return [f"{self.name}={text}" for text in self.texts] or [self.name]


def _field(index: int) -> str:
    return f"spec.engine.args[{index}]"


def settable() -> dict[str, catalogue.Setting]:
    """Flags that a user may set, in some version and perhaps with an accepted risk, with their negations."""
    flags = dict(catalogue.flags().allowed)
    for risk in catalogue.risks().values():
        flags |= risk.flags
    negations = {f"--no-{name[2:]}": setting for name, setting in flags.items() if setting.kind == "bool"}
    return flags | negations


class _Reader:
    """Reads arguments one after the other; what cannot be read becomes a problem, and the rest is read."""

    def __init__(self, args: Sequence[str]) -> None:
        self._args = args
        self._settable = settable()
        self._next = 0
        self.found: dict[str, Argument] = {}
        self.problems: list[Problem] = []
        self.unread: list[tuple[int, str]] = []

    def run(self) -> None:
        while self._next < len(self._args):
            index, arg = self._next, self._args[self._next]
            self._next += 1
            try:
                self._one(index, arg)
            except Refused as refused:
                self._refuse(index, refused.rule, refused.fix)
                if isinstance(refused, _Unknown) and "=" not in arg:
                    self._skip_values()

    def _refuse(self, index: int, rule: str, fix: str) -> None:
        self.problems.append(Problem(_field(index), REASON, rule, fix, self._args[index][:_SHOWN]))
        self.unread.append((index, self._args[index]))

    def _skip_values(self) -> None:
        """What follows an unknown flag may be its value: one problem is enough."""
        while self._next < len(self._args) and not self._args[self._next].startswith("-"):
            self.unread.append((self._next, self._args[self._next]))
            self._next += 1

    def _one(self, index: int, arg: str) -> None:
        if not arg.startswith("-"):
            raise Refused("a value without a flag before it", "Write --flag=value in one piece.")
        written, equals, value = arg.partition("=")
        head, dot, path = written.partition(".")
        name = self._resolve(head)
        setting = self._settable[name]
        if dot:
            self._dotted(index, name, setting, path, value if equals else None)
            return
        if name in self.found or _opposite(name) in self.found:
            # vLLM would take the last one; which of them was meant, only the user knows.
            self._take_values(setting, value if equals else None)
            raise Refused("a flag may stand only once", "Remove one of the two.")
        argument = Argument(index, name, setting, self._take_values(setting, value if equals else None))
        if setting.kind == "json":
            argument.json, argument.whole = values.parse(argument.texts[0]), True
        if setting.kind == "loras":
            for text in argument.texts:
                values.loras(text)
        self.found[name] = argument

    def _resolve(self, head: str) -> str:
        """The exact name of a flag; vLLM's parser reads "_" as "-"."""
        name = catalogue.flags().short.get(head, head)
        if name.startswith("--"):
            name = "--" + name[2:].replace("_", "-")
        if name in self._settable:
            return name
        raise _Unknown(*_why_not(name, self._settable))

    def _take_values(self, setting: catalogue.Setting, value: str | None) -> list[str]:
        """The values of a flag: after "=", or the arguments that follow."""
        if setting.kind in {"none", "bool"}:
            if value is not None:
                raise Refused("this flag takes no value", f"Write {setting.name} alone.")
            return []
        if value is not None:
            return [value]
        taken: list[str] = []
        while self._next < len(self._args) and (setting.kind == "loras" or not taken):
            following = self._args[self._next]
            if following.startswith("-") and not _NEGATIVE.fullmatch(following):
                break
            taken.append(following)
            self._next += 1
        if not taken:
            raise Refused(f"this flag needs a value of kind {setting.kind}", f"Write {setting.name}=....")
        return taken

    def _dotted(self, index: int, name: str, setting: catalogue.Setting, path: str, value: str | None) -> None:
        text = self._take_values(catalogue.Setting(name, "json"), value)[0]
        if setting.kind != "json":
            raise Refused("this flag takes no JSON, so it has no keys", f"Write {name} without a dot.")
        argument = self.found.setdefault(name, Argument(index, name, setting, json={}))
        if argument.whole or argument.json is None:
            raise Refused("a flag may stand only once", "Write all keys in one JSON value, or all of them with dots.")
        many = path.endswith("+")
        values.merge(argument.json, path.removesuffix("+").split("."), values.dotted(text, many=many))


class _Unknown(Refused):
    """No flag that a user may set; how many values it takes is not known."""


def _opposite(name: str) -> str:
    return f"--{name[5:]}" if name.startswith("--no-") else f"--no-{name[2:]}"


def _why_not(name: str, known: Mapping[str, catalogue.Setting]) -> tuple[str, str]:
    """Rule and way out for a name that nobody may pass."""
    flags, (dangers, _) = catalogue.flags(), catalogue.dangers()
    for positive in (name, f"--{name[5:]}" if name.startswith("--no-") else name):
        if positive in flags.owned:
            return "the operator sets this flag", f"Use instead: {flags.owned[positive]}."
        if positive in dangers:
            fix = "Write its lines as args." if positive == "--config" else "Leave it out."
            return f"this flag {dangers[positive].why}", fix
    if name.startswith("-O"):
        return "-O is another flag in vLLM 0.11 than later", "Write --optimization-level or --compilation-config."
    everything = {*known, *flags.owned, *dangers}
    completions = sorted(flag for flag in everything if flag.startswith(name)) if len(name) > len("--") else []
    rule = "only exact names of the allowlist may be passed: a flag can open what the operator closed"
    if completions:
        rule = f"{rule}, and vLLM takes a prefix for the whole name"
        if allowed := [flag for flag in completions if flag in known]:
            return rule, f"Write the full name: {', '.join(allowed)}."
        return rule, f"Leave it out: it stands for {', '.join(completions)}, which args may not set either."
    close = difflib.get_close_matches(name.lower(), known, n=3, cutoff=0.75)
    return rule, f"Did you mean {' or '.join(close)}?" if close else "docs/guard.md lists what may be set."


def read(args: Sequence[str]) -> tuple[tuple[Argument, ...], tuple[Problem, ...]]:
    """All flags, in the order in which they were first written, and what could not be read."""
    reader = _Reader(args)
    reader.run()
    return tuple(reader.found.values()), tuple(reader.problems)


def canonical(args: Sequence[str]) -> list[str]:
    """What vLLM gets: every flag once, as ``--flag=value``.

    What cannot be read stays as it is: only a spec that an earlier release accepted still holds such a thing.
    """
    reader = _Reader(args)
    reader.run()
    spelled = [(argument.index, argument.spelled()) for argument in reader.found.values()]
    spelled += [(index, [arg]) for index, arg in reader.unread]
    return [text for _, texts in sorted(spelled) for text in texts]


def names(args: Sequence[str]) -> frozenset[str]:
    """Exact names of the flags that are set; a switch that is turned off is not."""
    return frozenset(argument.name for argument in read(args)[0])


def check(
    args: Sequence[str], version: catalogue.Version, *, mounts: tuple[str, ...], accepted: Iterable[str]
) -> Iterator[Problem]:
    """What is wrong with ``spec.engine.args``.

    Args:
        args: as the user wrote them.
        version: of vLLM.
        mounts: folders of ``spec.engine.volumes``.
        accepted: names of accepted risks.
    """
    found, problems = read(args)
    yield from problems
    risky, taken = catalogue.risky_flags(), set(accepted)
    for argument in found:
        setting = argument.setting
        shown = args[argument.index][:_SHOWN]
        if version not in setting.versions:
            since, until = setting.versions.since, setting.versions.until
            told = f"vLLM {since} and newer" if since is not None and version < since else f"vLLM before {until}"
            yield Problem(argument.field, REASON, f"only {told} has this flag", f"vLLM {version}: leave it out.", shown)
        risk = risky.get(setting.name)
        if risk is not None and risk.name not in taken and argument.name == setting.name:
            yield Problem(
                argument.field,
                REASON,
                f"this flag is a risk: {risk.why}",
                f"Leave it out, or accept it in words: security: {{accept: [{{risk: {risk.name}, why: ...}}]}}.",
                shown,
            )
        yield from _check_value(argument, mounts, shown)


def _check_value(argument: Argument, mounts: tuple[str, ...], shown: str) -> Iterator[Problem]:
    setting = argument.setting
    if argument.json is not None:
        keys = catalogue.flags().json[setting.name]
        for path, refused in values.check_json(keys, argument.json, mounts):
            yield Problem(argument.field, REASON, f"key {path[:_SHOWN]}: {refused.rule}", refused.fix, shown)
        return
    for text in argument.texts:
        try:
            if setting.kind == "loras":
                values.check_lora(values.loras(text), mounts)
            else:
                values.check(setting, text, mounts)
        except Refused as refused:
            yield Problem(argument.field, REASON, refused.rule, refused.fix, shown)
