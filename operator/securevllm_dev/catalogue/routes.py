"""Routes of a source tree, and every place that may add or answer one and cannot be read.

The rule of this module: whatever touches a router is either understood or reported. A router is a value that came from
a constructor of a web framework; it is followed through names, imports, parameters, attributes of `self` and returned
values. A member of a router that is not known to be harmless, a router in a container, a router handed to code outside
the tree, a class derived from a router's: unreadable.
"""

from __future__ import annotations

import ast
import itertools
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from securevllm_dev.catalogue.conditions import conditions
from securevllm_dev.catalogue.findings import API, MOUNT, WEBSOCKET, Route, Unreadable
from securevllm_dev.catalogue.modules import Function, Module, Place, Tree

_FRAMEWORKS = {"fastapi", "starlette", "aiohttp", "flask", "quart", "sanic", "litestar", "tornado"}
_ROUTER_CLASSES = {"FastAPI", "APIRouter", "Starlette", "Router", "Application", "RouteTableDef", "Flask", "Blueprint"}
_ROUTE_CLASSES = {"Route", "APIRoute", "WebSocketRoute", "APIWebSocketRoute", "Mount", "Host", "RouteDef"}
_TOKENS = (
    *(name.encode() for name in sorted(_FRAMEWORKS - {"aiohttp"})),
    b"aiohttp import web",
    b"aiohttp.web",
    b"http.server",
    b"socketserver",
    b"HTTPServer",
    b"start_http_server",
    b"start_server(",
    b"make_server",
    b"grpc.server",
    b"grpc.aio",
    b"websockets.serve",
)
"""A file with none of these makes no router; it is read only when one is handed to it."""

_VERBS = {"get", "post", "put", "delete", "patch", "head", "options", "trace"}
_WEBSOCKETS = {"websocket", "websocket_route", "add_websocket_route", "add_api_websocket_route"}
_LISTED = {"api_route": "GET", "add_api_route": "GET", "route": "*", "add_route": "*"}
"""Methods of these come from ``methods=``; the value is what they answer without it."""
_AIOHTTP = {f"add_{verb}": verb.upper() for verb in _VERBS}
_PLAIN = {"include_router", "mount"}
_CERTAIN = (_WEBSOCKETS | set(_LISTED) | _PLAIN | {"add_middleware"}) - {"route", "mount"}
"""Names that only routers have: reported also on a receiver that is not known to be one."""
_ADDS = _VERBS | _WEBSOCKETS | set(_LISTED) | set(_AIOHTTP) | _PLAIN
_MIDDLEWARE = {"middleware", "add_middleware", "user_middleware", "middleware_stack", "build_middleware_stack"}
_HARMLESS = {"state", "root_path", "title", "version", "description", "exception_handler", "add_exception_handler",
             "on_event", "add_event_handler", "openapi_url", "docs_url", "swagger_ui_oauth2_redirect_url",
             "url_path_for", "openapi", "extra", "lifespan_context", "exception_handlers"}  # fmt: skip
_SETTABLE = {"state", "root_path", "title", "version", "description"}
_CONSUMERS = {"uvicorn.Config", "uvicorn.run", "isinstance", "len", "id", "hasattr", "callable", "typing.cast", "cast"}
"""Code outside of the tree that takes an application and adds no route."""
_SERVERS = {"start_http_server", "start_server", "HTTPServer", "ThreadingHTTPServer", "make_server", "serve_forever",
            "add_insecure_port", "add_secure_port", "TCPServer", "ThreadingTCPServer"}  # fmt: skip
_BY_NAME = {"import_module", "run_path", "run_module"}
_HANDLERS = {"BaseHTTPRequestHandler", "SimpleHTTPRequestHandler", "RequestHandler"}
_FASTAPI_OWN = (("docs_url", "/docs"), ("redoc_url", "/redoc"), ("openapi_url", "/openapi.json"))
_OAUTH_REDIRECT = "/docs/oauth2-redirect"
_EXAMPLE_SERVER = "vllm/entrypoints/api_server.py"
"""Has a `build_app` of its own and is not what `vllm serve` runs (until 0.17)."""
_IMPORTED = rb"^[ \t]*(?:from|import)\b[^\n]*\b(?:%b)\b|^[ \t]+(?:%b)(?: as \w+)?,?[ \t]*$"
"""A name on a line that imports, or alone on a line, as in brackets after ``import``."""
_CODE = 160
_VALUES = (ast.Name, ast.Attribute, ast.Call, ast.IfExp, ast.BoolOp, ast.NamedExpr, ast.Await)
"""Expressions that can be a router."""


@dataclass(frozen=True)
class Router:
    """A router by the place where it comes from; a parameter stands for whatever callers pass."""

    kind: str  # application | router | parameter
    path: str
    line: int
    column: int
    name: str


@dataclass(frozen=True)
class _Edge:
    """A router is a part of `parent` (included, mounted, or passed as that parameter) below `prefix`."""

    parent: Router
    prefix: str
    when: tuple[str, ...]


@dataclass
class Scan:
    """One run over a tree; `routes` and `unreadable` are its results."""

    tree: Tree
    routes: set[Route] = field(default_factory=set)
    unreadable: set[Unreadable] = field(default_factory=set)
    _edges: dict[Router, set[_Edge]] = field(default_factory=lambda: defaultdict(set))
    _prefixes: dict[Router, set[str]] = field(default_factory=lambda: defaultdict(set))
    _found: list[tuple[Router | None, str, str, str, tuple[str, ...]]] = field(default_factory=list)
    _passed: set[tuple[str, ast.AST, str]] = field(default_factory=set)
    _modules: dict[str, Module] = field(default_factory=dict)
    _main: set[str] = field(default_factory=set)
    _known: dict[ast.AST, set[Router]] = field(default_factory=dict)

    def run(self) -> None:
        """Fill the results."""
        for path, data in self.tree.source.files.items():
            if any(token in data for token in _TOKENS):
                self._load(self.tree.by_path(path))
        self._follow_parameters()
        while self._load_importers():
            self._follow_parameters()
        for module in list(self._modules.values()):
            _ModuleScan(self, module).run()
        self._assemble()

    def _load(self, module: Module | None) -> bool:
        if module is None or module.path in self._modules:
            return False
        module.complete()
        self._modules[module.path] = module
        builds = any(isinstance(node, Function) and node.name == "build_app" for node in module.tree.body)
        if builds and module.path != _EXAMPLE_SERVER:
            self._main.add(module.path)
        return True

    def _load_importers(self) -> bool:
        """Read files that name a module with a router of its own: they can add routes without naming a framework."""
        makers = {module.name.rpartition(".")[2] for module in self._modules.values() if self._has_router(module)}
        names = sorted(name.encode() for name in makers)
        imported = re.compile(_IMPORTED % ((b"|".join(map(re.escape, names)),) * 2), re.MULTILINE)
        wanted = [
            path
            for path, data in self.tree.source.files.items()
            if path not in self._modules and any(name in data for name in names) and imported.search(data)
        ]
        before = len(self._modules)
        for path in wanted:
            self._load(self.tree.by_path(path))
        return len(self._modules) > before

    def _has_router(self, module: Module) -> bool:
        if any(isinstance(node, ast.Call) and self.router_class(module, node.func) for node in module.nodes):
            return True
        imported = [
            ast.Name(name)
            for name, bound in module.bindings[module.tree].items()
            if any(binding.how == "import" for binding in bound)
        ]
        for name in imported:
            module.parents[name] = module.tree
        starred = any(self.tree.module(star) in self._modules.values() for star in module.stars)
        return starred or any(self.routers(module, name) for name in imported)

    def _follow_parameters(self) -> None:
        """Mark parameters that get a router, until nothing new is found; modules of the callees are read too."""
        changed = True
        while changed:
            changed = False
            for module in list(self._modules.values()):
                for call in (node for node in module.nodes if isinstance(node, ast.Call)):
                    for place, name, routers in self._handed(module, call):
                        if place.module is not None and self._load(place.module):
                            changed = True
                        changed |= self._mark(module, call, place, name, routers)

    def _mark(self, module: Module, call: ast.Call, place: Place, name: str, routers: set[Router]) -> bool:
        if place.module is None or place.node is None:
            return False
        key = (place.module.path, place.node, name)
        parameter = _parameter(place.module, place.node, name)
        if parameter is None:
            return False
        when = conditions(self.tree, module, call)
        edges = {_Edge(router, "", when) for router in routers if router != parameter}
        new = key not in self._passed or not edges <= self._edges[parameter]
        self._passed.add(key)
        self._edges[parameter] |= edges
        if new:
            self._known.clear()
        return new

    def _handed(self, module: Module, call: ast.Call) -> Iterator[tuple[Place, str, set[Router]]]:
        """(function or class of the tree, parameter, routers) for every argument of a call that is a router."""
        given = [(index, "", argument) for index, argument in enumerate(call.args)]
        given += [(-1, item.arg or "", item.value) for item in call.keywords]
        for index, name, argument in given:
            routers = self.routers(module, argument)
            if not routers:
                continue
            for place in self.tree.places(module, call.func):
                function, skip = _callee(place)
                if function is not None:
                    names = [arg.arg for arg in (*function.args.posonlyargs, *function.args.args)][skip:]
                    parameter = name or (names[index] if 0 <= index < len(names) else "")
                    yield Place(place.dotted, place.module, function), parameter, routers

    # ------------------------------------------------------------------------------------------- what is a router

    def routers(self, module: Module, expr: ast.AST | None, depth: int = 8) -> set[Router]:
        """Routers that an expression can be; empty when it is none."""
        if depth == 0 or not isinstance(expr, _VALUES):
            return set()
        if expr not in self._known:
            self._known[expr] = self._routers(module, expr, depth)
        return self._known[expr]

    def _routers(self, module: Module, expr: ast.expr, depth: int) -> set[Router]:  # noqa: PLR0911 - one per case
        match expr:
            case ast.Name():
                return self._of_name(module, expr, depth)
            case ast.Attribute(value=value, attr=attr):
                return self._of_attribute(module, expr, value, attr, depth)
            case ast.Call():
                return self._of_call(module, expr, depth)
            case ast.IfExp(body=body, orelse=orelse):
                return self.routers(module, body, depth - 1) | self.routers(module, orelse, depth - 1)
            case ast.BoolOp(values=values):
                return set().union(*(self.routers(module, value, depth - 1) for value in values))
            case ast.NamedExpr(value=value) | ast.Await(value=value):
                return self.routers(module, value, depth - 1)
        return set()

    def _of_name(self, module: Module, expr: ast.Name, depth: int) -> set[Router]:
        found: set[Router] = set()
        bound = self.tree.bindings(module, expr, expr.id)
        if not bound or any(binding.how == "import" for binding in bound):
            for place in self.tree.places(module, expr):
                if place.module is not None and isinstance(place.node, ast.expr):
                    found |= self.routers(place.module, place.node, depth - 1)
        for binding in bound:
            if binding.how == "value":
                found |= self.routers(module, binding.node, depth - 1)
            elif binding.how == "parameter":
                found |= self._of_parameter(module, binding.node)
            elif binding.how == "each":
                for item in self.tree.elements(module, binding.node) or ():
                    part = item.elts[binding.index] if isinstance(item, ast.Tuple) and binding.index >= 0 else item
                    found |= self.routers(module, part, depth - 1)
        return found

    def _of_parameter(self, module: Module, node: ast.AST) -> set[Router]:
        assert isinstance(node, ast.arg)  # noqa: S101 - how the binder makes parameters
        function = module.parents[module.parents[node]]
        router = Router("parameter", module.path, node.lineno, node.col_offset, node.arg)
        annotation = "" if node.annotation is None else ast.unparse(node.annotation)
        typed = any(part in _ROUTER_CLASSES - {"Router", "Application"} for part in _words(annotation))
        if typed or (module.path, function, node.arg) in self._passed:
            return {router}
        named = node.arg in {"app", "router", "application", "api_router"} and not annotation
        return {router} if named and module.path in self._modules else set()

    def _of_attribute(self, module: Module, expr: ast.AST, value: ast.expr, attr: str, depth: int) -> set[Router]:
        if attr in {"router", "app"} and (same := self.routers(module, value, depth - 1)):
            return same
        found: set[Router] = set()
        if isinstance(value, ast.Name) and value.id in {"self", "cls"}:
            owner = module.class_of(expr)
            for assigned in module.on_self.get((owner, attr), ()) if owner is not None else ():
                found |= self.routers(module, assigned, depth - 1)
        for place in self.tree.places(module, expr):
            if place.module is not None and isinstance(place.node, ast.expr):
                found |= self.routers(place.module, place.node, depth - 1)
        return found

    def _of_call(self, module: Module, expr: ast.Call, depth: int) -> set[Router]:
        if (kind := self.router_class(module, expr.func)) is not None:
            return {Router(kind, module.path, expr.lineno, expr.col_offset, ast.unparse(expr.func))}
        if ast.unparse(expr.func) in {"cast", "typing.cast"} and len(expr.args) > 1:
            return self.routers(module, expr.args[1], depth - 1)
        found: set[Router] = set()
        for place in self.tree.places(module, expr.func):
            if place.module is not None and isinstance(place.node, Function):
                place.module.complete()
                for returned in (node for node in ast.walk(place.node) if isinstance(node, ast.Return)):
                    found |= self.routers(place.module, returned.value, depth - 1)
        return found

    def router_class(self, module: Module, expr: ast.AST, depth: int = 4) -> str | None:
        """``application`` or ``router`` when an expression is such a class of a framework, or derived from one."""
        for place in self.tree.places(module, expr) if depth else ():
            if place.node is None and _framework(place.dotted, _ROUTER_CLASSES):
                return "router" if "Router" in place.dotted.rpartition(".")[2] else "application"
            if isinstance(place.node, ast.ClassDef) and place.module is not None:
                for base in place.node.bases:
                    if (kind := self.router_class(place.module, base, depth - 1)) is not None:
                        return kind
        return None

    def route_class(self, module: Module, expr: ast.AST) -> str | None:
        """Name of the framework's class (``Route``, ``Mount`` ...) that an expression is or is derived from."""
        for place in self.tree.places(module, expr):
            if place.node is None and _framework(place.dotted, _ROUTE_CLASSES):
                return place.dotted.rpartition(".")[2]
            if isinstance(place.node, ast.ClassDef) and place.module is not None:
                for base in place.node.bases:
                    if (name := self.route_class(place.module, base)) is not None:
                        return name
        return None

    # --------------------------------------------------------------------------------------------------- assembling

    def add(self, router: Router | None, method: str, path: str, where: str, when: tuple[str, ...]) -> None:
        """A route as it stands in the source; prefixes and servers come at the end."""
        self._found.append((router, method, path, where, when))

    def join(self, child: Router, parent: Router, prefix: str, when: tuple[str, ...]) -> None:
        """`child` is included in `parent`."""
        self._edges[child].add(_Edge(parent, prefix, when))

    def own_prefix(self, router: Router, prefixes: Iterable[str]) -> None:
        """Prefix that the router itself was made with."""
        self._prefixes[router] |= set(prefixes)

    def _assemble(self) -> None:
        for router, method, path, where, when in self._found:
            for server, prefix, outer in [(API, "", ("router unknown",))] if router is None else self._roots(router):
                words = tuple(dict.fromkeys((*outer, *when)))
                self.routes.add(Route(server, prefix + path or "/", method, where, " and ".join(words)))

    def _roots(self, router: Router, seen: frozenset[Router] = frozenset()) -> list[tuple[str, str, tuple[str, ...]]]:
        """(server, prefix, conditions) of every way from a router to an application."""
        if router in seen:
            return []
        own = sorted(self._prefixes[router]) or [""]
        edges = self._edges[router]
        if not edges:
            if router.kind == "application":
                known = router.path in self._main or not self._main
                server = API if known else router.path
                return [(server, prefix, ()) for prefix in own]
            return [(API, prefix, (f"no caller of {router.path}:{router.line} found",)) for prefix in own]
        ways = {
            (server, outer + edge.prefix + prefix, (*words, *edge.when))
            for edge in edges
            for server, outer, words in self._roots(edge.parent, seen | {router})
            for prefix in own
        }
        return sorted(ways)


class _ModuleScan:
    """The final walk over one module: every node that has to do with routers."""

    def __init__(self, scan: Scan, module: Module) -> None:
        self.scan = scan
        self.tree = scan.tree
        self.module = module

    def run(self) -> None:
        for node in self.module.nodes:
            match node:
                case ast.Attribute():
                    self._attribute(node)
                case ast.Call():
                    self._call(node)
                case ast.ClassDef():
                    self._class(node)
                case ast.FunctionDef() | ast.AsyncFunctionDef():
                    self._function(node)
                case ast.List() | ast.Tuple() | ast.Set() | ast.Dict():
                    self._container(node)
                case ast.Assign(targets=targets, value=value):
                    self._assign(node, targets, value)
                case ast.Constant(value=str() as text) if text in _ADDS - _VERBS - {"route", "mount"}:
                    self._spelled(node)

    def _report(self, node: ast.AST, kind: str) -> None:
        code = " ".join(ast.unparse(node).split())
        self.scan.unreadable.add(Unreadable(self.module.where(node), kind, code[:_CODE]))

    def _when(self, node: ast.AST) -> tuple[str, ...]:
        return conditions(self.tree, self.module, node)

    # ------------------------------------------------------------------------------------------ members of a router

    def _attribute(self, node: ast.Attribute) -> None:
        routers = self.scan.routers(self.module, node.value)
        if not routers:
            self._stranger(node)
            return
        parent = self.module.parents.get(node)
        called = parent if isinstance(parent, ast.Call) and parent.func is node else None
        if isinstance(node.ctx, ast.Store | ast.Del):
            if node.attr not in _SETTABLE:
                self._report(parent or node, "router is changed")
        elif node.attr in _MIDDLEWARE:
            self._report(called or node, "middleware")
        elif node.attr == "routes":
            self._route_list(node)
        elif node.attr in _ADDS:
            if called is None:
                self._report(parent or node, "router method as a value")
            else:
                self._adds(routers, node.attr, called)
        elif node.attr not in _HARMLESS | {"router", "app"}:
            self._report(called or node, "unknown member of a router")

    def _stranger(self, node: ast.Attribute) -> None:
        """A member of something that is not known to be a router, but has a name that only routers have."""
        parent = self.module.parents.get(node)
        call = parent if isinstance(parent, ast.Call) and parent.func is node else None
        outer = self.module.parents.get(call) if call is not None else None
        decorator = isinstance(outer, Function | ast.ClassDef) and call in outer.decorator_list
        applied = isinstance(outer, ast.Call) and outer.func is call
        if isinstance(node.ctx, ast.Store):
            if any(_framework(name, None) for name in self.tree.external(self.module, node.value)):
                self._report(parent or node, "framework is changed")
            elif self._is_route(node.value):
                self._report(parent or node, "route is changed")
        elif call is not None and (decorator or applied) and node.attr in _ADDS:
            self._adds({None}, node.attr, call)
        elif (node.attr in _CERTAIN and not isinstance(parent, ast.Attribute)) or (
            node.attr == "mount" and call is not None and self._is_path(call)
        ):
            self._report(call or parent or node, "receiver unknown")
        elif node.attr == "routes" and not isinstance(parent, ast.For | ast.comprehension | ast.Starred):
            self._report(parent or node, "route list of an unknown receiver")

    def _is_path(self, call: ast.Call) -> bool:
        texts = self.tree.strings(self.module, call.args[0]) if call.args else None
        return texts is not None and all(text.startswith("/") for text in texts)

    def _is_route(self, expr: ast.expr) -> bool:
        if not isinstance(expr, ast.Name):
            return False
        bound = self.tree.bindings(self.module, expr, expr.id)
        values = [binding.node for binding in bound if binding.how == "value"]
        return any(isinstance(value, ast.Call) and self.scan.route_class(self.module, value.func) for value in values)

    def _route_list(self, node: ast.Attribute) -> None:
        parent = self.module.parents.get(node)
        if isinstance(parent, ast.For | ast.comprehension | ast.Starred):
            return  # only read
        call = self.module.parents.get(parent) if isinstance(parent, ast.Attribute) else None
        if isinstance(call, ast.Call) and call.args and all(self._constructed(item) for item in call.args[-1:]):
            return  # the constructors are found where they stand
        self._report(call or parent or node, "route list is changed or handed on")

    def _constructed(self, expr: ast.expr) -> bool:
        if isinstance(expr, ast.List | ast.Tuple):
            return all(self._constructed(item) for item in expr.elts)
        return self._is_route(expr) or (
            isinstance(expr, ast.Call) and self.scan.route_class(self.module, expr.func) is not None
        )

    def _adds(self, routers: set[Router] | set[None], name: str, call: ast.Call) -> None:
        """A call that adds one or more routes to a router."""
        when = self._when(call)
        unpacked = None in {item.arg for item in call.keywords}
        # ** after a path and a method that are written out can change neither: both twice is a TypeError.
        open_ended = name in _LISTED or not call.args
        if any(isinstance(argument, ast.Starred) for argument in call.args) or (unpacked and open_ended):
            self._report(call, "arguments are unpacked")
        elif name == "include_router":
            self._include(routers, call, when)
        else:
            paths = self._paths(_argument(call, 0, "path"))
            methods = self._methods(name, call)
            if paths is None or methods is None or not all(path.startswith("/") or path == "" for path in paths):
                self._report(call, "path or methods are computed")
                return
            for router, path, method in itertools.product(routers, paths, methods):
                self.scan.add(router, method, path, self.module.where(call), when)
            if name == "mount":
                for child in self.scan.routers(self.module, _argument(call, 1, "app")):
                    for router, path in itertools.product(routers, paths):
                        if router is not None:
                            self.scan.join(child, router, path, when)

    def _paths(self, expr: ast.expr | None) -> set[str] | None:
        match expr:
            case ast.Attribute(value=owner, attr="swagger_ui_oauth2_redirect_url"):
                return {_OAUTH_REDIRECT} if self.scan.routers(self.module, owner) else None
        return self.tree.strings(self.module, expr)

    def _include(self, routers: set[Router] | set[None], call: ast.Call, when: tuple[str, ...]) -> None:
        children = self.scan.routers(self.module, _argument(call, 0, "router"))
        prefix = _argument(call, 99, "prefix")
        prefixes = {""} if prefix is None else self.tree.strings(self.module, prefix)
        if not children or prefixes is None:
            self._report(call, "router or prefix is computed")
            return
        for child, router, text in itertools.product(children, routers, prefixes):
            if router is not None:
                self.scan.join(child, router, text, when)

    def _methods(self, name: str, call: ast.Call) -> set[str] | None:  # noqa: PLR0911 - one per family of names
        if name in _VERBS:
            return {name.upper()}
        if name in _WEBSOCKETS:
            return {WEBSOCKET}
        if name in _AIOHTTP:
            return {_AIOHTTP[name]}
        if name in {"mount", "Mount"}:
            return {MOUNT}
        given = _argument(call, 99, "methods")
        if given is None or (isinstance(given, ast.Constant) and given.value is None):
            return {_LISTED.get(name, "*")}
        items = self.tree.elements(self.module, given)
        texts = [self.tree.strings(self.module, item) for item in items or ()]
        if not texts or any(text is None for text in texts):
            return None
        return {text.upper() for one in texts for text in one or ()}

    # ----------------------------------------------------------------------------------------- calls and definitions

    def _call(self, node: ast.Call) -> None:
        self._constructor(node)
        name = ast.unparse(node.func).rpartition(".")[2] if isinstance(node.func, ast.Name | ast.Attribute) else ""
        if name in _SERVERS:
            self._report(node, "server")
        if name in _BY_NAME or (isinstance(node.func, ast.Name) and name in {"exec", "eval", "__import__"}):
            self._report(node, "code by name")
        if name == "Instrumentator":
            return
        if name == "expose" and "Instrumentator" in ast.unparse(node.func):
            self._exposed(node)
            return
        if isinstance(node.func, ast.Attribute) and self.scan.routers(self.module, node.func.value):
            return  # a member of a router: seen there
        values = [*node.args, *(item.value for item in node.keywords)]
        if any(self.scan.routers(self.module, value) for value in values):
            self._hands_on(node, name)
        elif any(isinstance(value, ast.Call) and self._builds(value) for value in values):
            self._report(node, "router handed to unknown code")

    def _builds(self, value: ast.Call) -> bool:
        return self.scan.router_class(self.module, value.func) is not None

    def _hands_on(self, node: ast.Call, name: str) -> None:
        places = self.tree.places(self.module, node.func)
        if name == "instrument" and "Instrumentator" in ast.unparse(node.func):
            self._report(node, "middleware")
            return
        if name in {"getattr", "setattr", "delattr", "vars"}:
            member = node.args[1] if len(node.args) > 1 else None
            texts = self.tree.strings(self.module, member)
            if name != "getattr" or texts is None or not texts <= _HARMLESS:
                self._report(node, "member by name")
            return
        if self.scan.route_class(self.module, node.func) is not None:
            return  # Mount("/x", app): a route, and below it everything
        if ast.unparse(node.func) in _CONSUMERS or {place.dotted for place in places} & _CONSUMERS:
            return
        inside = [place for place in places if _callee(place)[0] is not None]
        if not inside or len(inside) != len(places):
            self._report(node, "router handed to unknown code")

    def _exposed(self, node: ast.Call) -> None:
        """prometheus-fastapi-instrumentator: ``expose(app, endpoint="/metrics")`` adds GET."""
        paths = {"/metrics"}
        if (given := _argument(node, 3, "endpoint")) is not None:
            paths = self.tree.strings(self.module, given) or set()
        routers = self.scan.routers(self.module, _argument(node, 0, "app"))
        if not paths or not routers:
            self._report(node, "path or methods are computed")
        for router, path in itertools.product(routers, paths):
            self.scan.add(router, "GET", path, self.module.where(node), self._when(node))

    def _constructor(self, node: ast.Call) -> None:
        kind = self.scan.router_class(self.module, node.func)
        route = self.scan.route_class(self.module, node.func)
        external = self.tree.external(self.module, node.func)
        if kind is not None:
            self._router_made(node)
        elif route is not None:
            self._route_made(node, route)
        elif any(name.rpartition(".")[0] == "aiohttp.web" and name.rpartition(".")[2] in _VERBS for name in external):
            self._adds({None}, node.func.attr if isinstance(node.func, ast.Attribute) else "", node)
        elif ast.unparse(node.func).endswith("RouteConfig"):
            self._route_config(node)

    def _route_config(self, node: ast.Call) -> None:
        """model-hosting-container-standards keeps its routes as data: ``RouteConfig(path=, method=)``."""
        paths = self.tree.strings(self.module, _argument(node, 0, "path"))
        methods = self.tree.strings(self.module, _argument(node, 1, "method"))
        if paths is None or methods is None:
            self._report(node, "path or methods are computed")
            return
        for path, method in itertools.product(paths, methods):
            self.scan.add(None, method.upper(), path, self.module.where(node), self._when(node))

    def _router_made(self, node: ast.Call) -> None:
        (router,) = self.scan.routers(self.module, node)
        given = {item.arg: item.value for item in node.keywords}
        if None in given or node.args:
            self._report(node, "arguments are unpacked")
        if "prefix" in given:
            prefixes = self.tree.strings(self.module, given["prefix"])
            if prefixes is None:
                self._report(node, "router or prefix is computed")
            self.scan.own_prefix(router, prefixes or ())
        if "middleware" in given:
            self._report(node, "middleware")
        if "swagger_ui_oauth2_redirect_url" in given:
            self._report(node, "path or methods are computed")
        if "routes" in given and not self._constructed(given["routes"]):
            self._report(node, "route list is changed or handed on")
        if router.name.rpartition(".")[2] == "FastAPI" or router.kind == "application":
            self._own_routes(node, router, given)

    def _own_routes(self, node: ast.Call, router: Router, given: dict[str | None, ast.expr]) -> None:
        """What FastAPI adds by itself: documentation, unless its URL is None."""
        if not any(name.startswith("fastapi.") for name in self.tree.external(self.module, node.func)):
            return
        shown: dict[str, set[str]] = {}
        for keyword, default in _FASTAPI_OWN:
            value = given.get(keyword)
            off = isinstance(value, ast.Constant) and value.value is None
            texts = {default} if value is None else set() if off else self.tree.strings(self.module, value)
            if texts is None:
                self._report(node, "path or methods are computed")
            shown[keyword] = texts or set()
        if not shown["openapi_url"]:
            return  # FastAPI: no schema, no pages
        redirect = {_OAUTH_REDIRECT} if shown["docs_url"] else set()
        for path in set().union(*shown.values()) | redirect:
            self.scan.add(router, "GET", path, self.module.where(node), self._when(node))

    def _route_made(self, node: ast.Call, name: str) -> None:
        path_name = "host" if name == "Host" else "path"
        paths = self.tree.strings(self.module, _argument(node, 0, path_name))
        methods = {WEBSOCKET} if "WebSocket" in name else self._methods(name, node)
        if name == "Host" or paths is None or methods is None or None in {item.arg for item in node.keywords}:
            self._report(node, "path or methods are computed")
            return
        owner, prefixes = self._around(node)
        for prefix, path, method in itertools.product(prefixes, paths, methods):
            self.scan.add(owner, method, prefix + path, self.module.where(node), self._when(node))

    def _around(self, node: ast.Call) -> tuple[Router | None, set[str]]:
        """Router and prefix of the constructor calls that a route's constructor stands in."""
        prefixes = {""}
        outer = self.module.parents.get(node)
        while outer is not None and not isinstance(outer, ast.stmt):
            if isinstance(outer, ast.Call):
                routers = self.scan.routers(self.module, outer)
                if routers:
                    return next(iter(routers)), prefixes
                if self.scan.route_class(self.module, outer.func) == "Mount":
                    texts = self.tree.strings(self.module, _argument(outer, 0, "path")) or {""}
                    prefixes = {text + prefix for text in texts for prefix in prefixes}
                holder = outer.func.value if isinstance(outer.func, ast.Attribute) else None
                if isinstance(holder, ast.Attribute) and holder.attr == "routes":
                    found = self.scan.routers(self.module, holder.value)
                    return (next(iter(found)) if found else None), prefixes
            outer = self.module.parents.get(outer)
        if isinstance(outer, ast.Assign) and isinstance(outer.targets[0], ast.Name):
            return self._appended(outer.targets[0].id), prefixes
        return None, prefixes

    def _appended(self, name: str) -> Router | None:
        """Router to whose ``routes`` a name is appended in this module."""
        for node in self.module.nodes:
            match node:
                case ast.Call(
                    func=ast.Attribute(value=ast.Attribute(value=base, attr="routes")), args=[*_, ast.Name(id=given)]
                ) if given == name:
                    found = self.scan.routers(self.module, base)
                    if found:
                        return next(iter(found))
        return None

    def _class(self, node: ast.ClassDef) -> None:
        if any(self.scan.router_class(self.module, base) or self.scan.route_class(self.module, base)
               for base in node.bases):  # fmt: skip
            self._report_head(node, "class derived from a router or route")
        bases = {ast.unparse(base).rpartition(".")[2] for base in node.bases}
        if bases & _HANDLERS:
            self._report_head(node, "server")
        if any(base.endswith("Middleware") for base in bases):
            self._report_head(node, "middleware")

    def _function(self, node: Function) -> None:
        names = {arg.arg for arg in (*node.args.posonlyargs, *node.args.args)}
        types = {ast.unparse(arg.annotation).rpartition(".")[2] for arg in node.args.args if arg.annotation is not None}
        if {"receive", "send"} <= names or {"Receive", "Send"} <= types:
            self._report_head(node, "middleware")

    def _report_head(self, node: ast.ClassDef | Function, kind: str) -> None:
        """A class or function by its first line: its body changes too often to identify it."""
        chain = [node.name]
        outer = self.module.scope(node)
        while isinstance(outer, ast.ClassDef | Function):
            chain.append(outer.name)
            outer = self.module.scope(outer)
        self.scan.unreadable.add(Unreadable(self.module.where(node), kind, ".".join(reversed(chain))))

    def _container(self, node: ast.List | ast.Tuple | ast.Set | ast.Dict) -> None:
        if isinstance(node, ast.List | ast.Tuple) and isinstance(node.ctx, ast.Store):
            return
        items = node.values if isinstance(node, ast.Dict) else node.elts
        if not any(self.scan.routers(self.module, item) for item in items):
            return
        parent = self.module.parents.get(node)
        if isinstance(parent, ast.For | ast.comprehension) and parent.iter is node:
            return
        self._report(node, "router in a container")

    def _assign(self, node: ast.Assign, targets: list[ast.expr], value: ast.expr) -> None:
        """A router that is stored where it is not followed."""
        stored = [target for target in targets if isinstance(target, ast.Subscript | ast.Attribute)]
        followed = all(
            isinstance(target, ast.Attribute) and isinstance(target.value, ast.Name) and target.value.id == "self"
            for target in stored
        )
        if stored and not followed and self.scan.routers(self.module, value):
            self._report(node, "router stored where it is not followed")

    def _spelled(self, node: ast.Constant) -> None:
        """The name of a router's method as text: an argument of getattr, methodcaller or their like."""
        if isinstance(self.module.parents.get(node), ast.Call):
            self._report(self.module.parents[node], "member by name")


def _argument(call: ast.Call, index: int, name: str) -> ast.expr | None:
    for item in call.keywords:
        if item.arg == name:
            return item.value
    return call.args[index] if index < len(call.args) else None


def _callee(place: Place) -> tuple[Function | None, int]:
    """Function that a call of this place runs, and how many of its parameters are filled already."""
    if isinstance(place.node, Function):
        return place.node, 0
    if isinstance(place.node, ast.ClassDef):
        for item in place.node.body:
            if isinstance(item, Function) and item.name == "__init__":
                return item, 1
    return None, 0


def _parameter(module: Module, function: ast.AST, name: str) -> Router | None:
    if not isinstance(function, Function):
        return None
    for arg in (*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs):
        if arg.arg == name:
            return Router("parameter", module.path, arg.lineno, arg.col_offset, name)
    return None


def _framework(dotted: str, names: set[str] | None) -> bool:
    head, _, _ = dotted.partition(".")
    return head in _FRAMEWORKS and (names is None or dotted.rpartition(".")[2] in names)


def _words(text: str) -> list[str]:
    return "".join(char if char.isalnum() or char == "_" else " " for char in text).split()


def scan(tree: Tree) -> Scan:
    """Run over a tree."""
    found = Scan(tree)
    found.run()
    return found
