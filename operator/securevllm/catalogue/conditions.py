"""Reads the ``when`` of a route: whether a server of some version, started in some way, registers it.

The words are those of ``data/routes.toml``: ``--flag``, ``no --flag``, ``VARIABLE=1``, ``task NAME``, ``scoring`` and
``any pooling task``; ``and`` and ``with`` bind closer than ``or``, and that closer than ``, with``. Then may follow
``, otherwise 403`` and what held in older versions: ``; before 0.30 without them``. The answer has three values,
because a command line often does not say which tasks a model has.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from securevllm.catalogue import Version

POOLING = frozenset({"embed", "token_embed", "classify", "token_classify", "score", "reward"})
_SCORING = frozenset({"embed", "token_embed", "classify", "score"})
_OLDER = re.compile(r"; before (?P<version>[0-9.]+) (?P<then>.+)")
_WITHOUT = frozenset({"without it", "without them"})
_TERM = re.compile(
    r"(?P<no>no )?(?P<flag>--[a-z0-9-]+)|(?P<variable>[A-Z][A-Z0-9_]+)(=1)?|task (?P<task>[a-z_]+)|(?P<scoring>scoring)"
    r"|(?P<pooling>any pooling task)|(?P<package>the [a-z]+ package)"
)


@dataclass(frozen=True)
class Started:
    """How a server was started, as far as it is known.

    Attributes:
        flags: names as ``--name``; True: given, and not given as off.
        variables: names; True: set to something that is not off.
        tasks: what the model can do; None: nobody knows.
        complete: nothing else was given. False: a flag or variable that is not listed may be set all the same.
    """

    flags: Mapping[str, bool] = field(default_factory=dict)
    variables: Mapping[str, bool] = field(default_factory=dict)
    tasks: frozenset[str] | None = None
    complete: bool = True


def holds(when: str, version: Version, started: Started) -> bool | None:
    """Whether the condition holds; None: it depends on what is not known.

    Raises:
        ValueError: a condition that is not written in the words above.
    """
    now, older = _read(when)
    for limit, then in older:
        if (version.major, version.minor, version.patch) < limit:
            return _all(then, started)
    return _all(now, started)


_Alternatives = tuple[tuple[str, ...], ...]
_Condition = tuple[_Alternatives, ...]


@functools.cache
def _read(when: str) -> tuple[_Condition, tuple[tuple[tuple[int, ...], _Condition], ...]]:
    """The condition of today, and those of versions before a limit, oldest first."""
    older = []
    while match := _OLDER.search(when):
        then = "" if match["then"] in _WITHOUT else match["then"]
        limit = tuple(map(int, match["version"].split(".")))
        older.append(((*limit, 0, 0)[:3], _condition(then)))
        when = when[: match.start()]
    return _condition(when.removesuffix(", otherwise 403")), tuple(sorted(older))


def _condition(text: str) -> _Condition:
    parts = [part for part in text.split(", with ") if part]
    found = tuple(tuple(tuple(re.split(r" and | with ", one)) for one in part.split(" or ")) for part in parts)
    for term in (term for part in found for one in part for term in one):
        if _TERM.fullmatch(term) is None:
            raise ValueError(f"{term!r} is not a condition that conditions.py can read")
    return found


def _all(condition: _Condition, started: Started) -> bool | None:
    return _and(_or(_and(_term(term, started) for term in one) for one in part) for part in condition)


def _and(values: Iterable[bool | None]) -> bool | None:
    found = list(values)
    return False if False in found else None if None in found else True


def _or(values: Iterable[bool | None]) -> bool | None:
    found = list(values)
    return True if True in found else None if None in found else False


def _term(term: str, started: Started) -> bool | None:
    match = _TERM.fullmatch(term)
    if match is None:
        raise ValueError(f"{term!r} is not a condition that conditions.py can read")
    unsaid = False if started.complete else None
    if match["flag"]:
        given = started.flags.get(match["flag"], unsaid)
        return given if given is None or not match["no"] else not given
    if match["variable"]:
        return started.variables.get(match["variable"], unsaid)
    if match["package"] or started.tasks is None:
        return None
    if match["task"]:
        return match["task"] in started.tasks
    return bool(started.tasks & (POOLING if match["pooling"] else _SCORING))
