"""What must hold for a line of a function to run: enclosing tests, and tests whose branch left the function before."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from securevllm_dev.catalogue.modules import Function, Module, Tree

_LEAVES = (ast.Return, ast.Raise, ast.Continue)
_DEPTH = 4


def conditions(tree: Tree, module: Module, node: ast.AST) -> tuple[str, ...]:
    """Conditions from the outside to the inside, in words of the command line where they have one."""
    return tuple(reversed(list(_upwards(tree, module, node))))


def _upwards(tree: Tree, module: Module, node: ast.AST) -> Iterator[str]:
    child = node
    while (parent := module.parents.get(child)) is not None:
        if isinstance(parent, ast.If | ast.IfExp):
            if _in(parent.body, child):
                yield phrase(tree, module, parent.test)
            elif _in(parent.orelse, child):
                yield _not(phrase(tree, module, parent.test))
        for before in _siblings_before(parent, child):
            if isinstance(before, ast.If) and isinstance(before.body[-1], _LEAVES):
                yield _not(phrase(tree, module, before.test))
        if isinstance(parent, Function) and child not in parent.decorator_list:
            return
        child = parent


def _in(block: list[ast.stmt] | ast.expr, child: ast.AST) -> bool:
    return child in block if isinstance(block, list) else child is block


def _siblings_before(parent: ast.AST, child: ast.AST) -> list[ast.stmt]:
    for name in ("body", "orelse", "finalbody"):
        block = getattr(parent, name, None)
        if isinstance(block, list) and child in block and not isinstance(parent, ast.Module):
            return block[: block.index(child)]
    return []


def _not(text: str) -> str:
    return text.removeprefix("not ") if text.startswith("not ") else f"not {text}"


def phrase(tree: Tree, module: Module, test: ast.expr, depth: int = _DEPTH) -> str:  # noqa: PLR0911 - one per case
    """A test in words: ``task generate``, ``--enable-x``, ``VLLM_X``; otherwise as the source has it."""
    match test:
        case ast.Compare(left=ast.Constant(value=str() as task), ops=[ast.In()], comparators=[ast.Name()]):
            return f"task {task}"
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            return _not(phrase(tree, module, operand, depth))
        case ast.BoolOp(op=op, values=values):
            word = " and " if isinstance(op, ast.And) else " or "
            return "(" + word.join(phrase(tree, module, value, depth) for value in values) + ")"
        case ast.Call(func=ast.Name(id="getattr"), args=[owner, ast.Constant(value=str() as name), *_]) if _args(owner):
            return "--" + name.replace("_", "-")
        case ast.Attribute(value=owner, attr=name) if name.isupper() and ast.unparse(owner).endswith("envs"):
            return name
        case ast.Attribute(value=owner, attr=name) if _args(owner):
            return "--" + name.replace("_", "-")
        case ast.Name(id=name) if depth:
            bound = tree.bindings(module, test, name)
            if len(bound) == 1 and bound[0].how == "value" and isinstance(bound[0].node, ast.BoolOp | ast.Compare):
                return phrase(tree, module, bound[0].node, depth - 1)
    return ast.unparse(test)


def _args(owner: ast.expr) -> bool:
    return ast.unparse(owner).rpartition(".")[2] == "args"
