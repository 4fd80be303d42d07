"""The query language: a Python expression over `FIELDS` in, one SQL condition out.

`where` is the seam: one condition over `tirgen.query.joined(select(...))`, which is trajectories
with the tables that fields come from; the caller adds columns, order and limit. It parses with `ast` and translates node by node what is listed here; all else
is refused, and nothing is ever evaluated. Values travel as bound parameters; names come from
`FIELDS` alone.

    vetted and n_calls >= 2           2 <= n_calls < 5           subject in ["Algebra", None]
    not thinking                      answer is None             "triangle" in problem
    answer != reference               run == "demo" or end != "answered"

Logic is two-valued, as in Python: a missing value equals only None, and is neither smaller nor
greater than anything; so `not (A)` always selects exactly what `A` does not.
"""

from __future__ import annotations

import ast
import difflib
import operator
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, NoReturn

from sqlalchemy import (
    BigInteger,
    Boolean,
    ColumnElement,
    DateTime,
    Double,
    Text,
    and_,
    false,
    func,
    literal,
    not_,
    or_,
    true,
)

from shared.errors import ConfigError
from shared.trajectory import clean
from tirgen.fields import FIELDS, Field, Kind

MAX_LENGTH = 4000  # characters; Python's own parser is safe up to there
MAX_DEPTH = 50
HELP = "`tirgen query --fields` lists every field"


def where(expression: str) -> ColumnElement[bool]:
    """The condition that `expression` describes; "" is true of everything.

    Raises ConfigError, with the column at fault, for all that is not in the language.
    """
    if not expression.strip():
        return true()
    return _Translator(expression).translate()


def named(name: str, place: str) -> Field:
    """The field of that name. Raises ConfigError with the nearest one that there is."""
    field = FIELDS.get(name.strip())
    if field is None:
        raise ConfigError(
            f"there is no field named {name.strip()!r}", where=place, remedy=_near(name)
        )
    return field


_ORDERINGS: dict[type[ast.cmpop], Callable[[Any, Any], ColumnElement[bool]]] = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}
_MEMBERS = (ast.List, ast.Tuple, ast.Set)


@dataclass(frozen=True, slots=True)
class _Value:
    """A literal of the expression; `plain` may be None."""

    plain: str | int | float | bool | None


class _Translator:
    """One expression. Its methods mirror the grammar: condition, comparison, operand."""

    def __init__(self, expression: str) -> None:
        one_line = expression.encode(errors="replace").decode().translate(_LINE_BREAKS)
        self._text = one_line.strip()

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
        return self._condition(tree.body, 1)

    def _condition(self, node: ast.expr, depth: int) -> ColumnElement[bool]:
        if depth > MAX_DEPTH:
            self._refuse(f"nested more than {MAX_DEPTH} deep", node)
        match node:
            case ast.BoolOp(op=op, values=values):
                parts = [self._condition(value, depth + 1) for value in values]
                return and_(*parts) if isinstance(op, ast.And) else or_(*parts)
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                return not_(self._condition(operand, depth + 1))
            case ast.Compare(left=left, ops=ops, comparators=comparators):
                pairs = zip([left, *comparators], ops, comparators, strict=False)
                return and_(*(self._comparison(*pair) for pair in pairs))
            case ast.Constant(value=bool(value)):
                return true() if value else false()
            case ast.Name():
                field = self._field(node)
                if field.kind is not Kind.BOOLEAN:
                    self._refuse(f"{field.name!r} is {_a(field.kind)}: compare it", node)
                return _known(field.column.is_(True), field)
        self._refuse(_unlike(node, "a comparison"), node)

    def _comparison(self, left: ast.expr, op: ast.cmpop, right: ast.expr) -> ColumnElement[bool]:
        if isinstance(op, ast.NotIn | ast.NotEq | ast.IsNot):
            positive = {ast.NotIn: ast.In(), ast.NotEq: ast.Eq(), ast.IsNot: ast.Is()}[type(op)]
            return not_(self._comparison(left, positive, right))
        if isinstance(op, ast.In) and isinstance(right, _MEMBERS):
            return self._membership(left, right)
        a, b = self._operand(left), self._operand(right)
        if isinstance(a, _Value) and isinstance(b, _Value):
            self._refuse("neither side of the comparison is a field", left)
        if isinstance(op, ast.In):
            return self._contains(a, b, left, right)
        if isinstance(op, ast.Is) and not _is_singleton(a) and not _is_singleton(b):
            self._refuse("'is' is for None, True and False; write ==", left)
        if isinstance(a, Field) and isinstance(b, Field):
            return self._two_fields(a, op, b, left)
        if isinstance(a, Field):
            assert isinstance(b, _Value)
            return self._with_value(a, op, b, right, flipped=False)
        assert isinstance(b, Field)
        return self._with_value(b, op, a, left, flipped=True)

    def _with_value(
        self, field: Field, op: ast.cmpop, value: _Value, node: ast.expr, *, flipped: bool
    ) -> ColumnElement[bool]:
        ordering = _ORDERINGS.get(type(op))
        if value.plain is None and ordering is None:
            return field.column.is_(None)
        bound = self._bound(field, value, node)
        if ordering is None:
            return _known(field.column == bound, field)
        if field.kind is Kind.BOOLEAN:
            self._refuse(f"{field.name!r} is True or False and has no order", node)
        sides = (bound, field.column) if flipped else (field.column, bound)
        return _known(ordering(*sides), field)

    def _two_fields(self, a: Field, op: ast.cmpop, b: Field, node: ast.expr) -> ColumnElement[bool]:
        numbers = (Kind.INTEGER, Kind.NUMBER)
        if a.kind is not b.kind and not (a.kind in numbers and b.kind in numbers):
            what = f"{a.name!r} is {_a(a.kind)}, but {b.name!r} is {_a(b.kind)}"
            self._refuse(what, node)
        ordering = _ORDERINGS.get(type(op))
        if ordering is None:
            return a.column.is_not_distinct_from(b.column)
        if a.kind is Kind.BOOLEAN:
            self._refuse(f"{a.name!r} is True or False and has no order", node)
        return _known(ordering(a.column, b.column), a, b)

    def _membership(self, left: ast.expr, right: ast.expr) -> ColumnElement[bool]:
        """FIELD in [literals]; None may be among them."""
        field = self._operand(left)
        if isinstance(field, _Value):
            self._refuse("left of 'in [...]' stands a field", left)
        assert isinstance(right, _MEMBERS)
        parts: list[ColumnElement[bool]] = []
        bound = []
        for node in right.elts:
            value = self._operand(node)
            if isinstance(value, Field):
                self._refuse("a list holds literals only", node)
            if value.plain is None:
                parts.append(field.column.is_(None))
            else:
                bound.append(self._bound(field, value, node))
        if bound:
            parts.append(_known(field.column.in_(bound), field))
        return or_(false(), *parts)

    def _contains(
        self, part: Field | _Value, whole: Field | _Value, left: ast.expr, right: ast.expr
    ) -> ColumnElement[bool]:
        """TEXT in FIELD: a substring, as in Python."""
        if isinstance(whole, _Value) or whole.kind is not Kind.TEXT:
            self._refuse(
                "right of 'in' stands a list of literals, or a field that is a text", right
            )
        if isinstance(part, Field):
            if part.kind is not Kind.TEXT:
                self._refuse(f"{part.name!r} is {_a(part.kind)}, not a text", left)
            return _known(func.strpos(whole.column, part.column) > 0, part, whole)
        if not isinstance(part.plain, str):
            self._refuse("left of 'in FIELD' stands a text", left)
        return _known(func.strpos(whole.column, self._text_value(part.plain, left)) > 0, whole)

    def _operand(self, node: ast.expr) -> Field | _Value:
        match node:
            case ast.Name():
                return self._field(node)
            case ast.Constant(value=str() | int() | float() | None as value):
                return _Value(value)
            case ast.UnaryOp(
                op=ast.USub() | ast.UAdd() as sign, operand=ast.Constant(value=number)
            ):
                if type(number) in (int, float):
                    assert isinstance(number, int | float)
                    return _Value(-number if isinstance(sign, ast.USub) else number)
        self._refuse(_unlike(node, "a field or a literal"), node)

    def _field(self, node: ast.Name) -> Field:
        if node.id not in FIELDS:
            what = f"there is no field named {node.id!r}"
            raise ConfigError(what, where=self._place(node), remedy=_near(node.id))
        return FIELDS[node.id]

    def _bound(self, field: Field, value: _Value, node: ast.expr) -> ColumnElement[Any]:
        """The literal as a parameter of the field's kind."""
        plain = value.plain
        if field.kind is Kind.TEXT and isinstance(plain, str):
            if field.values and plain not in field.values:
                there = ", ".join(repr(str(v)) for v in field.values)
                self._refuse(f"{field.name!r} is never {plain!r}", node, f"it is one of {there}")
            return self._text_value(plain, node)
        if field.kind is Kind.BOOLEAN and isinstance(plain, bool):
            return literal(plain, Boolean())
        if field.kind is Kind.TIME and isinstance(plain, str):
            return self._time(plain, node)
        if field.kind in (Kind.INTEGER, Kind.NUMBER) and not isinstance(plain, bool):
            if isinstance(plain, float):
                return literal(plain, Double())
            if isinstance(plain, int):
                if not -(2**63) <= plain < 2**63:
                    self._refuse("the number does not fit into 64 bits", node)
                return literal(plain, BigInteger())
        found = {str: "a text", bool: "True or False", type(None): "None"}.get(
            type(plain), "a number"
        )
        self._refuse(f"{field.name!r} is {_a(field.kind)}, compared with {found}", node)

    def _text_value(self, plain: str, node: ast.expr) -> ColumnElement[str]:
        if clean(plain)[1]:
            self._refuse("the text has a character that no stored text has", node)
        return literal(plain, Text())

    def _time(self, plain: str, node: ast.expr) -> ColumnElement[datetime]:
        try:
            time = datetime.fromisoformat(plain)
        except ValueError as error:
            self._refuse(f"this is no time: {error}", node, "write it like '2026-05-01 12:00'")
        return literal(time if time.tzinfo else time.replace(tzinfo=UTC), DateTime(timezone=True))

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
    ast.Call: "a function call",
    ast.Attribute: "an attribute",
    ast.BinOp: "arithmetic (for & and | write `and`, `or`)",
    ast.UnaryOp: "arithmetic (for ~ write `not`)",
    ast.Constant: "a literal alone",
    ast.JoinedStr: "an f-string",
}


def _unlike(node: ast.expr, expected: str) -> str:
    return f"{_ASIDE.get(type(node), type(node).__name__)} is not allowed; expected {expected}"


def _a(kind: Kind) -> str:
    return kind.value if kind is Kind.BOOLEAN else f"a {kind.value}"


def _is_singleton(side: Field | _Value) -> bool:
    return isinstance(side, _Value) and (side.plain is None or isinstance(side.plain, bool))


def _known(condition: ColumnElement[bool], *fields: Field) -> ColumnElement[bool]:
    """NULL, which only a missing value gives, becomes false."""
    return func.coalesce(condition, false()) if any(f.nullable for f in fields) else condition


def _near(name: str) -> str:
    near = difflib.get_close_matches(name.strip(), [*FIELDS, "True", "False", "None"], n=1)
    return f"did you mean {near[0]!r}? {HELP}" if near else f"{HELP}; texts stand in quotes"
