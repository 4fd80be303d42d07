"""query, show, stats, runs, db as a person types them, on a real database."""

from __future__ import annotations

import csv
import io
import json
import re
import shlex
import unicodedata
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import typer
from sqlalchemy import Engine, event, text
from typer.testing import CliRunner, Result

from shared.store import Database, ItemState
from shared.store.models import RunRow, VerdictRow
from shared.terminal import console, json_text, line, visible
from shared.trajectory import Step, Trajectory
from tests import stored
from tests.cli import error_of, said
from tirgen import query, stats
from tirgen.cli import db as db_commands
from tirgen.cli import read
from tirgen.cli import runs as run_commands
from tirgen.cli.export import write_csv, write_jsonl
from tirgen.fields import FIELDS, FUNCTIONS, STEP_FIELDS, Kind

ROOT = Path(__file__).parents[2]
SGR = re.compile(r"\x1b\[[0-9;]*m")  # colours, as rich writes them
Tirgen = Callable[..., Result]


@pytest.fixture
def tirgen(db: Database, monkeypatch: pytest.MonkeyPatch) -> Tirgen:
    app = typer.Typer()
    for command in (read.query, read.show, read.stats):
        app.command()(command)
    app.add_typer(db_commands.app, name="db")
    app.add_typer(run_commands.app, name="runs")
    url = db.url.render_as_string(hide_password=False)
    monkeypatch.setenv("TIRGEN_DATABASE_URL", url)

    def run(*arguments: str) -> Result:
        return CliRunner().invoke(app, [str(a) for a in arguments])

    return run


@pytest.fixture
def filled(db: Database) -> Database:
    stored.fill(db)
    return db


# query


def documented() -> list[str]:
    """Every `tirgen query` that somebody could paste from the documentation."""
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    lines = [line for page in pages for line in page.read_text().splitlines()]
    found = [line.strip().removeprefix("$ ") for line in lines]
    return [*query.EXAMPLES, *(line for line in found if line.startswith("tirgen query "))]


def test_every_documented_query_works(tirgen: Tirgen, filled: Database) -> None:
    for written in documented():
        words = shlex.split(written, comments=True)
        words = words[: min((words.index(w) for w in (">", "|") if w in words), default=None)]
        said(tirgen(*words[1:]))


def test_all_formats_hold_the_same_rows(tirgen: Tirgen, filled: Database) -> None:
    """Of every field, times and missing values included."""
    arguments = ["query", "n_calls > 0", "--columns", ",".join(FIELDS), "--order", "-n_tokens"]

    def output(name: str) -> Result:
        return tirgen(*arguments, "--format", name)

    rows = json.loads(said(output("json")))
    assert len(rows) == 21
    assert [row["n_tokens"] for row in rows] == sorted((r["n_tokens"] for r in rows), reverse=True)
    assert [json.loads(one) for one in said(output("jsonl")).splitlines()] == rows
    table = pq.read_table(io.BytesIO(output("parquet").stdout_bytes))
    assert table.column_names == list(FIELDS)
    plain = [{**r, "created_at": r["created_at"].isoformat()} for r in table.to_pylist()]
    assert plain == rows
    cells = list(csv.DictReader(io.StringIO(said(output("csv")))))
    assert cells == [{k: in_csv(v) for k, v in row.items()} for row in rows]


def in_csv(value: Any) -> str:
    return "" if value is None else json.dumps(value) if isinstance(value, list) else str(value)


def test_empty_result_is_valid_in_every_format(tirgen: Tirgen, db: Database) -> None:
    def output(name: str) -> Result:
        return tirgen("query", "vetted", "--format", name)

    assert json.loads(said(output("json"))) == []
    assert said(output("jsonl")) == ""
    assert said(output("csv")) == ",".join(query.DEFAULT_COLUMNS) + "\n"
    assert pq.read_table(io.BytesIO(output("parquet").stdout_bytes)).num_rows == 0
    assert "No trajectory" in said(output("table"))


@pytest.mark.parametrize("width", [80, 120])
def test_tables_fit_the_terminal(
    tirgen: Tirgen, filled: Database, monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    monkeypatch.setattr(console, "width", width)
    commands = [
        ("query",),
        ("query", "--columns", "id,problem,hash,answer,run,vetted,created_at"),
        ("runs",),
        ("stats", "one"),
        ("show", "7"),
    ]
    for command in commands:
        lines = said(tirgen(*command)).splitlines()
        assert max(map(len, lines)) <= width, command


def test_cut_table_says_that_there_are_more(tirgen: Tirgen, filled: Database) -> None:
    assert "There are more" in said(tirgen("query"))
    assert "There are more" in said(tirgen("query", "--limit", "3"))
    assert "There are more" not in said(tirgen("query", "--limit", "21"))
    assert len(said(tirgen("query", "--format", "jsonl")).splitlines()) == 21


def test_fields_lists_every_field(tirgen: Tirgen) -> None:
    table = said(tirgen("query", "--fields"))
    assert [name for name in (*FIELDS, *STEP_FIELDS) if f"\n{name} " not in table] == []
    assert [name for name in FUNCTIONS if f"\n{name} " not in table] == []
    listed = json.loads(said(tirgen("query", "--fields", "--format", "json")))
    assert [one["field"] for one in listed if one.get("of") == "trajectory"] == list(FIELDS)


def test_mistake_in_a_query_is_found_before_the_database_is_asked(
    tirgen: Tirgen, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TIRGEN_DATABASE_URL", "postgresql://nobody@127.0.0.1:1/none")
    for arguments in (["vettted"], ["--columns", "idd"], ["--order=-idd"]):
        error = error_of(tirgen("query", *arguments))
        assert error.exit_code == 2
        assert "did you mean" in (error.remedy or "")
    assert error_of(tirgen("query", "vetted")).exit_code == 1  # no server there
    assert tirgen("query", "--limit", "0").exit_code == 2
    assert tirgen("query", "--format", "xml").exit_code == 2


# What is refused; kinds of attack, as somebody might type them
HOSTILE = [
    "run.__class__.__mro__",
    "__import__('os').system('true')",
    "(lambda: vetted)()",
    "[x for x in (1, 2)] == id",
    "(vetted := True)",
    "f'{run}' == 'x'",
    "any_step(any_step(has_call))",
    "any_step(vetted)",
    "any_step(outcome='ok')",
    "any_step()",
    "all_steps(*outcome)",
    "contains(run)",
    "contains('')",
    "contains('a') or contains('b') or contains('c') or contains('d')",
    "any_step(contains('a'))",
    "check('anwser')",
    "check(run)",
    "pg_sleep(10)",
    "query.contains('x')",
    "'x' in outcomes",
    "imports == 'sympy'",
    "imports < outcomes",
    "vetted; DROP TABLE runs",
    "vetted' OR '1'='1",
    "run == 'a\0b'",
    "vetted -- \0",
    "id == " + "9" * 3000,
    "id == 1" + "0" * 10_000,
    "run == '" + "x" * 10_000 + "'",
    "not " * 500 + "vetted",
    "(" * 900 + "vetted" + ")" * 900,
    "any_step(" + "not " * 60 + "has_call)",
    "vetted and " * 3000 + "vetted",
]


def test_hostile_expressions_are_refused_and_never_reach_the_database(
    tirgen: Tirgen, filled: Database
) -> None:
    """Exit code 2 and a message for each. Control: an honest one asks the database."""
    asked: list[str] = []

    def heard(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        asked.append(statement)

    event.listen(Engine, "before_cursor_execute", heard)
    try:
        for expression in HOSTILE:
            for more in ([], ["--count"], ["--format", "jsonl"]):
                error = error_of(tirgen("query", expression, *more))
                assert (error.exit_code, bool(error.what)) == (2, True), expression
                assert len(str(error)) < 600
        assert asked == []
        said(tirgen("query", "vetted"))
        assert asked
    finally:
        event.remove(Engine, "before_cursor_execute", heard)


def test_groups_and_counts_are_printed_in_every_format(tirgen: Tirgen, filled: Database) -> None:
    command = ["query", "--group-by", "run", "--columns", "n_tokens"]
    rows = json.loads(said(tirgen(*command, "--format", "json")))
    assert [(r["run"], r["n"], r["n_vetted"]) for r in rows] == [("one", 20, 12), ("two", 1, 1)]
    assert rows[0]["low"] < rows[0]["rate"] == 0.6 < rows[0]["high"]
    lines = said(tirgen(*command, "--format", "jsonl")).splitlines()
    assert [json.loads(one) for one in lines] == rows
    table = pq.read_table(io.BytesIO(tirgen(*command, "--format", "parquet").stdout_bytes))
    assert table.to_pylist() == rows
    assert re.search(r"^one +20 +12 +0.6 ", said(tirgen(*command)), re.MULTILINE)
    assert json.loads(said(tirgen("query", "vetted", "--count", "--format", "json")))[0]["n"] == 13
    assert error_of(tirgen("query", "--count", "--order", "id")).exit_code == 2


def test_table_names_the_next_page(tirgen: Tirgen, filled: Database) -> None:
    assert "--after 5 " in said(tirgen("query", "--limit", "5"))
    second = said(tirgen("query", "--limit", "5", "--after", "5"))
    assert re.search(r"^ 6 ", second, re.MULTILINE)
    assert "--after 10 " in second
    assert "--after" not in said(tirgen("query", "--limit", "5", "--columns", "run"))
    assert "--after 6 " in said(tirgen("query", "contains('Multiply') and id > 1", "--limit", "5"))


# show


def acts_on_a_terminal(shown: str) -> list[str]:
    """Characters that do more than to be seen (Cc: control, Cf: reordering and the like)."""
    return [c for c in shown if c != "\n" and unicodedata.category(c) in ("Cc", "Cf", "Zl", "Zp")]


@pytest.fixture
def hostile(db: Database) -> int:
    """A trajectory all of whose texts try to take over the terminal."""
    bad = stored.HOSTILE
    made = stored.trajectory(1)
    call = made.steps[0].call
    assert call is not None
    evil = replace(call, code=f"print('{bad}')", observation=bad)
    steps = (Step(bad, evil, original=bad, discarded=(evil,)), Step(bad))
    with db.begin() as session:
        run = stored.add_run(session, f"run{bad}", 1)
        wanted = replace(made, steps=steps, text=bad, answer=bad)
        written = stored.add_item(session, run, 1, ItemState.VETTED, wanted)
        assert written is not None
        session.add(
            VerdictRow(
                trajectory_id=written, check_name="judge", passed=None, version="1", reason=bad,
                evidence={"said": bad}, duration=0.0,
            )
        )  # fmt: skip
        return written


def test_control_hostile_text_would_act_on_a_terminal() -> None:
    assert len(acts_on_a_terminal(stored.HOSTILE)) >= 4


def test_hostile_output_is_shown_and_not_obeyed(tirgen: Tirgen, hostile: int) -> None:
    shown = said(tirgen("show", str(hostile)))
    assert acts_on_a_terminal(shown) == []
    assert shown.count("[bold]bold[/bold] [link=http://x]x[/link]") >= 6
    assert r"\x1b[31mred\x1b]0;title\x07" in shown
    for command in (["query"], ["runs"], ["query", "--format", "json"]):
        assert acts_on_a_terminal(said(tirgen(*command))) == []
    assert acts_on_a_terminal(said(tirgen("show", str(hostile), "--format", "json"))) == []


def test_hostile_output_is_harmless_in_colour_too(
    tirgen: Tirgen, hostile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "_force_terminal", True)
    monkeypatch.setattr(console, "_color_system", 1)
    shown = said(tirgen("show", str(hostile)))
    assert SGR.search(shown)
    assert acts_on_a_terminal(SGR.sub("", shown)) == []
    assert "\x1b]" not in shown


def test_json_is_safe_on_a_terminal_and_loses_nothing() -> None:
    every = "".join(map(chr, range(0x3000)))
    assert json.loads(json_text(every)) == every
    for shown in (json_text(stored.HOSTILE), visible(stored.HOSTILE), line(stored.HOSTILE)):
        assert acts_on_a_terminal(shown) == []


def test_csv_is_exact_in_a_file_and_harmless_on_a_terminal() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for out, exact in ((io.StringIO(), True), (Terminal(), False)):
        write_csv({"answer": Kind.TEXT}, iter([(stored.HOSTILE,)]), out)
        found = list(csv.reader(io.StringIO(out.getvalue(), newline="")))[1][0]
        assert (found == stored.HOSTILE) is exact
        assert (acts_on_a_terminal(found) == []) is not exact


def test_show_tells_all_there_is_about_a_trajectory(tirgen: Tirgen, filled: Database) -> None:
    shown = said(tirgen("show", "7"))
    wanted = [
        "Trajectory 7  rejected by answer", "Problem 7: 6 times 7?", "6 * 7 = 41", "Multiply.",
        "print(prod([6, 7]))", "taken back", "print(6 * '7' * x)", "NameError: x", "model error",
        "Once more.", r"\boxed{42}", "Verdicts", "1/g1", "equal as numbers", "undecided",
        "code_version", "tier B", "seed",
    ]  # fmt: skip
    assert [part for part in wanted if part not in shown] == []


def test_only_the_newest_verdict_of_a_check_is_shown(tirgen: Tirgen, filled: Database) -> None:
    with filled.begin() as session:
        session.add(
            VerdictRow(
                trajectory_id=7, check_name="answer", passed=True, version="2/g2",
                reason="a better grader", evidence={}, duration=0.0,
            )
        )  # fmt: skip
    shown = said(tirgen("show", "7"))
    assert "a better grader" in shown
    assert "1/g1" not in shown


def test_show_as_json_holds_the_body_and_the_verdicts(tirgen: Tirgen, filled: Database) -> None:
    body = json.loads(said(tirgen("show", "7", "--format", "json")))
    made = replace(stored.trajectory(7), problem_key=stored.problem(7).key)
    assert Trajectory.from_body(body["trajectory"]) == made
    assert [v["check_name"] for v in body["verdicts"]] == ["executed", "answer", "judge"]
    assert (body["run"], body["reference"], body["vetted"]) == ("one", "42", False)


def test_show_of_nothing_is_an_error(tirgen: Tirgen, db: Database) -> None:
    assert "no such trajectory" in error_of(tirgen("show", "999")).what
    assert tirgen("show", "x").exit_code == 2


# stats and runs


def test_stats_reconcile_with_sql(tirgen: Tirgen, filled: Database) -> None:
    found = json.loads(said(tirgen("stats", "one", "--format", "json")))
    with filled.session() as session:
        states = session.execute(
            text("SELECT state, count(*) FROM work_items WHERE run_id = 1 GROUP BY state")
        ).all()
        assert {k: v for k, v in found["items"].items() if v} == {s: int(n) for s, n in states}
    assert found["discrepancies"] == []
    assert found["n_items"] == 24 == sum(found["items"].values())
    assert (found["rejected"], found["failed"]) == ({"answer": 8}, {"timeout": 4})
    assert found["yield"] == 0.5
    assert found["yield_interval"][0] < 0.5 < found["yield_interval"][1]
    assert sum(s["vetted"] for s in found["subjects"]) == 12
    assert {u["role"]: u["requests"] for u in found["usage"]} == {"extractor": 72, "reasoner": 72}
    # 20 trajectories: 1 good call each; odd numbers took one back; every fourth has a failed one.
    assert found["outcomes"] == {"ok": 20, "model_error": 4}
    assert (found["n_corrections"], found["n_with_failed_call"]) == (8, 4)
    page = said(tirgen("stats", "one"))
    assert "The counts reconcile: 24 items = 12 vetted + 8 rejected + 4 failed" in page


def test_stats_say_what_a_run_cost_where_tokens_have_a_price(
    tirgen: Tirgen, filled: Database
) -> None:
    assert "cost" not in said(tirgen("stats", "one"))
    prices = {"reasoner": {"endpoint": {"prompt_price": 3.0, "completion_price": 15.0}}}
    with filled.begin() as session:
        update = "UPDATE runs SET config = :config WHERE name = 'one'"
        session.execute(text(update), {"config": json.dumps(prices)})
    found = {
        u["role"]: u for u in json.loads(said(tirgen("stats", "one", "--format", "json")))["usage"]
    }
    spoken = found["reasoner"]
    due = (3 * spoken["prompt_tokens"] + 15 * spoken["completion_tokens"]) / 1e6
    assert spoken["cost"] == pytest.approx(due)
    assert found["extractor"]["cost"] == 0
    assert f"{due:.3g}" in said(tirgen("stats", "one"))


def test_stats_say_so_when_counts_do_not_reconcile(tirgen: Tirgen, filled: Database) -> None:
    with filled.begin() as session:
        run = session.get(RunRow, 1)
        assert run is not None
        run.n_items = 25
    page = said(tirgen("stats", "one"))
    assert "do NOT reconcile: 25 items of the run, but 24 items by state" in page
    assert json.loads(said(tirgen("stats", "one", "--format", "json")))["discrepancies"]


def test_stats_are_of_one_moment(filled: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """An item that ends between two of the counting statements is in none of the counts."""
    count_ends = stats._ends

    def meanwhile(*arguments: Any) -> Any:
        with filled.begin() as session:
            run = session.get(RunRow, 1)
            assert run is not None
            run.n_items = 25
            stored.add_item(session, run, 24, ItemState.VETTED)
        return count_ends(*arguments)

    monkeypatch.setattr(stats, "_ends", meanwhile)
    found = stats.gather(filled, "one")
    assert (found.trajectories.n, sum(found.ends.values())) == (20, 20)
    assert found.discrepancies() == []
    with filled.session() as session:  # and later sessions are ordinary ones again
        assert session.scalar(text("SHOW transaction_isolation")) == "read committed"
    monkeypatch.undo()
    assert stats.gather(filled, "one").trajectories.n == 21


def test_stats_of_empty_running_and_unknown_runs(tirgen: Tirgen, filled: Database) -> None:
    assert "0 items = 0" in said(tirgen("stats", "none"))
    assert "2 queued" in said(tirgen("stats", "two"))
    error = error_of(tirgen("stats", "nope"))
    assert error.exit_code == 2
    assert "one" in (error.remedy or "")


def test_plot_is_drawn_or_refused_with_a_reason(
    tirgen: Tirgen, filled: Database, tmp_path: Path
) -> None:
    for run in ("one", "two", "none"):
        said(tirgen("stats", run, "--plot", tmp_path / f"{run}.png"))
        assert (tmp_path / f"{run}.png").read_bytes().startswith(b"\x89PNG")
    for target in (tmp_path / "no" / "x.png", tmp_path / "x.docx"):
        assert error_of(tirgen("stats", "one", "--plot", target)).exit_code == 2


def test_runs_are_listed_newest_first(tirgen: Tirgen, filled: Database) -> None:
    rows = json.loads(said(tirgen("runs", "--format", "json")))
    assert [(r["run"], r["n_open"], r["yield"]) for r in rows] == [
        ("none", 0, None), ("two", 2, 1.0), ("one", 0, 0.5),
    ]  # fmt: skip
    assert re.search(r"^one +done +24/24 +12 +8 +4 +50.0 %", said(tirgen("runs")), re.MULTILINE)


def test_runs_of_an_empty_database_say_what_to_do(tirgen: Tirgen, db: Database) -> None:
    assert "tirgen generate" in said(tirgen("runs"))
    assert json.loads(said(tirgen("runs", "--format", "json"))) == []


def test_wilson_interval_agrees_with_the_published_example() -> None:
    """k=8, n=10 at 95 %: 0.490 to 0.943 (Agresti and Coull 1998)."""
    assert stats.wilson(8, 10) == pytest.approx((0.490, 0.943), abs=1e-3)
    assert stats.wilson(0, 0) is None


# export


def test_jsonl_writes_each_row_as_it_comes() -> None:
    """Nothing is held back: the first row is out before the second is asked for."""
    out = io.StringIO()

    def rows() -> Any:
        yield (1,)
        assert out.getvalue() == '{"id": 1}\n'
        yield (2,)

    write_jsonl({"id": Kind.INTEGER}, rows(), out)
    assert len(out.getvalue().splitlines()) == 2
