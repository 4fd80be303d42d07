"""Code quality by syntax tree (THOR 4.1; method.md 9.2 no. 18). The code is parsed, never run.

The paper asks for a library call or control flow; the release counts lines instead. Both rules are
here, `verifier.trivial` chooses.
"""

from __future__ import annotations

import ast
import builtins
import math
import warnings
from collections.abc import Sequence
from typing import Literal

Rule = Literal["syntax", "lines"]

MAX_CHARS = 20_000  # what is longer is not parsed: no honest step needs it

CONTROL_FLOW = (
    ast.For, ast.While, ast.If, ast.IfExp, ast.Match, ast.FunctionDef, ast.Lambda,
    ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp,
)  # fmt: skip

# Importing these does not help to compute anything.
PLUMBING = frozenset({"__future__", "os", "sys", "time", "typing", "warnings"})


def is_trivial(code: str, rule: Rule = "syntax") -> bool:
    """syntax: neither a library call nor control flow; code that does not parse is trivial.

    lines: at most 5 lines that are neither empty nor a comment (method.md 1.4 no. 7).
    """
    if rule == "lines":
        return sum(line.strip()[:1] not in ("", "#") for line in code.splitlines()) <= 5
    tree = _parse(code)
    if tree is None:
        return True
    bound = {name for module, name in _bindings(tree) if module not in PLUMBING}
    passed: set[ast.expr] = set()  # a chain of calls is walked down once, from its top
    return not any(
        isinstance(node, CONTROL_FLOW)
        or (
            isinstance(node, ast.Call)
            and node not in passed
            and _is_bound(_root(node.func, passed), bound)
        )
        for node in ast.walk(tree)
    )


def trivial_allowed(blocks: int, share: float, one_good: bool = True) -> int:
    """How many of `blocks` may be trivial: ceil(share x blocks), but not all if `one_good`."""
    return min(math.ceil(share * blocks), blocks - one_good)


def passes(codes: Sequence[str], share: float, rule: Rule = "syntax") -> tuple[bool, int]:
    """Whether a trajectory's blocks pass, and how many of them are trivial."""
    trivial = sum(is_trivial(code, rule) for code in codes)
    return bool(codes) and trivial <= trivial_allowed(len(codes), share), trivial


def _parse(code: str) -> ast.Module | None:
    if len(code) > MAX_CHARS:
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a model's "\d" is not our warning
            return ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _bindings(tree: ast.Module) -> list[tuple[str, str]]:
    """(top-level module, name it is bound to) for every import."""
    found: list[tuple[str, str]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(a.name.split(".")[0], a.asname or a.name.split(".")[0]) for a in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found += [(node.module.split(".")[0], a.asname or a.name) for a in node.names]
    return found


def _is_bound(name: str | None, bound: set[str]) -> bool:
    """After `from sympy import *` any name may come from there, but for Python's own."""
    return name in bound or ("*" in bound and name is not None and not hasattr(builtins, name))


def _root(node: ast.expr, passed: set[ast.expr]) -> str | None:
    """The name at the bottom of `a.b(c).d`; what lies above it is added to `passed`."""
    while isinstance(node, ast.Attribute | ast.Call | ast.Subscript):
        passed.add(node)
        node = node.func if isinstance(node, ast.Call) else node.value
    return node.id if isinstance(node, ast.Name) else None
