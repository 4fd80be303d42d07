"""The query language: a Python expression over `FIELDS` in, one SQL condition out.

`where` is the seam: one condition over `tirgen.query.joined(select(...))`, which is trajectories
with the tables that fields come from; the caller adds columns, order and limit. It parses with
`ast` and translates node by node what is listed here; all else is refused, and nothing is ever
evaluated. Values travel as bound parameters; names come from `FIELDS` and `FUNCTIONS` alone.

    vetted and n_calls >= 2           2 <= n_calls < 5           subject in ["Algebra", None]
    not thinking                      answer is None             "triangle" in problem
    answer != reference               "sympy" in imports         run == "demo" or end != "answered"
    any_step(outcome == "timeout")    count_steps(has_call and duration > 1) >= 2
    check("answer") is False          contains("by induction")

Logic is two-valued, as in Python: a missing value equals only None, and is neither smaller nor
greater than anything; so `not (A)` always selects exactly what `A` does not.
"""

from __future__ import annotations

import ast
import difflib
import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from sqlalchemy import (
    Boolean,
    ColumnElement,
    and_,
    exists,
    false,
    func,
    literal,
    not_,
    or_,
    select,
    true,
)

from shared.errors import ConfigError
from shared.store.models import RunRow, StepRow, TrajectoryRow, VerdictRow
from shared.trajectory import Check
from tirgen import literals
from tirgen.fields import FIELDS, FUNCTIONS, NUMBERS, STEP_FIELDS, Field, Kind
from tirgen.literals import Plain, Unfit

MAX_LENGTH = 4000  # characters; Python's own parser is safe up to there
MAX_DEPTH = 50
MAX_SEARCHES = 3  # different texts that contains() looks for
HELP = "`tirgen query --fields` lists every field"


def where(expression: str, found: Mapping[str, bool] | None = None) -> ColumnElement[bool]:
    """The condition that `expression` describes; "" is true of everything.

    In a WHERE it selects exactly what the expression says; as a value it may be NULL for false.
    `found` says what contains() is to be taken for, text by text: it is not SQL's to answer, and
    without `found` it is refused. `tirgen.query.matching` answers it. Raises ConfigError, with the
    column at fault, for all that is not in the language.
    """
    if not expression.strip():
        return true()
    return _Translator(expression, found).translate()


def searches(expression: str) -> tuple[str, ...]:
    """The texts that `expression` looks for by contains(). Raises ConfigError as `where` does.

    The check of a whole expression where there is no database yet.
    """
    asked = _Everything()
    where(expression, asked)
    return tuple(asked)


def named(name: str, place: str) -> Field:
    """The field of that name. Raises ConfigError with the nearest one that there is."""
    field = FIELDS.get(name.strip())
    if field is None:
        remedy = _near(name, FIELDS)
        raise ConfigError(f"there is no field named {name.strip()!r}", where=place, remedy=remedy)
    return field


class _Everything(dict[str, bool]):
    """Says yes to every text, and remembers which it was asked for."""

    def __missing__(self, text: str) -> bool:
        return self.setdefault(text, True)


_ORDERINGS: dict[type[ast.cmpop], Callable[[Any, Any], ColumnElement[bool]]] = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}
_POSITIVE = {ast.NotIn: ast.In, ast.NotEq: ast.Eq, ast.IsNot: ast.Is}
_MEMBERS = (ast.List, ast.Tuple, ast.Set)


@dataclass(frozen=True, slots=True)
class _Value:
    """A literal of the expression; `plain` may be None."""

    plain: Plain


@dataclass(frozen=True, slots=True)
class _Term:
    """What a field or a function stands for."""

    name: str
    kind: Kind
    sql: Any
    nullable: bool = False
    values: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Test:
    """A condition. Unless it is `known`, NULL stands for false: fine for WHERE, AND and OR, which
    can then use an index; NOT makes it plain first."""

    sql: ColumnElement[bool]
    known: bool = True

    def negated(self) -> _Test:
        return _Test(not_(self.sql if self.known else func.coalesce(self.sql, false())))


class _Translator:
    """One expression. Its methods mirror the grammar: condition, comparison, operand, function."""

    def __init__(self, expression: str, found: Mapping[str, bool] | None) -> None:
        one_line = expression.encode(errors="replace").decode().translate(_LINE_BREAKS)
        self._text = one_line.strip()
        self._found = found
        self._fields = FIELDS

    def translate(self) -> ColumnElement[bool]:
        if len(self._text) > MAX_LENGTH:
            what = f"the expression has {len(self._text)} characters, {MAX_LENGTH} are allowed"
            raise ConfigError(what, where="the expression", remedy="ask in several queries")
        try:
            tree = ast.parse(self._text, mode="eval")
        except SyntaxError as error:
            self._refuse(f"this is no expression: {error.msg}", (error.offset or 1) - 1)
        except (ValueError, RecursionError, MemoryError) as error:
            self._refuse(f"this is no expression: {error or 'nested too deeply'}", 0)
        return self._condition(tree.body, 1).sql

    def _condition(self, node: ast.expr, depth: int) -> _Test:
        if depth > MAX_DEPTH:
            self._refuse(f"nested more than {MAX_DEPTH} deep", node)
        match node:
            case ast.BoolOp(op=op, values=values):
                parts = [self._condition(value, depth + 1) for value in values]
                joined = (and_ if isinstance(op, ast.And) else or_)(*(part.sql for part in parts))
                return _Test(joined, all(part.known for part in parts))
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                return self._condition(operand, depth + 1).negated()
            case ast.Compare(left=left, ops=ops, comparators=comparators):
                pairs = zip([left, *comparators], ops, comparators, strict=False)
                parts = [self._comparison(*pair, depth) for pair in pairs]
                return _Test(and_(*(part.sql for part in parts)), all(p.known for p in parts))
            case ast.Constant(value=bool(value)):
                return _Test(true() if value else false())
            case ast.Name() | ast.Call():
                term = self._term(node, depth)
                if term.kind is not Kind.BOOLEAN:
                    self._refuse(f"{term.name!r} is {term.kind.article}: compare it", node)
                return _Test(term.sql, not term.nullable)
        self._refuse(_unlike(node, "a comparison"), node)

    def _comparison(self, left: ast.expr, op: ast.cmpop, right: ast.expr, depth: int) -> _Test:
        if isinstance(op, ast.NotIn | ast.NotEq | ast.IsNot):
            return self._comparison(left, _POSITIVE[type(op)](), right, depth).negated()
        if isinstance(op, ast.In) and isinstance(right, _MEMBERS):
            return self._membership(left, right, depth)
        a, b = self._operand(left, depth), self._operand(right, depth)
        if isinstance(a, _Value) and isinstance(b, _Value):
            self._refuse("neither side of the comparison is a field", left)
        if isinstance(op, ast.In):
            return self._inside(a, b, left, right)
        if isinstance(op, ast.Is) and not _is_singleton(a) and not _is_singleton(b):
            self._refuse("'is' is for None, True and False; write ==", left)
        if isinstance(a, _Term) and isinstance(b, _Term):
            return self._two_terms(a, op, b, left)
        if isinstance(a, _Term):
            assert isinstance(b, _Value)
            return self._with_value(a, op, b, right, flipped=False)
        assert isinstance(b, _Term)
        return self._with_value(b, op, a, left, flipped=True)

    def _with_value(
        self, term: _Term, op: ast.cmpop, value: _Value, node: ast.expr, *, flipped: bool
    ) -> _Test:
        ordering = _ORDERINGS.get(type(op))
        if value.plain is None and ordering is None:
            return _Test(term.sql.is_(None))
        bound = self._bound(term, value, node)
        if ordering is None:
            return _equal(term, bound)
        self._check_order(term, node)
        sides = (bound, term.sql) if flipped else (term.sql, bound)
        return _Test(ordering(*sides), not term.nullable)

    def _two_terms(self, a: _Term, op: ast.cmpop, b: _Term, node: ast.expr) -> _Test:
        if a.kind is not b.kind and not (a.kind in NUMBERS and b.kind in NUMBERS):
            what = f"{a.name!r} is {a.kind.article}, but {b.name!r} is {b.kind.article}"
            self._refuse(what, node)
        ordering = _ORDERINGS.get(type(op))
        if ordering is None:
            return _Test(a.sql.is_not_distinct_from(b.sql))
        self._check_order(a, node)
        return _Test(ordering(a.sql, b.sql), not (a.nullable or b.nullable))

    def _check_order(self, term: _Term, node: ast.expr) -> None:
        if term.kind in (Kind.BOOLEAN, Kind.TEXTS):
            self._refuse(f"{term.name!r} is {term.kind.article} and has no order", node)

    def _membership(self, left: ast.expr, right: ast.expr, depth: int) -> _Test:
        """FIELD in [literals]; None may be among them."""
        term = self._operand(left, depth)
        if isinstance(term, _Value):
            self._refuse("left of 'in [...]' stands a field", left)
        assert isinstance(right, _MEMBERS)
        test, bound = false(), []
        for node in right.elts:
            value = self._operand(node, depth)
            if isinstance(value, _Term):
                self._refuse("a list holds literals only", node)
            if value.plain is None:
                test = term.sql.is_(None)
            else:
                bound.append(self._bound(term, value, node))
        among = _equal(term, *bound)
        return _Test(or_(test, among.sql), among.known)

    def _inside(
        self, part: _Term | _Value, whole: _Term | _Value, left: ast.expr, right: ast.expr
    ) -> _Test:
        """TEXT in FIELD: a substring of a text, as in Python, or a member of a list of texts."""
        if isinstance(whole, _Value) or whole.kind not in (Kind.TEXT, Kind.TEXTS):
            self._refuse(
                "right of 'in' stands a list, or a field that is a text or a list of texts", right
            )
        if isinstance(part, _Term):
            if part.kind is not Kind.TEXT or whole.kind is not Kind.TEXT:
                what = f"{part.name!r} is {part.kind.article}, {whole.name!r} {whole.kind.article}"
                self._refuse(what, left)
            found = func.strpos(whole.sql, part.sql) > 0
            return _Test(found, not (part.nullable or whole.nullable))
        if not isinstance(part.plain, str):
            self._refuse("left of 'in FIELD' stands a text", left)
        if whole.kind is Kind.TEXTS:
            self._fit(literals.one_of, left, whole.name, whole.values, part.plain)
            return _Test(whole.sql.contains([part.plain]), not whole.nullable)
        found = func.strpos(whole.sql, self._fit(literals.text, left, part.plain)) > 0
        return _Test(found, not whole.nullable)

    def _operand(self, node: ast.expr, depth: int) -> _Term | _Value:
        match node:
            case ast.Name() | ast.Call():
                return self._term(node, depth)
            case ast.Constant(value=str() | int() | float() | None as value):
                return _Value(value)
            case ast.UnaryOp(
                op=ast.USub() | ast.UAdd() as sign, operand=ast.Constant(value=number)
            ):
                if type(number) in (int, float):
                    assert isinstance(number, int | float)
                    return _Value(-number if isinstance(sign, ast.USub) else number)
        self._refuse(_unlike(node, "a field or a literal"), node)

    def _term(self, node: ast.Name | ast.Call, depth: int) -> _Term:
        if isinstance(node, ast.Call):
            return self._function(node, depth)
        if node.id not in self._fields:
            what = f"there is no field named {node.id!r}"
            if self._fields is STEP_FIELDS and node.id in FIELDS:
                what = f"{node.id!r} is a field of trajectories, not of steps"
            self._refuse(what, node, _near(node.id, self._fields))
        field = self._fields[node.id]
        return _Term(field.name, field.kind, field.column, field.nullable, field.values)

    def _function(self, node: ast.Call, depth: int) -> _Term:
        if not isinstance(node.func, ast.Name):
            self._refuse("only the language's own functions can be called", node)
        name = node.func.id
        known = [signature.partition("(")[0] for signature in FUNCTIONS]
        if name not in known:
            self._refuse(f"there is no function named {name!r}", node, _near(name, known))
        if self._fields is STEP_FIELDS:
            self._refuse("inside of a function over steps stand fields of steps only", node)
        if len(node.args) != 1 or node.keywords:
            self._refuse(f"{name}() takes one argument", node)
        (argument,) = node.args
        if name == "check":
            return self._check(argument)
        if name == "contains":
            return self._contains(argument)
        return self._over_steps(name, argument, depth)

    def _over_steps(self, name: str, argument: ast.expr, depth: int) -> _Term:
        self._fields = STEP_FIELDS
        test = self._condition(argument, depth + 1)
        self._fields = FIELDS
        of_it = StepRow.trajectory_id == TrajectoryRow.id
        if name == "any_step":
            some = exists().where(of_it, test.sql).correlate(TrajectoryRow)
            return _Term(name, Kind.BOOLEAN, some)
        if name == "all_steps":
            other = exists().where(of_it, test.negated().sql).correlate(TrajectoryRow)
            return _Term(name, Kind.BOOLEAN, not_(other))
        counted = select(func.count()).where(of_it, test.sql).correlate(TrajectoryRow)
        return _Term(name, Kind.INTEGER, counted.scalar_subquery())

    def _check(self, argument: ast.expr) -> _Term:
        """The newest verdict decides, as in the view `current_verdicts`."""
        name = self._literal_text(argument, "check")
        if name not in set(Check) and "/" not in name:  # filters' verdicts: filter/NAME
            self._refuse(f"there is no check named {name!r}", argument, _near(name, list(Check)))
        of_it = (VerdictRow.trajectory_id == TrajectoryRow.id, VerdictRow.check_name == name)
        newest = select(VerdictRow.passed).where(*of_it).order_by(VerdictRow.id.desc()).limit(1)
        passed = newest.correlate(TrajectoryRow).scalar_subquery()
        return _Term(f"check({name!r})", Kind.BOOLEAN, passed, nullable=True)

    def _contains(self, argument: ast.expr) -> _Term:
        text = self._literal_text(argument, "contains")
        if self._found is None:
            remedy = "leave it out here, and look for the text with `tirgen query`"
            self._refuse("contains() reads bodies, which cannot be done here", argument, remedy)
        truth = self._found[text]
        if len(self._found) > MAX_SEARCHES:
            self._refuse(f"contains() looks for at most {MAX_SEARCHES} texts", argument)
        return _Term("contains", Kind.BOOLEAN, literal(truth, Boolean()))

    def _literal_text(self, node: ast.expr, function: str) -> str:
        match node:
            case ast.Constant(value=str(text)) if text:
                self._fit(literals.text, node, text)
                return text
        self._refuse(f"{function}() takes a text in quotes", node)

    def _fit(self, make: Callable[..., ColumnElement[Any]], node: ast.expr, *given: Any) -> Any:
        """`make(*given)`, or its complaint with the place of `node`."""
        try:
            return make(*given)
        except Unfit as error:
            self._refuse(error.what, node, error.remedy or HELP)

    def _bound(self, term: _Term, value: _Value, node: ast.expr) -> ColumnElement[Any]:
        bound: ColumnElement[Any] = self._fit(
            literals.bound, node, term.name, term.kind, term.values, value.plain
        )
        return bound

    def _place(self, at: ast.expr | int) -> str:
        if isinstance(at, int):
            column = min(at, len(self._text))
        else:  # Python counts bytes
            column = len(self._text.encode()[: at.col_offset].decode(errors="replace"))
        start = max(0, column - 20)
        around = self._text[start : column + 40]
        cut = ("…" if start else "", "…" if column + 40 < len(self._text) else "")
        return f"column {column + 1} of the expression: {cut[0]}{around}{cut[1]}"

    def _refuse(self, what: str, at: ast.expr | int, remedy: str = HELP) -> NoReturn:
        raise ConfigError(what, where=self._place(at), remedy=remedy)


_LINE_BREAKS = str.maketrans("\n\r\f\v", "    ")

_ASIDE = {
    ast.Attribute: "an attribute",
    ast.BinOp: "arithmetic (for & and | write `and`, `or`)",
    ast.UnaryOp: "arithmetic (for ~ write `not`)",
    ast.Constant: "a literal alone",
    ast.JoinedStr: "an f-string",
}


def _unlike(node: ast.expr, expected: str) -> str:
    return f"{_ASIDE.get(type(node), type(node).__name__)} is not allowed; expected {expected}"


def _is_singleton(side: _Term | _Value) -> bool:
    return isinstance(side, _Value) and (side.plain is None or isinstance(side.plain, bool))


def _equal(term: _Term, *bound: ColumnElement[Any]) -> _Test:
    """The term equals one of them."""
    if term.sql is FIELDS["run"].column:
        # The run's id first, then an index on it, in whose order pages come.
        ids = [select(RunRow.id).where(RunRow.name == one).scalar_subquery() for one in bound]
        return _Test(or_(false(), *(TrajectoryRow.run_id == id for id in ids)), known=False)
    same = term.sql == bound[0] if len(bound) == 1 else term.sql.in_(bound)
    return _Test(same, not term.nullable)


def _near(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name.strip(), [*known, "True", "False", "None"], n=1)
    return f"did you mean {near[0]!r}? {HELP}" if near else f"{HELP}; texts stand in quotes"
