"""Command-line flags of `vllm serve`, environment variables, key-guarded prefixes and default ports of a source tree.

Flags: `add_argument` calls of vllm/engine/arg_utils.py and of every cli_args.py below vllm/entrypoints/, and the fields
of dataclasses whose flags are added in a loop. Other commands (`vllm bench`, `vllm run-batch`) are not read.
Variables: the table of vllm/envs.py. Ports: numbers bound to a name with the word "port" in it, outside of model code.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from securevllm_dev.catalogue.findings import Flag, Port, Unreadable, Variable

if TYPE_CHECKING:
    from securevllm_dev.catalogue.modules import Module, Tree

_ENGINE_ARGS = "vllm/engine/arg_utils.py"
_ENVS = "vllm/envs.py"
_PORT = re.compile(
    r"""^[^#\n]*?\b(?P<name>(?:\w*_)?ports?(?:_\w*)?)["']?\s*(?::[^=\n,]{1,60})?[=:,]\s*(?:\w+\(\s*default\s*=\s*)?(?P<number>\d{4,5})\b"""
    r"""|(?P<endpoint>tcp://[^\s"':]*):(?P<endport>\d{4,5})\b""",
    re.IGNORECASE | re.MULTILINE,
)
_PORT_FOLDERS = ("vllm/config/", "vllm/engine/", "vllm/entrypoints/", "vllm/distributed/", "vllm/v1/",
                 "vllm/platforms/", "vllm/utils/", "vllm/envs.py", "vllm/utils.py", "vllm/config.py")  # fmt: skip
_SHOWN = 60


@dataclass
class Settings:
    """Results of one run, unsorted."""

    flags: list[Flag] = field(default_factory=list)
    environment: list[Variable] = field(default_factory=list)
    guarded: set[str] = field(default_factory=set)
    ports: set[Port] = field(default_factory=set)
    unreadable: list[Unreadable] = field(default_factory=list)


def settings(tree: Tree) -> Settings:
    """Read all of them."""
    found = Settings()
    for path in sorted(tree.source.files):
        is_parser = path == _ENGINE_ARGS or (path.startswith("vllm/entrypoints/") and path.endswith("/cli_args.py"))
        if is_parser and (module := tree.by_path(path)) is not None:
            module.complete()
            _Flags(tree, module, found).run()
    if (envs := tree.by_path(_ENVS)) is not None:
        envs.complete()
        _environment(envs, found)
    found.ports.update(_ports(tree))
    for path, data in tree.source.files.items():
        if (
            b"AuthenticationMiddleware" in data
            and b"startswith(" in data
            and (module := tree.by_path(path)) is not None
        ):
            module.complete()
            found.guarded.update(_guarded(tree, module, found))
    return found


class _Flags:
    """The flags that one module adds to a parser."""

    def __init__(self, tree: Tree, module: Module, found: Settings) -> None:
        self.tree = tree
        self.module = module
        self.found = found

    def run(self) -> None:
        for node in self.module.nodes:
            match node:
                case ast.Call(func=ast.Attribute(attr="add_argument")):
                    self._call(node)

    def _call(self, node: ast.Call) -> None:
        options = [argument for argument in node.args if not isinstance(argument, ast.Starred)]
        texts = [self.tree.strings(self.module, argument) for argument in options]
        names = sorted({text for one in texts for text in one or () if text.startswith("--")})
        positional = any(text and not text.startswith("-") for one in texts for text in one or ())
        if names:
            kind, default = self._described(node)
            short = next((t for one in texts for t in one or () if t.startswith("-") and not t.startswith("--")), "")
            self._add(names, node, kind, default, short)
        elif not positional:
            fields = self._looped(node)
            if fields is None:
                self._unreadable(node)
            for name, kind, default in fields or ():
                self._add(["--" + name.replace("_", "-")], node, kind, default)

    def _add(self, names: Iterable[str], node: ast.AST, kind: str, default: str, short: str = "") -> None:
        for name in names:
            self.found.flags.append(Flag(name, self.module.where(node), kind, default, short))
            if _is_boolean(kind) and not name.startswith("--no-"):
                self.found.flags.append(Flag("--no-" + name[2:], self.module.where(node), kind, default))

    def _described(self, node: ast.Call) -> tuple[str, str]:
        """(type, default) of keywords, or of the configuration field whose description is unpacked."""
        given = {item.arg: item.value for item in node.keywords}
        described = given.pop(None, None)
        if isinstance(described, ast.Dict):  # **{**table["field"], "default": None}
            pairs = list(zip(described.keys, described.values, strict=True))
            given |= {str(key.value): value for key, value in pairs if isinstance(key, ast.Constant)}
            described = next((value for key, value in pairs if key is None), None)
        match described:
            case ast.Subscript(value=ast.Name() as table, slice=ast.Constant(value=str() as name)):
                for found, kind, default in self._fields_of_table(table):
                    if found == name:
                        return kind, _short(given["default"]) if "default" in given else default
        action = given.get("action")
        kind = ast.unparse(given["type"]) if "type" in given else ""
        if isinstance(action, ast.Constant) and str(action.value).startswith("store_"):
            kind = "flag"
        elif action is not None and ast.unparse(action).endswith("BooleanOptionalAction"):
            kind = "bool"
        return kind, _short(given.get("default"))

    def _looped(self, node: ast.Call) -> list[tuple[str, str, str]] | None:
        """Fields behind ``for key, value in get_kwargs(cls).items(): add_argument(f"--{key...}", **value)``."""
        loop: ast.AST | None = node
        while loop is not None and not isinstance(loop, ast.For):
            loop = self.module.parents.get(loop)
        match loop:
            case ast.For(iter=ast.Call(func=ast.Attribute(value=ast.Name() as table, attr="items"))):
                return self._fields_of_table(table) or None
        return None

    def _fields_of_table(self, table: ast.Name) -> list[tuple[str, str, str]]:
        """Fields of the class that a table made by ``get_kwargs(Class)`` describes."""
        for binding in self.tree.bindings(self.module, table, table.id):
            match binding.node:
                case ast.Call(func=ast.Name(id="get_kwargs"), args=[owner, *_]):
                    if isinstance(owner, ast.Name) and owner.id == "cls":
                        inner = self.module.class_of(table)
                        return [] if inner is None else self._derived(inner)
                    for place in self.tree.places(self.module, owner):
                        if isinstance(place.node, ast.ClassDef) and place.module is not None:
                            return list(_fields(self.tree, place.module, place.node))
        return []

    def _derived(self, owner: ast.ClassDef) -> list[tuple[str, str, str]]:
        """Fields for ``get_kwargs(cls)``: of the class, and of those of this module that are derived from it."""
        derived = [
            node
            for node in self.module.nodes
            if isinstance(node, ast.ClassDef) and owner.name in {ast.unparse(base) for base in node.bases}
        ]
        found = {field: field for one in (owner, *derived) for field in _fields(self.tree, self.module, one)}
        return list(found)

    def _unreadable(self, node: ast.AST) -> None:
        code = " ".join(ast.unparse(node).split())[:160]
        self.found.unreadable.append(Unreadable(self.module.where(node), "flag by name", code))


def _is_boolean(kind: str) -> bool:
    """Tell whether there is a ``--no-`` form: `get_kwargs` of vLLM gives one to each type with bool in its union."""
    return "bool" in {part.strip() for part in re.split(r"[|\[\],]", kind)} and not kind.startswith(("dict", "list"))


def _fields(tree: Tree, module: Module, owner: ast.ClassDef, depth: int = 5) -> Iterator[tuple[str, str, str]]:
    """(name, type, default) of a dataclass's fields, inherited ones first."""
    for base in owner.bases if depth else ():
        for place in tree.places(module, base):
            if isinstance(place.node, ast.ClassDef) and place.module is not None:
                yield from _fields(tree, place.module, place.node, depth - 1)
    for item in owner.body:
        match item:
            case ast.AnnAssign(target=ast.Name(id=name), annotation=annotation, value=value):
                kind = ast.unparse(annotation)
                if not kind.startswith(("ClassVar", "InitVar")):
                    yield name, kind, _default(value)


def _default(value: ast.expr | None) -> str:
    match value:
        case ast.Call(keywords=keywords) if (name := ast.unparse(value.func)) in {"field", "Field"}:
            given = {item.arg: item.value for item in keywords}
            if name == "Field" and value.args:
                return _short(value.args[0])
            return _short(given.get("default", given.get("default_factory")))
    return _short(value)


def _short(value: ast.AST | None) -> str:
    return "" if value is None else " ".join(ast.unparse(value).split())[:_SHOWN]


def _environment(module: Module, found: Settings) -> None:
    declared = {
        node.target.id: (ast.unparse(node.annotation), _short(node.value))
        for node in module.nodes
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }
    for node in module.nodes:
        match node:
            case ast.AnnAssign(target=ast.Name(id="environment_variables"), value=ast.Dict(keys=keys, values=values)):
                for key, value in zip(keys, values, strict=True):
                    if isinstance(key, ast.Constant) and isinstance(key.value, str):
                        kind, default = declared.get(key.value, ("", ""))
                        found.environment.append(Variable(key.value, module.where(key), kind, default))
                    else:
                        found.unreadable.append(Unreadable(module.where(value), "variable by name", _short(value)))
            case (
                ast.Call(func=ast.Attribute(value=ast.Name(id="environment_variables"), attr="update" | "setdefault"))
                | ast.Subscript(value=ast.Name(id="environment_variables"), ctx=ast.Store())
            ):
                found.unreadable.append(Unreadable(module.where(node), "variable by name", _short(node)))


def _ports(tree: Tree) -> Iterator[Port]:
    for path, data in tree.source.files.items():
        if not path.startswith(_PORT_FOLDERS) or b"port" not in data.lower():
            continue
        text = data.decode("utf-8", "replace")
        for match in _PORT.finditer(text):
            number = int(match["number"] or match["endport"])
            line = text.count("\n", 0, match.end()) + 1
            if 1024 <= number <= 65535:  # noqa: PLR2004 - a TCP port that needs no root
                yield Port(number, match["name"] or match["endpoint"], f"{path}:{line}")


def _guarded(tree: Tree, module: Module, found: Settings) -> Iterator[str]:
    """What `AuthenticationMiddleware` compares a path with."""
    for node in module.nodes:
        match node:
            case ast.Call(func=ast.Attribute(attr="startswith"), args=[argument]):
                owner = module.class_of(node)
                if owner is None or owner.name != "AuthenticationMiddleware":
                    continue
                items = tree.elements(module, argument)
                texts = [tree.strings(module, item) for item in (items if items is not None else [argument])]
                if any(one is None for one in texts):
                    code = " ".join(ast.unparse(node).split())
                    found.unreadable.append(Unreadable(module.where(node), "guarded prefix", code))
                yield from (text for one in texts for text in one or ())
