"""No text is ever turned into code by our own code: an AST check, with controls that must fail."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Names that evaluate their argument: Python's own, sympy's, numpy's, pandas's and mpmath's.
EVALUATES = frozenset(
    "eval exec compile sympify parse_expr parse_latex latex2sympy lambdify S sympy_eval "
    "literal_eval nsimplify __import__ Integer_from_string mpmathify execfile numexpr".split()
)
# What may: the child that runs model code in the jail, the zygote that loads our own warm-up, and
# nano's teacher, which runs its own templates.
ALLOWED = {
    "shared/nano/teacher.py": {"exec"},
    "shared/sandbox/child.py": {"exec", "compile"},
    "shared/sandbox/zygote.py": {"exec", "compile"},
}
# math_verify evaluates what it parses, so only the module that lives in the jail may name it.
JAILED = {"math_verify": "shared/grading/opinion.py", "sympy": "shared/grading/symbolic.py"}
METHODS = frozenset({"compile"})  # of patterns, statements and graphs, which are no builtins


def offences(source: str) -> Iterator[str]:
    """Names of EVALUATES that a module calls, imports or passes on."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            yield from (alias.name for alias in node.names if alias.name in EVALUATES)
        elif isinstance(node, ast.Attribute) and node.attr in EVALUATES:
            if node.attr not in METHODS or ast.unparse(node.value) == "builtins":
                yield node.attr
        elif isinstance(node, ast.Name) and node.id in EVALUATES and isinstance(node.ctx, ast.Load):
            yield node.id


def imported(source: str) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.partition(".")[0])
    return found


def modules() -> list[str]:
    paths = (p for folder in ("shared", "tirgen", "rl") for p in (ROOT / folder).rglob("*.py"))
    return sorted(str(path.relative_to(ROOT)) for path in paths)


def test_no_module_of_ours_evaluates_text() -> None:
    found = {
        path: names
        for path in modules()
        if (names := set(offences((ROOT / path).read_text("utf-8"))) - ALLOWED.get(path, set()))
    }
    assert not found


@pytest.mark.parametrize("library", sorted(JAILED))
def test_what_evaluates_is_imported_by_the_jailed_module_alone(library: str) -> None:
    users = [path for path in modules() if library in imported((ROOT / path).read_text("utf-8"))]
    assert users == [JAILED[library]]


@pytest.mark.parametrize(
    "control",
    [
        "eval(answer)",
        "import builtins\nbuiltins.exec(answer)",
        "from sympy import sympify",
        "import sympy\nsympy.S(answer)",
        "from sympy.parsing.sympy_parser import parse_expr as safe",
        "list(map(eval, answers))",
        "import pandas\npandas.DataFrame().eval(answer)",
    ],
)
def test_control_the_check_sees_every_way_to_evaluate(control: str) -> None:
    assert list(offences(control))


def test_control_the_check_lets_ordinary_code_pass() -> None:
    assert not list(offences("import re\nre.compile('x')\nsympy.Add(a, b)\nevaluate(a)"))
