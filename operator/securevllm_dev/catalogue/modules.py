"""Names of a source tree: which module, class, function or constant an expression means, without running anything.

A name with several bindings (branches, try/except) means all of them. What cannot be followed is `None` or nothing at
all, and the caller reports it: this module never guesses.
"""

from __future__ import annotations

import ast
import itertools
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from securevllm_dev.catalogue.source import Source

Function = ast.FunctionDef | ast.AsyncFunctionDef
_SCOPES = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda, ast.ClassDef, ast.Module)
_MUTATORS = {"append", "extend", "insert", "update", "add", "pop", "remove", "clear", "setdefault", "discard"}
_DEPTH = 12
"""How many names are followed one after the other; deeper is unreadable."""


@dataclass(frozen=True)
class Binding:
    """One way in which a name gets its value: `node` in the scope's module; `how` says which part of it."""

    how: str  # import | value | each | part | definition | parameter | other
    node: ast.AST
    target: str = ""
    index: int = -1


@dataclass
class Module:
    """A parsed file: its nodes, their parents, and the bindings of every scope.

    Bodies of functions are left out until `complete`: most modules are only asked for their names.
    """

    path: str
    name: str
    tree: ast.Module
    parents: dict[ast.AST, ast.AST] = field(default_factory=dict)
    bindings: dict[ast.AST, dict[str, list[Binding]]] = field(default_factory=lambda: defaultdict(dict))
    stars: list[str] = field(default_factory=list)
    mutated: set[str] = field(default_factory=set)
    nodes: list[ast.AST] = field(default_factory=list)
    on_self: dict[tuple[ast.AST, str], list[ast.expr]] = field(default_factory=lambda: defaultdict(list))
    is_complete: bool = False

    def complete(self) -> None:
        """Read the bodies of functions too."""
        if not self.is_complete:
            self.is_complete = True
            _Binder(self).visit_all()

    def where(self, node: ast.AST) -> str:
        """File and line."""
        return f"{self.path}:{getattr(node, 'lineno', 1)}"

    def scope(self, node: ast.AST) -> ast.AST:
        """The innermost scope whose names `node` sees; decorators and defaults belong to the outer one."""
        child = node
        while child in self.parents:
            parent = self.parents[child]
            if isinstance(parent, _SCOPES) and not _outside(parent, child):
                return parent
            child = parent
        return self.tree

    def class_of(self, node: ast.AST) -> ast.ClassDef | None:
        """The innermost class that `node` is inside of."""
        scope = self.scope(node)
        while not isinstance(scope, ast.ClassDef):
            if scope is self.tree:
                return None
            scope = self.scope(scope)
        return scope


@dataclass(frozen=True)
class Place:
    """A definition that a name leads to: in the tree (`node`), or outside of it (a dotted name only)."""

    dotted: str
    module: Module | None = None
    node: ast.AST | None = None


def _outside(scope: ast.AST, child: ast.AST) -> bool:
    if isinstance(scope, Function):
        return child in scope.decorator_list or child is scope.returns or child in scope.args.defaults
    return isinstance(scope, ast.ClassDef) and (child in scope.decorator_list or child in scope.bases)


class Tree:
    """All modules of a source, parsed when they are asked for."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self._paths = {_dotted(path): path for path in source.files}
        self._modules: dict[str, Module | None] = {}
        # Answers are kept. One that is still being worked out counts as nothing: names that mean each other.
        self._places: dict[ast.AST, list[Place]] = {}
        self._dotted: dict[str, list[Place]] = {}

    def module(self, dotted: str) -> Module | None:
        """The module of this name; None when the tree has none, or when it does not parse (then a problem is noted)."""
        if dotted not in self._modules:
            path = self._paths.get(dotted)
            self._modules[dotted] = None if path is None else self._parse(path, dotted)
        return self._modules[dotted]

    def loaded(self) -> list[Module]:
        """What was parsed so far."""
        return [module for module in self._modules.values() if module is not None]

    def by_path(self, path: str) -> Module | None:
        """The module of this file."""
        return self.module(_dotted(path))

    def _parse(self, path: str, dotted: str) -> Module | None:
        try:
            tree = ast.parse(self.source.files[path], path)
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            line = getattr(error, "lineno", None) or 1
            self.source.problems.append(f"{path}:{line}: not Python: {getattr(error, 'msg', None) or error}")
            return None
        module = Module(path, dotted, tree)
        _Binder(module).visit_all()
        return module

    # ------------------------------------------------------------------------------------------ where a name leads

    def bindings(self, module: Module, node: ast.AST, name: str) -> list[Binding]:
        """Bindings of a name as `node` sees it; of the innermost scope that has one."""
        scope: ast.AST = module.scope(node)
        first = scope
        while True:
            if (scope is first or not isinstance(scope, ast.ClassDef)) and name in module.bindings[scope]:
                return module.bindings[scope][name]
            if scope is module.tree:
                return []
            scope = module.scope(scope)

    def places(self, module: Module, expr: ast.AST) -> list[Place]:
        """Definitions (functions, classes, modules, assigned values) that a name or attribute leads to."""
        if not isinstance(expr, ast.Name | ast.Attribute):
            return []
        if expr not in self._places:
            self._places[expr] = []
            if isinstance(expr, ast.Name):
                found = list(self._of_name(module, expr))
            else:
                bases = self.places(module, expr.value)
                found = [place for base in bases for place in self._member(base, expr.attr)]
            self._places[expr] = found
        return self._places[expr]

    def _of_name(self, module: Module, expr: ast.Name) -> Iterator[Place]:
        bound = self.bindings(module, expr, expr.id)
        for binding in bound:
            yield from self._bound(module, f"{module.name}.{expr.id}", binding)
        if not bound:
            for star in module.stars:
                yield from self.dotted(f"{star}.{expr.id}")

    def _bound(self, module: Module, name: str, binding: Binding) -> list[Place]:
        if binding.how == "import":
            return self.dotted(binding.target)
        if binding.how == "value" and isinstance(binding.node, ast.Name | ast.Attribute):
            return self.places(module, binding.node) or [Place(name, module, binding.node)]
        return [Place(name, module, binding.node)] if binding.how in {"definition", "value"} else []

    def _member(self, base: Place, name: str) -> Iterator[Place]:
        if isinstance(base.node, ast.ClassDef) and base.module is not None:
            for binding in base.module.bindings[base.node].get(name, ()):
                yield Place(f"{base.dotted}.{name}", base.module, binding.node)
        elif base.node is None or isinstance(base.node, ast.Module):
            yield from self.dotted(f"{base.dotted}.{name}")

    def dotted(self, name: str) -> list[Place]:
        """What a dotted name means: a module, or something that a module binds."""
        if name not in self._dotted:
            self._dotted[name] = []
            self._dotted[name] = list(self._of_dotted(name))
        return self._dotted[name]

    def _of_dotted(self, name: str) -> Iterator[Place]:
        head, _, last = name.rpartition(".")
        owner = self.module(head) if head else None
        whole = self.module(name)
        if owner is not None:
            for binding in owner.bindings[owner.tree].get(last, ()):
                if binding.target != name:  # a package that imports its own submodule
                    yield from self._bound(owner, name, binding)
            if last not in owner.bindings[owner.tree] and whole is None:
                for star in owner.stars:
                    yield from self.dotted(f"{star}.{last}")
        if whole is not None:
            yield Place(name, whole, whole.tree)
        elif owner is None:
            yield Place(name)

    def external(self, module: Module, expr: ast.AST) -> set[str]:
        """Dotted names outside the tree that an expression leads to, such as ``fastapi.FastAPI``."""
        return {place.dotted for place in self.places(module, expr) if place.node is None}

    # --------------------------------------------------------------------------------------------- constant strings

    def strings(self, module: Module, expr: ast.AST | None, depth: int = _DEPTH) -> set[str] | None:  # noqa: PLR0911
        """Every string that an expression can be; None when that cannot be read."""
        if expr is None or depth == 0:
            return None
        match expr:
            case ast.Constant(value=str() as text):
                return {text}
            case ast.JoinedStr(values=parts):
                return self._joined(module, parts, depth)
            case ast.FormattedValue(value=value, conversion=-1, format_spec=None):
                return self.strings(module, value, depth - 1)
            case ast.BinOp(left=left, op=ast.Add(), right=right):
                return self._joined(module, [left, right], depth)
            case ast.IfExp(body=body, orelse=orelse):
                return _union(self.strings(module, part, depth - 1) for part in (body, orelse))
            case ast.NamedExpr(value=value):
                return self.strings(module, value, depth - 1)
            case ast.Name():
                return self._named(module, expr, depth)
            case ast.Attribute():
                return self._through(module, expr, depth)
        return None

    def _joined(self, module: Module, parts: list[ast.expr], depth: int) -> set[str] | None:
        choices = [self.strings(module, part, depth - 1) for part in parts]
        if any(choice is None for choice in choices):
            return None
        return {"".join(chosen) for chosen in itertools.product(*(choice or set() for choice in choices))}

    def _named(self, module: Module, expr: ast.Name, depth: int) -> set[str] | None:
        bound = self.bindings(module, expr, expr.id)
        if not bound:
            return self._through(module, expr, depth)
        return _union(self._value(module, binding, depth) for binding in bound)

    def _value(self, module: Module, binding: Binding, depth: int) -> set[str] | None:
        if binding.how == "value":
            return self.strings(module, binding.node, depth - 1)
        if binding.how == "import":
            return _union(self._of_place(place, depth) for place in self.dotted(binding.target))
        if binding.how == "each":
            items = self.elements(module, binding.node, depth - 1)
            return None if items is None else _union(self._part(module, item, binding, depth) for item in items)
        return None

    def _part(self, module: Module, item: ast.expr, binding: Binding, depth: int) -> set[str] | None:
        if binding.index < 0:
            return self.strings(module, item, depth - 1)
        if isinstance(item, ast.Tuple | ast.List) and binding.index < len(item.elts):
            return self.strings(module, item.elts[binding.index], depth - 1)
        return None

    def _through(self, module: Module, expr: ast.AST, depth: int) -> set[str] | None:
        found = [place for place in self.places(module, expr) if place.node is not None]
        return _union(self._of_place(place, depth) for place in found) if found else None

    def _of_place(self, place: Place, depth: int) -> set[str] | None:
        if place.module is None or not isinstance(place.node, ast.expr):
            return None
        return self.strings(place.module, place.node, depth - 1)

    def elements(self, module: Module, expr: ast.AST, depth: int = _DEPTH) -> list[ast.expr] | None:
        """Items of a literal sequence, or of a name that is bound to one and never changed in its module."""
        match expr:
            case ast.List(elts=items) | ast.Tuple(elts=items) | ast.Set(elts=items):
                return None if any(isinstance(item, ast.Starred) for item in items) else items
            case ast.Dict(keys=keys) if None not in keys:
                return [key for key in keys if key is not None]
            case ast.Call(func=ast.Attribute(value=ast.Name() as name, attr="items"), args=[]) if depth:
                return self._pairs(module, name)
            case ast.Name(id=name) if depth and name not in module.mutated:
                bound = self.bindings(module, expr, name)
                if len(bound) == 1 and bound[0].how == "value":
                    return self.elements(module, bound[0].node, depth - 1)
        return None

    def _pairs(self, module: Module, name: ast.Name) -> list[ast.expr] | None:
        bound = self.bindings(module, name, name.id)
        if len(bound) != 1 or name.id in module.mutated or not isinstance(bound[0].node, ast.Dict):
            return None
        literal = bound[0].node
        pairs = zip(literal.keys, literal.values, strict=True)
        return None if None in literal.keys else [ast.Tuple([key, value]) for key, value in pairs if key is not None]


def _union(sets: Iterator[set[str] | None]) -> set[str] | None:
    found: set[str] = set()
    for one in sets:
        if one is None:
            return None
        found |= one
    return found or None


def _dotted(path: str) -> str:
    return path.removesuffix(".py").removesuffix("/__init__").removeprefix("src/").replace("/", ".")


class _Binder:
    """Fills a module's parents, bindings, star imports and names of changed containers, in one walk."""

    def __init__(self, module: Module) -> None:
        self.module = module
        self.package = module.name if module.path.endswith("/__init__.py") else module.name.rpartition(".")[0]
        self.globals: set[tuple[ast.AST, str]] = set()

    def visit_all(self) -> None:
        module = self.module
        for container in (module.parents, module.bindings, module.stars, module.mutated, module.on_self):
            container.clear()
        module.nodes = [module.tree]
        for node in module.nodes:  # grows
            if module.is_complete or not isinstance(node, Function | ast.Lambda):
                for child in ast.iter_child_nodes(node):
                    module.parents[child] = node
                    module.nodes.append(child)
        self.globals = {
            (module.scope(node), name) for node in module.nodes if isinstance(node, ast.Global) for name in node.names
        }
        for node in module.nodes:
            self._visit(node)

    def _visit(self, node: ast.AST) -> None:  # noqa: C901, PLR0912 - one case per kind of binding
        match node:
            case ast.Import(names=names):
                for alias in names:
                    dotted = alias.name if alias.asname else alias.name.partition(".")[0]
                    self._bind(node, alias.asname or dotted, Binding("import", node, dotted))
            case ast.ImportFrom(names=names):
                base = self._base(node)
                for alias in names:
                    if alias.name == "*":
                        self.module.stars.append(base)
                    else:
                        dotted = f"{base}.{alias.name}".strip(".")
                        self._bind(node, alias.asname or alias.name, Binding("import", node, dotted))
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                self._bind(node, node.name, Binding("definition", node))
            case ast.Assign(targets=targets, value=value):
                for one in targets:
                    self._target(node, one, Binding("value", value))
            case ast.AnnAssign(target=target, value=ast.expr() as value):
                self._target(node, target, Binding("value", value))
            case ast.NamedExpr(target=name_node, value=value):
                self._target(node, name_node, Binding("value", value))
            case ast.AugAssign(target=changed):
                self._target(node, changed, Binding("other", node))
                self._change(changed)
            case ast.For(target=target, iter=items) | ast.AsyncFor(target=target, iter=items):
                self._target(node, target, Binding("each", items))
            case ast.comprehension(target=target, iter=items):
                self._target(node, target, Binding("each", items))
            case ast.withitem(context_expr=value, optional_vars=ast.expr() as target):
                self._target(node, target, Binding("value", value))
            case ast.arg(arg=name):
                self._bind(node, name, Binding("parameter", node))
            case ast.Call(func=ast.Attribute(value=base, attr=attr)) if attr in _MUTATORS:
                self._change(base)
            case ast.Subscript(value=base, ctx=ast.Store() | ast.Del()):
                self._change(base)

    def _base(self, node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module or ""
        package = self.package.split(".")
        kept = package[: len(package) - node.level + 1]
        return ".".join([*kept, *([node.module] if node.module else [])])

    def _target(self, node: ast.AST, target: ast.expr, binding: Binding) -> None:
        if isinstance(target, ast.Name):
            self._bind(node, target.id, binding)
        elif isinstance(target, ast.Attribute) and isinstance(target.value, ast.Name) and target.value.id == "self":
            self._on_self(node, target.attr, binding)
        elif isinstance(target, ast.Tuple | ast.List):
            for index, part in enumerate(target.elts):
                if isinstance(part, ast.Name):
                    self._bind(node, part.id, self._split(binding, index, len(target.elts)))

    def _on_self(self, node: ast.AST, name: str, binding: Binding) -> None:
        owner = self.module.class_of(node)
        if owner is not None and binding.how == "value" and isinstance(binding.node, ast.expr):
            self.module.on_self[owner, name].append(binding.node)

    def _split(self, binding: Binding, index: int, size: int) -> Binding:
        if binding.how == "each":
            return Binding("each", binding.node, index=index)
        if isinstance(binding.node, ast.Tuple | ast.List) and len(binding.node.elts) == size:
            return Binding("value", binding.node.elts[index])
        return Binding("other", binding.node)

    def _bind(self, node: ast.AST, name: str, binding: Binding) -> None:
        scope = self.module.scope(node)
        if (scope, name) in self.globals:
            scope = self.module.tree
        self.module.bindings[scope].setdefault(name, []).append(binding)

    def _change(self, base: ast.expr) -> None:
        if isinstance(base, ast.Name):
            self.module.mutated.add(base.id)
