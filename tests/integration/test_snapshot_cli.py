"""tirgen snapshot as a person types it, and tirgen.Client's snapshots, on a real database."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

import pytest
from sqlalchemy import update
from typer.testing import CliRunner, Result

from shared.errors import ConfigError, InputError
from shared.sandbox import Sandbox
from shared.sandbox.observation import observe
from shared.store import Database, ItemState
from shared.store.models import RunRow
from shared.trajectory import End, Step, ToolCall, Trajectory
from tests import frozen, stored
from tests.cli import error_of, said
from tirgen import Client, seeds
from tirgen.cli import snapshot
from tirgen.config import load

Tirgen = Callable[..., Result]
New = Callable[[], AbstractContextManager[str]]


@pytest.fixture
def tirgen(db: Database, monkeypatch: pytest.MonkeyPatch) -> Tirgen:
    url = db.url.render_as_string(hide_password=False)
    monkeypatch.setenv("TIRGEN_DATABASE_URL", url)

    def run(*arguments: str | Path, answer: str | None = None) -> Result:
        return CliRunner().invoke(snapshot.app, [str(a) for a in arguments], input=answer)

    return run


def test_from_creation_to_another_database(
    tirgen: Tirgen, db: Database, tmp_path: Path, new_database: New, monkeypatch: pytest.MonkeyPatch
) -> None:
    frozen.fill(db, 40)
    assert "No snapshots yet" in said(tirgen("list"))
    split = ("--split", "train=0.8,valid=0.2")
    page = said(tirgen("create", "a", "--where", "vetted", "--seed", "1", *split))
    made = json.loads(said(tirgen("show", "a", "--format", "json")))
    assert made["digest"] in page
    assert made["n_rows"] == 32 == sum(made["splits"].values())
    assert made["lineage"]["funnel"][0]["before"] == 40
    said(tirgen("create", "b", "--where", "vetted and n_tokens > 20", "--seed", "1"))
    said(tirgen("create", "p", "--kind", "problems"))

    listed = json.loads(said(tirgen("list", "--format", "json")))
    assert [(one["name"], one["kind"]) for one in listed] == [
        ("p", "problems"), ("b", "trajectories"), ("a", "trajectories"),
    ]  # fmt: skip
    assert "train" in said(tirgen("list"))
    difference = json.loads(said(tirgen("diff", "a", "b", "--format", "json")))
    n_less = difference["only_in_first"]
    assert difference["in_both"] + n_less == 32
    assert n_less > 0 == difference["only_in_second"]
    assert difference["lineage"]["where"] == ["vetted", "vetted and n_tokens > 20"]
    assert "rows only in a" in said(tirgen("diff", "a", "b"))

    assert "is what was frozen: 32 rows" in said(tirgen("verify", "a"))
    assert made["digest"] in said(tirgen("export", "a", "--to", tmp_path / "a"))
    assert "is what was frozen" in said(tirgen("verify", f"{tmp_path}/a"))
    with new_database() as url:
        monkeypatch.setenv("TIRGEN_DATABASE_URL", url)
        assert made["digest"] in said(tirgen("import", tmp_path / "a"))
        assert json.loads(said(tirgen("show", "a", "--format", "json"))) == made
        client = Client(url)
        assert client.snapshots.show("a").digest == made["digest"]
        assert len(list(client.snapshots.open("a").rows())) == 32
        client.db.close()


def test_verify_tells_a_script(tirgen: Tirgen, db: Database) -> None:
    frozen.fill(db, 10)
    said(tirgen("create", "a"))
    frozen.alter(db, "UPDATE verdicts SET reason = 'because' WHERE id IN (1, 5)")
    result = tirgen("verify", "a", "--format", "json")
    assert result.exit_code == 1
    found = json.loads(result.output)
    assert (found["sound"], len(found["findings"]), found["n_checked"]) == (False, 2, 10)
    result = tirgen("verify", "a")
    assert result.exit_code == 1
    assert "NOT what was frozen: 2 findings" in result.output


def test_delete_asks_first(tirgen: Tirgen, db: Database) -> None:
    frozen.fill(db, 10)
    said(tirgen("create", "a"))
    assert tirgen("delete", "a", answer="n\n").exit_code == 1
    assert "a" in said(tirgen("list"))
    said(tirgen("delete", "a", answer="y\n"))
    said(tirgen("create", "a"))
    said(tirgen("delete", "a", "--yes"))
    assert "No snapshots yet" in said(tirgen("list"))
    assert isinstance(error_of(tirgen("delete", "a", "--yes")), InputError)


MISTAKES = {
    ("create", "a", "--where", "vettet"): "vettet",
    ("create", "a", "--where", "__import__('os')"): "__import__",
    ("create", "a/b"): "cannot be the name",
    ("create", "a", "--split", "train=0.9"): "sum to 0.9",
    ("create", "a", "--filters", "papre"): "filters",
    ("show", "a"): "no snapshot named",
    ("verify", "./nowhere"): "no exported snapshot",
    ("import", "nowhere"): "no exported snapshot",
    ("export", "a", "--to", "x"): "no snapshot named",
    ("create", "a"): "nothing is left",
}


def test_mistakes_are_told_and_cost_nothing(tirgen: Tirgen) -> None:
    for arguments, says in MISTAKES.items():
        error = error_of(tirgen(*arguments))
        assert says in error.what
        assert error.exit_code == 2
        assert error.remedy


def test_nothing_a_model_or_user_wrote_acts_on_the_terminal(tirgen: Tirgen, db: Database) -> None:
    frozen.fill(db, 4, run=stored.HOSTILE)
    with db.begin() as session:
        session.execute(update(RunRow).values(fingerprint=stored.HOSTILE))
    for output in (
        said(tirgen("create", "a")), said(tirgen("show", "a", "--format", "json")),
        said(tirgen("diff", "a", "a")), said(tirgen("list")),
    ):  # fmt: skip
        bad = [c for c in output if unicodedata.category(c) in ("Cc", "Cf") and c != "\n"]
        assert bad == []


# --execute


def executed(i: int, code: str, sandbox: Sandbox, observation: str | None = None) -> Trajectory:
    """A trajectory of one call, as the graph would have made it."""
    tool = load("nano", base_url="http://127.0.0.1:1/v1").tool
    result = sandbox.run(code, seed=seeds.tool(i, 0), timeout=tool.timeout)
    call = ToolCall(code, observation or observe(result, tool.observation), result)
    made = stored.trajectory(i)
    steps = (Step("Draw. ", call), Step("So \\boxed{42}."))
    return replace(made, steps=steps, end=End.ANSWERED, seed=i)


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    with Sandbox(zygotes=1) as sandbox:
        yield sandbox


def test_execute_runs_the_code_again_and_compares(
    tirgen: Tirgen, db: Database, tmp_path: Path, sandbox: Sandbox
) -> None:
    """Also code that draws at random: it gets its own seed again. The clock does not come back."""
    codes = ("print(6 * 7)", "import random\nprint(random.random())", "print(1 / 0)")
    with db.begin() as session:
        run = stored.add_run(session, "one", 4)
        run.config = frozen.config()
        for i, code in enumerate(codes):
            made = executed(i, code, sandbox)
            stored.add_item(session, run, i, ItemState.VETTED, made)
    said(tirgen("create", "good"))
    assert "the code of 3 run again" in said(tirgen("verify", "good", "--execute"))
    said(tirgen("export", "good", "--to", tmp_path / "good"))
    assert "the code of 3 run again" in said(tirgen("verify", tmp_path / "good", "--execute"))

    with db.begin() as session:
        made = executed(3, "print(6 * 7)", sandbox, observation="43")
        run = session.merge(run)
        stored.add_item(session, run, 3, ItemState.VETTED, made)
    said(tirgen("create", "bad"))
    assert "is what was frozen" in said(tirgen("verify", "bad"))
    result = tirgen("verify", "bad", "--execute", "--format", "json")
    assert result.exit_code == 1
    [finding] = json.loads(result.output)["findings"]
    assert finding["what"] == "step 0 gave another output when run again"

    said(tirgen("create", "p", "--kind", "problems"))
    assert isinstance(error_of(tirgen("verify", "p", "--execute")), ConfigError)
