"""The query language: what Python would answer, nothing but what is listed, any number of rows."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import select, text
from sqlalchemy.dialects import postgresql

from shared.errors import ConfigError
from shared.store import Database, ItemState
from shared.store.models import TrajectoryRow
from shared.store.trajectories import add_verdicts, read
from shared.trajectory import Check, Verdict
from tests import stored
from tirgen import query
from tirgen.expression import MAX_DEPTH, MAX_LENGTH, where
from tirgen.fields import FIELDS, Kind
from tirgen.query import Query

Row = dict[str, Any]
ONE_DATABASE = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture
def filled(db: Database) -> Database:
    """With a few more texts and verdicts than `fill` makes: newer ones, one undecided."""
    stored.fill(db)
    with db.begin() as session:
        run = stored.add_run(session, "rare", 2)
        for i in (1, 2):
            made = stored.trajectory(i, "A rare one. ")
            stored.add_item(session, run, i, ItemState.VETTED, made)
        newer = [Verdict(Check.ANSWER, False, "2", "no"), Verdict(Check.JUDGE, True, "2", "yes")]
        add_verdicts(session, [(id, verdict) for id in (1, 2, 3) for verdict in newer])
        add_verdicts(session, [(4, Verdict(Check.ANSWER, None, "2", "who knows"))])
    return db


def rows(db: Database, expression: str, *columns: str, **more: Any) -> list[tuple[Any, ...]]:
    with query.run(db, Query(expression, columns or ("id",), **more)) as found:
        return list(found)


def everything(db: Database) -> list[Row]:
    """All that can be asked of each trajectory, read without the query language's SQL."""
    table = [dict(zip(FIELDS, row, strict=True)) for row in rows(db, "", *FIELDS)]
    with db.session() as session:
        for row in table:
            of_it = {"id": row["id"]}
            steps = text("SELECT * FROM steps WHERE trajectory_id = :id ORDER BY position")
            row["steps"] = [dict(step) for step in session.execute(steps, of_it).mappings()]
            verdicts = text("SELECT * FROM verdicts WHERE trajectory_id = :id ORDER BY id")
            made = session.execute(verdicts, of_it).mappings()
            row["checks"] = {v["check_name"]: v["passed"] for v in made}
            row["text"] = read(session, row["id"]).text
    return table


def refused(expression: str) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        where(expression)
    assert caught.value.exit_code == 2
    return caught.value


# What an expression selects: the same as Python's own reading of it

PREDICATES: dict[str, Callable[[Row], bool]] = {
    "vetted": lambda r: r["vetted"],
    "not vetted": lambda r: not r["vetted"],
    "vetted == False": lambda r: not r["vetted"],
    "vetted is True": lambda r: r["vetted"],
    "True": lambda r: True,
    "vetted and not vetted": lambda r: False,
    "n_calls == 2 or n_tokens > 40": lambda r: r["n_calls"] == 2 or r["n_tokens"] > 40,
    "10 < n_tokens <= 30": lambda r: 10 < r["n_tokens"] <= 30,
    "30 >= n_tokens": lambda r: r["n_tokens"] <= 30,
    "n_tokens > 9.5": lambda r: r["n_tokens"] > 9.5,
    "n_tokens > -1": lambda r: True,
    "duration == 1.5": lambda r: r["duration"] == 1.5,
    "seed in (1, 2, 9999999999)": lambda r: r["seed"] in (1, 2),
    "seed not in [1, 2]": lambda r: r["seed"] not in (1, 2),
    "seed in []": lambda r: False,
    "answer is None": lambda r: r["answer"] is None,
    "answer == None": lambda r: r["answer"] is None,
    "None != answer": lambda r: r["answer"] is not None,
    "answer is not None": lambda r: r["answer"] is not None,
    'subject != "Algebra"': lambda r: r["subject"] != "Algebra",
    'not subject == "Algebra"': lambda r: r["subject"] != "Algebra",
    'subject in ["Algebra", None]': lambda r: r["subject"] in ("Algebra", None),
    'subject not in ["Algebra"]': lambda r: r["subject"] != "Algebra",
    'subject < "B"': lambda r: r["subject"] is not None and r["subject"] < "B",
    'not subject < "B"': lambda r: r["subject"] is None or r["subject"] >= "B",
    "answer == reference": lambda r: r["answer"] == r["reference"],
    "answer != reference": lambda r: r["answer"] != r["reference"],
    "n_failed_calls < n_calls": lambda r: r["n_failed_calls"] < r["n_calls"],
    "n_calls < duration": lambda r: r["n_calls"] < r["duration"],
    'extractor_model != model': lambda r: r["extractor_model"] != r["model"],
    '"gebra" in subject': lambda r: r["subject"] is not None and "gebra" in r["subject"],
    '"%" in problem': lambda r: False,
    'subject not in problem': lambda r: True,
    'reject_check == "answer"': lambda r: r["reject_check"] == "answer",
    'run == "two" and problem_id == "w0"': lambda r: r["run"] == "two",
    "'\\'; DROP TABLE runs; --' == run": lambda r: False,
    "created_at > '2020-01-01'": lambda r: True,
    "created_at < '2020-01-01T00:00:00+02:00'": lambda r: False,
    "vetted and (\n  thinking or\n  n_calls >= 1)": lambda r: r["vetted"],
    'run == "one"': lambda r: r["run"] == "one",
    'run != "one"': lambda r: r["run"] != "one",
    'run in ("one", "nope")': lambda r: r["run"] == "one",
    'run not in ("one", "two")': lambda r: r["run"] == "rare",
    'not run == "nope"': lambda r: True,
    'run < "p"': lambda r: r["run"] < "p",
    '"math" in imports': lambda r: "math" in r["imports"],
    '"sympy" not in imports': lambda r: True,
    '"model_error" in outcomes': lambda r: "model_error" in r["outcomes"],
    '"ValueError" in error_types': lambda r: "ValueError" in r["error_types"],
    "imports == outcomes": lambda r: r["imports"] == r["outcomes"],
    "n_tool_calls == 2": lambda r: r["n_calls"] == 2,
    'any_step(outcome == "model_error")': lambda r: any(
        s["outcome"] == "model_error" for s in r["steps"]
    ),
    'not any_step(outcome == "model_error")': lambda r: all(
        s["outcome"] != "model_error" for s in r["steps"]
    ),
    "any_step(position > 1 and not has_call)": lambda r: len(r["steps"]) > 2,
    'any_step("math" in imports and duration < 1)': lambda r: True,
    'all_steps(outcome in ("ok", None))': lambda r: all(
        s["outcome"] in ("ok", None) for s in r["steps"]
    ),
    "all_steps(has_call)": lambda r: False,
    "all_steps(duration < 100)": lambda r: False,  # a missing one is not smaller
    "not all_steps(duration < 100)": lambda r: True,
    'count_steps(outcome == "ok") == 1 and count_steps(True) >= 3': lambda r: len(r["steps"]) > 2,
    "count_steps(has_call) == n_calls": lambda r: True,
    "any_step(has_call) == vetted": lambda r: r["vetted"],
    'check("answer")': lambda r: r["checks"].get("answer") is True,
    'not check("answer")': lambda r: r["checks"].get("answer") is not True,
    'check("answer") is False': lambda r: r["checks"].get("answer") is False,
    'check("judge") is None': lambda r: r["checks"].get("judge") is None,
    'check("judge") is not None': lambda r: r["checks"].get("judge") is not None,
    'check("filter/none-such")': lambda r: False,
    'check("answer") != vetted': lambda r: r["checks"].get("answer") != r["vetted"],
    'contains("rare")': lambda r: "rare" in r["text"],
    'not contains("rare")': lambda r: "rare" not in r["text"],
    'contains("rare") == vetted': lambda r: ("rare" in r["text"]) == r["vetted"],
    'vetted and (contains("rare") or n_calls > 1)': lambda r: (
        r["vetted"] and ("rare" in r["text"] or r["n_calls"] > 1)
    ),
    'contains("Multiply") and not contains("rare") or contains("%")': lambda r: (
        "Multiply" in r["text"] and "rare" not in r["text"]
    ),
}  # fmt: skip


def test_selection_is_what_python_would_select(filled: Database) -> None:
    table = everything(filled)
    assert len(table) == 23
    for expression, predicate in PREDICATES.items():
        expected = [row["id"] for row in table if predicate(row)]
        assert [i for (i,) in rows(filled, expression)] == expected, expression
        assert query.count(filled, expression) == len(expected), expression


VALUES: dict[str, st.SearchStrategy[Any]] = {
    "n_tokens": st.sampled_from([-1, 0, 10, 10.5, 30, 2**62]),
    "seed": st.integers(-(2**63), 2**63 - 1) | st.integers(0, 24),
    "duration": st.sampled_from([0, 1.5, 1e300]),
    "answer": st.sampled_from(["41", "42", "", "x' OR true --", "%", None]),
    "subject": st.sampled_from(["Algebra", "Geometry", "ä\\", None]),
    "vetted": st.booleans(),
    "extractor_model": st.sampled_from(["nano", None]),
}


@st.composite
def comparisons(draw: st.DrawFn, values: dict[str, st.SearchStrategy[Any]] = VALUES) -> str:
    name = draw(st.sampled_from(list(values)))
    value = draw(values[name])
    if isinstance(value, bool) or value is None:
        op = draw(st.sampled_from(["==", "!=", "is", "is not"]))
    else:
        op = draw(st.sampled_from(["==", "!=", "<", "<=", ">", ">=", "in", "not in"]))
    if op in ("in", "not in"):
        return f"{name} {op} {draw(st.lists(values[name], max_size=3))!r}"
    return draw(st.sampled_from([f"{name} {op} {value!r}", f"{value!r} {op} {name}"]))


STEP_VALUES: dict[str, st.SearchStrategy[Any]] = {
    "position": st.integers(0, 3),
    "outcome": st.sampled_from(["ok", "model_error", None]),
    "duration": st.sampled_from([0.25, 1, None]),
    "has_call": st.booleans(),
}


@st.composite
def calls(draw: st.DrawFn) -> str:
    """A function, in all the ways in which one can be used."""
    over_steps = st.recursive(comparisons(STEP_VALUES), nested, max_leaves=4)
    name = draw(st.sampled_from(["any_step", "all_steps", "count_steps", "check", "contains"]))
    if name == "check":
        check = draw(st.sampled_from(["answer", "judge", "format", "filter/x"]))
        return f"check({check!r}) {draw(st.sampled_from(['is None', '== True', '!= False']))}"
    if name == "contains":
        wanted = draw(st.sampled_from(["rare", "Multiply", "%"]))
        return f"contains({wanted!r}){draw(st.sampled_from(['', ' == vetted']))}"
    call = f"{name}({draw(over_steps)})"
    if name == "count_steps":
        return f"{call} {draw(st.sampled_from(['<', '>=', '==']))} {draw(st.integers(0, 3))}"
    return call


def nested(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    joined = st.sampled_from([" and ", " or "])
    many = st.builds(lambda op, parts: f"({op.join(parts)})", joined, st.lists(inner, min_size=2))
    return many | inner.map(lambda e: f"not ({e})")


EXPRESSIONS = st.recursive(comparisons() | calls() | st.just("vetted"), nested, max_leaves=8)


class Missing:
    """Python's None, but neither smaller nor greater than anything."""

    def __lt__(self, other: object) -> bool:
        return False

    __le__ = __gt__ = __ge__ = __lt__


def in_python(expression: str, row: Row) -> bool:
    """The expression on one row, by Python itself. (Only for expressions made above.)

    A condition over steps becomes a lambda, which Python then asks of each step.
    """

    class Rewrite(ast.NodeTransformer):
        def visit_Compare(self, node: ast.Compare) -> ast.AST:
            """`None < x` is an error in Python, and false in ours."""
            self.generic_visit(node)
            if isinstance(node.ops[0], ast.Lt | ast.LtE | ast.Gt | ast.GtE):
                for side in (node.left, *node.comparators):
                    if isinstance(side, ast.Name):
                        side.id = f"_{side.id}"
            return node

        def visit_Call(self, node: ast.Call) -> ast.AST:
            self.generic_visit(node)
            name = ast.unparse(node.func)
            if name.endswith(("_step", "_steps")):
                node.args = [ast.Constant(ast.unparse(node.args[0]))]
            return node

    def evaluate(tree: ast.Expression, names: Row) -> bool:
        missing = {f"_{k}": Missing() if v is None else v for k, v in names.items()}
        return bool(eval(compile(tree, "", "eval"), {"__builtins__": {}}, names | missing))  # noqa: S307

    def steps(condition: str) -> list[bool]:
        tree = ast.parse(condition, mode="eval")
        return [evaluate(tree, {**step, "_": None}) for step in row["steps"]]

    functions = {
        "any_step": lambda condition: any(steps(condition)),
        "all_steps": lambda condition: all(steps(condition)),
        "count_steps": lambda condition: sum(steps(condition)),
        "check": row["checks"].get,
        "contains": row["text"].__contains__,
    }
    tree = ast.fix_missing_locations(Rewrite().visit(ast.parse(expression, mode="eval")))
    return evaluate(tree, row | functions)


def test_any_expression_selects_what_python_selects(filled: Database) -> None:
    """And none of them is one that PostgreSQL refuses."""
    table = everything(filled)

    @ONE_DATABASE
    @given(EXPRESSIONS)
    def check(expression: str) -> None:
        expected = [row["id"] for row in table if in_python(expression, row)]
        assert [i for (i,) in rows(filled, expression)] == expected
        with filled.session() as session:
            condition = query.matching(session, expression)
            wanted = query.joined(select(TrajectoryRow.id)).where(condition)
            assert sorted(session.scalars(wanted)) == expected

    check()


# What is refused


TOKENS = st.sampled_from(
    [*FIELDS, *"()[]{},.:=<>!&|~+-*/%^@\\'\"", "and", "or", "not", "in", "is", "None", "True",
     "==", "!=", "<=", "if", "else", "for", "lambda", ":=", "**", "'x'", "1", "1e999", "1j", "b''",
     'f"{id}"', "\0", "\n", "\ud800", "__class__", "0x" + "f" * 40, "9" * 5000, "..."]
)  # fmt: skip


@settings(max_examples=250, deadline=None)
@given(st.text() | st.lists(TOKENS, max_size=30).map(" ".join) | EXPRESSIONS)
def test_any_text_is_a_condition_or_a_config_error(expression: str) -> None:
    """Nothing else is ever raised, and every literal is a bound parameter."""
    try:
        condition = where(expression)
    except ConfigError as error:
        assert error.where  # noqa: PT017
        str(error).encode()
    else:
        dialect = postgresql.dialect()  # type: ignore[no-untyped-call]
        sql = str(condition.compile(dialect=dialect))
        assert re.search(r"['\";]", sql) is None


@pytest.mark.parametrize(
    "expression",
    [
        "__import__('os').system('true')",
        "run.__class__ == 'x'",
        "().__class__.__bases__[0].__subclasses__()",
        "run == ''.join(['x'])",
        "[x for x in run] == []",
        "(lambda: vetted)()",
        "(vetted := True)",
        "vetted if True else vetted",
        "f'{run}' == 'x'",
        "id in range(10)",
        "id == 1 + 1",
        "id == 2 ** 10 ** 10",
        "id ** 2 == 4",
        "run[0] == 'x'",
        "run == b'x'",
        "id == 1j",
        "id == ...",
        "await run == 1",
        "*vetted, vetted",
        "{'a': 1} == run",
        "1 == 1",
        "'a' in 'ab'",
        "id",
        "answer",
        "1",
        "'vetted'",
        "None",
        "id is 1",
        "vetted < True",
        "vetted == 1",
        "id == True",
        "id == '1'",
        "run == 1",
        "run > None",
        "answer == vetted",
        "id in run",
        "1 in run",
        "run in id",
        "id in [run]",
        "id in [[1]]",
        "created_at > 'yesterday'",
        "created_at > 5",
        "run == 'a\\0b'",
        "run == '\\ud800'",
        f"id == {2**63}",
        "end == 'answred'",
        "tier in ['A', 'Z']",
        "vetted; vetted",
        "vetted = True",
        "vetted -- comment",
        "import os",
    ],
)
def test_everything_outside_the_language_is_refused_with_its_column(expression: str) -> None:
    error = refused(expression)
    assert re.match(r"column \d+ of the expression: ", error.where or "")
    assert error.remedy


@pytest.mark.parametrize(
    "expression",
    [
        "not " * 900 + "vetted",
        "-" * 3900 + "1 == id",
        "(" * 1900 + "vetted" + ")" * 1900,
        "[" * 1900 + "]" * 1900,
        "run" + ".a" * 1900,
        "1" + "+1" * 1900 + " == id",
        "x" * (MAX_LENGTH + 1),
        "vetted or " * 10_000 + "vetted",
    ],
)
def test_huge_nesting_and_length_are_refused(expression: str) -> None:
    assert len(str(refused(expression))) < 500


def test_depth_up_to_the_bound_works() -> None:
    where("not " * (MAX_DEPTH - 1) + "vetted")
    assert "deep" in refused("not " * MAX_DEPTH + "vetted").what


def test_unknown_field_points_at_its_column_and_names_the_nearest() -> None:
    error = refused("vetted and not subjct == 'é'")
    assert "'subjct'" in error.what
    assert error.where == "column 16 of the expression: vetted and not subjct == 'é'"
    assert "'subject'" in (error.remedy or "")
    assert "column 18 " in (refused("run == 'ééé' and x").where or "")
    assert "'True'" in (refused("vetted == true").remedy or "")
    assert "quotes" in (refused("run == zzz").remedy or "")
    assert "'answered'" in (refused("end == 'answred'").remedy or "")


@pytest.mark.parametrize("wanted", [{"columns": ("idd",)}, {"order": ("-idd",)}, {"columns": ()}])
def test_unknown_column_or_order_is_refused(wanted: dict[str, tuple[str, ...]]) -> None:
    with pytest.raises(ConfigError):
        query.statement(Query(**wanted))  # type: ignore[arg-type]


def test_every_field_can_be_selected_compared_and_ordered_by(filled: Database) -> None:
    literals = {Kind.TEXT: "'x'", Kind.INTEGER: "1", Kind.NUMBER: "1.5", Kind.BOOLEAN: "True",
                Kind.TIME: "'2026-05-01 12:00'", Kind.TEXTS: "'x'"}  # fmt: skip
    kinds = {Kind.TEXT: str, Kind.INTEGER: int, Kind.NUMBER: float, Kind.BOOLEAN: bool,
             Kind.TIME: datetime, Kind.TEXTS: list}  # fmt: skip
    for name, field in FIELDS.items():
        value = repr(str(field.values[0])) if field.values else literals[field.kind]
        is_list = field.kind is Kind.TEXTS
        condition = f"{value} in {name}" if is_list else f"{name} == {value}"
        rows(filled, condition, name, order=() if is_list else (name,))
        found = {type(v) for (v,) in rows(filled, "", name) if v is not None}
        assert found <= {kinds[field.kind]}, name
        assert field.description


def test_times_are_compared_in_utc_unless_they_say_otherwise(filled: Database) -> None:
    soon = datetime.now(UTC) + timedelta(hours=1)
    assert query.count(filled, f"created_at < '{soon.replace(tzinfo=None)}'") == 23
    assert query.count(filled, f"created_at > '{soon}'") == 0
    for odd in ("0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59-14:00"):
        query.count(filled, f"created_at > '{odd}'")
