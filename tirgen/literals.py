"""Literals of an expression as SQL parameters of the right type, or the reason why not."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from sqlalchemy import BigInteger, Boolean, ColumnElement, DateTime, Double, Text, literal

from shared.trajectory import clean
from tirgen.fields import Kind

Plain = str | int | float | bool | None


class Unfit(ValueError):
    """`what` is wrong with the literal; `remedy`, where there is a better one than usual."""

    def __init__(self, what: str, remedy: str | None = None) -> None:
        super().__init__(what)
        self.what, self.remedy = what, remedy


def bound(name: str, kind: Kind, values: tuple[str, ...], plain: Plain) -> ColumnElement[Any]:
    """`plain` as a parameter to compare `name` with, which is of `kind`. Raises Unfit."""
    match kind, plain:
        case Kind.TEXTS, _:
            raise Unfit(f"{name!r} is a list of texts: write 'x' in {name}")
        case Kind.TEXT, str():
            return one_of(name, values, plain)
        case Kind.BOOLEAN, bool():
            return literal(plain, Boolean())
        case Kind.TIME, str():
            return _time(plain)
        case ((Kind.INTEGER | Kind.NUMBER), (int() | float())) if not isinstance(plain, bool):
            return _number(plain)
    found = {str: "a text", bool: "True or False", type(None): "None"}.get(type(plain), "a number")
    raise Unfit(f"{name!r} is {kind.article}, compared with {found}")


def one_of(name: str, values: tuple[str, ...], plain: str) -> ColumnElement[str]:
    """A text that is one of `values`, where there are any. Raises Unfit, naming them."""
    if values and plain not in values:
        there = ", ".join(repr(str(value)) for value in values)
        raise Unfit(f"{name!r} is never {plain!r}", f"it is one of {there}")
    return text(plain)


def text(plain: str) -> ColumnElement[str]:
    """Raises Unfit for what PostgreSQL cannot hold: NUL, lone surrogates."""
    if clean(plain)[1]:
        raise Unfit("the text has a character that no stored text has")
    return literal(plain, Text())


def _number(plain: float) -> ColumnElement[Any]:
    if isinstance(plain, float):
        return literal(plain, Double())
    if not -(2**63) <= plain < 2**63:
        raise Unfit("the number does not fit into 64 bits")
    return literal(plain, BigInteger())


def _time(plain: str) -> ColumnElement[datetime]:
    try:
        time = datetime.fromisoformat(plain)
    except ValueError as error:
        raise Unfit(f"this is no time: {error}", "write it like '2026-05-01 12:00'") from error
    return literal(time if time.tzinfo else time.replace(tzinfo=UTC), DateTime(timezone=True))
