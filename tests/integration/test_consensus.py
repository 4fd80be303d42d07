"""tirgen consensus: what samples agree on is stored, shown and asked for; doubtful references."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import typer
from sqlalchemy import func, select
from typer.testing import CliRunner, Result

from shared.errors import InputError
from shared.store import Completed, Database, trajectories
from shared.store.models import ConsensusRow, WorkItemRow
from shared.trajectory import End, Problem, Step, Trajectory
from tests import stored
from tirgen import agreement, query
from tirgen.cli import read
from tirgen.cli import verify as cli

# problem, reference, the samples' answers
SAMPLES = {
    "right": ("1/2", ("0.5", r"\frac{1}{2}", "3", "0.50")),
    "wrong reference": ("9", ("7", "7.0", "7", "9")),
    "tie": ("1", ("1", "2", "1", "2")),
    "one vote": ("5", ("4", None, None, None)),
    "nothing": ("5", (None, None, None, None)),
    stored.HOSTILE: ("9", ("8", "8", "8", "9")),
}
Tirgen = Callable[..., Result]


def add(db: Database, name: str, samples: dict[str, tuple[str, tuple[str | None, ...]]]) -> None:
    with db.begin() as session:
        run = stored.add_run(session, name, sum(len(answers) for _, answers in samples.values()))
        for label, (reference, answers) in samples.items():
            problem = Problem(f"The problem: {label}", reference, "test", label)
            trajectories.import_problems(session, [problem])
            for i, answer in enumerate(answers):
                add_sample(db, session, run.id, problem, i, answer)


def add_sample(
    db: Database, session: object, run_id: int, problem: Problem, i: int, answer: str | None
) -> None:
    item = WorkItemRow(
        run_id=run_id, problem_key=problem.key, sample_index=i, fingerprint="f",
        idempotency_key=f"{run_id}/{problem.key}/{i}", state="vetted",
    )  # fmt: skip
    session.add(item)  # type: ignore[attr-defined]
    session.flush()  # type: ignore[attr-defined]
    step = Step(f"Sample {i} of {problem.text}")
    made = Trajectory(problem.key, (step,), step.thought, End.ANSWERED, answer, False, i, 1)
    done = Completed(made, (), None, 1.0, "m", "m", "c")
    trajectories.write_trajectory(session, run_id, item.id, done)  # type: ignore[arg-type]


@pytest.fixture
def tirgen(db: Database, monkeypatch: pytest.MonkeyPatch) -> Tirgen:
    app = typer.Typer()
    for command in (cli.consensus, cli.verify, read.stats, read.query):
        app.command()(command)
    url = db.url.render_as_string(hide_password=False)
    monkeypatch.setenv("TIRGEN_DATABASE_URL", url)
    return lambda *arguments: CliRunner().invoke(app, list(arguments))


@pytest.fixture
def run(db: Database) -> Database:
    add(db, "run", SAMPLES)
    return db


def table(db: Database) -> dict[str, ConsensusRow]:
    with db.session() as session:
        rows = session.scalars(select(ConsensusRow)).all()
    keys = {Problem(f"The problem: {k}", v[0]).key: k for k, v in SAMPLES.items()}
    return {keys[row.problem_key]: row for row in rows}


def compare(db: Database, **options: bool) -> agreement.Compared:
    return agreement.compare(db, agreement.find(db, "run"), **options)


def test_the_majority_is_counted_by_equality_and_held_against_the_reference(run: Database) -> None:
    assert compare(run).n_compared == len(SAMPLES)
    found = {
        name: (row.votes, row.n_answers, row.answer, row.share, row.tied, row.disagrees)
        for name, row in table(run).items()
    }
    assert found["right"] == (3, 4, "0.5", 0.75, False, False)
    assert found["wrong reference"] == (3, 4, "7", 0.75, False, True)
    assert found["tie"] == (2, 4, None, 0.5, True, None), "nobody is elected"
    assert found["one vote"] == (1, 1, "4", 0.25, False, None), "one sample is no consensus"
    assert found["nothing"] == (0, 0, None, None, False, None)
    assert {row.n_samples for row in table(run).values()} == {4}


def test_what_cannot_be_decided_is_neither_agreement_nor_disagreement(db: Database) -> None:
    """A tower of powers: nobody may evaluate it, so nobody can say that it is not the reference."""
    add(db, "run", {"tower": ("7", ("9^{9^{9^9}}",) * 3 + ("7",))})
    compare(db)
    with db.session() as session:
        row = session.scalars(select(ConsensusRow)).one()
        assert (row.votes, row.disagrees) == (3, None)
        assert agreement.summary(session, row.run_id, 10).n_undecided == 1


def test_what_is_up_to_date_is_skipped_and_a_new_sample_is_seen(run: Database) -> None:
    compare(run)
    before = {name: row.created_at for name, row in table(run).items()}
    again = compare(run)
    assert (again.n_compared, again.n_skipped) == (0, len(SAMPLES))
    assert {name: row.created_at for name, row in table(run).items()} == before
    with run.begin() as session:
        run_id = agreement.find(run, "run").run_id
        problem = Problem("The problem: tie", "1", "test", "tie")
        add_sample(run, session, run_id, problem, 4, "2")
    assert compare(run).n_compared == 1
    assert (table(run)["tie"].answer, table(run)["tie"].disagrees) == ("2", True)
    assert compare(run, force=True).n_compared == len(SAMPLES)


def test_a_new_version_of_the_grader_compares_anew(
    run: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    compare(run)
    monkeypatch.setattr("tirgen.agreement.VERSION", "next")
    assert compare(run).n_compared == len(SAMPLES)
    assert {row.version for row in table(run).values()} == {"next"}
    with run.session() as session:
        assert session.scalar(select(func.count()).select_from(ConsensusRow)) == len(SAMPLES)


def test_problems_pass_in_batches_and_none_is_left_out(
    run: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tirgen.agreement.BATCH", 4)
    seen: list[int] = []
    found = agreement.find(run, "run")
    done = agreement.compare(run, found, advance=seen.append)
    assert seen == [4, 2]
    assert done.n_compared == found.n_problems == len(SAMPLES)


def test_doubtful_references_are_listed_most_votes_first(db: Database, tirgen: Tirgen) -> None:
    add(
        db,
        "run",
        {"weak": ("1", ("2", "2", "3", "4")), "strong": ("1", ("2", "2", "2", "3")), **SAMPLES},
    )
    result = tirgen("consensus", "run", "--format", "json")
    assert result.exit_code == 0
    found = json.loads(result.stdout)
    listed = [one["problem_id"] for one in found["queue"]]
    assert set(listed[:3]) == {"strong", "wrong reference", stored.HOSTILE}
    assert listed[3:] == ["weak"]
    assert found["n_disagree"] == len(found["queue"])
    assert found["n_problems"] == found["n_compared"] == len(SAMPLES) + 2


def test_stats_show_the_list_once_there_is_one(run: Database, tirgen: Tirgen) -> None:
    before = tirgen("stats", "run")
    assert "reference wrong?" not in before.output
    shown = tirgen("consensus", "run")
    assert "6 problems compared" in shown.output
    for page in (shown, tirgen("stats", "run")):
        assert page.exit_code == 0
        assert "wrong reference" in page.output
        assert "3/4" in page.output
        assert "\x1b[31m" not in page.output, "what a file says is no terminal code"
    found = json.loads(tirgen("stats", "run", "--format", "json").stdout)["consensus"]
    assert (found["n_problems"], found["n_tied"]) == (len(SAMPLES), 1)


def test_an_unknown_run_is_named(db: Database, tirgen: Tirgen) -> None:
    result = tirgen("consensus", "none")
    assert isinstance(result.exception, InputError)


def test_trajectories_are_asked_for_by_consensus(run: Database) -> None:
    compare(run)

    def selected(expression: str) -> set[str]:
        wanted = query.Query(expression, ("problem_id",))
        with query.run(run, wanted) as rows:
            return {name for (name,) in rows}

    assert selected("consensus_disagrees") == {"wrong reference", stored.HOSTILE}
    assert selected("consensus_disagrees is False") == {"right"}
    assert selected("consensus_share >= 0.75 and not consensus_disagrees") == {"right"}
    assert "tie" in selected("consensus_disagrees is None")
    assert selected('answer == consensus_answer and problem_id == "right"') == {"right"}
