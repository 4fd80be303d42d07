"""A chain over a database: the funnel reconciles to the row, nothing is doubled."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import func, select
from typer.testing import CliRunner

from shared.errors import ConfigError, InputError
from shared.store import Database
from shared.store.models import (
    CurationRow,
    CurationStageRow,
    SnapshotKind,
    TrajectoryRow,
    VerdictRow,
    pass_rates,
)
from tests.curated import add_run, solution, world
from tirgen import plot, stats
from tirgen.cli import app
from tirgen.curation import chain
from tirgen.curation.base import PREFIX, Given
from tirgen.curation.chain import Curated, Stage
from tirgen.curation.problems import stored, unsolved
from tirgen.curation.snapshots import Snapshots

REWORDED = (
    "A ferry carries 36 cars on its first trip and 45 cars on the second. Each car pays 17 "
    "dollars. How many dollars do the cars pay in all?",
    "On its first trip a ferry takes 36 cars, and on its second trip 45 cars. If every car pays 17 "
    "dollars, how many dollars is that in all for the cars?",
)
ALL = select(TrajectoryRow.id)


@pytest.fixture
def benchmark(tmp_path: Path) -> Path:
    """A benchmark with one problem of the world and one that is reworded in `candidates`."""
    path = tmp_path / "bench.jsonl"
    items = [
        {"id": "copied", "problem": world(40)[3].text},
        {"id": "ferry", "problem": REWORDED[0]},
    ]
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    return path


@pytest.fixture
def candidates(db: Database) -> dict[str, int]:
    """40 sound problems of nano's world, and one trajectory for each way to be dropped."""
    made = world(40)
    good = solution(made[5])
    planted = {
        "bad_format": good.model_copy(update={"text": "It is 42."}),
        "wrong": good.model_copy(update={"correct": False}),
        "long": good.model_copy(update={"n_tokens": 9000}),
        "second": good.model_copy(update={"n_tokens": 500}),
        "near": Given(problem=made[6].text.replace("How many", "Exactly how many")
                      .replace("What is", "Exactly what is").replace("How far", "Exactly how far")),
        "reworded": Given(problem=REWORDED[1]),
    }  # fmt: skip
    assert planted["near"].problem != made[6].text
    ids = add_run(db, "one", [*map(solution, made), *planted.values()])
    return {
        **{f"world {i}": id for i, id in enumerate(ids[:40])},
        **dict(zip(planted, ids[40:], strict=True)),
    }


@pytest.fixture
def filters(tmp_path: Path, benchmark: Path) -> chain.Chain:
    path = tmp_path / "mine.toml"
    path.write_text(
        f"""
        [[filters]]
        filter = "format"
        [[filters]]
        filter = "answer"
        [[filters]]
        filter = "length"
        max_tokens = 4000
        [[filters]]
        filter = "one_per_problem"
        prefer = "shortest"
        [[filters]]
        filter = "near_duplicates"
        [[filters]]
        filter = "decontaminate"
        benchmarks = ["{benchmark.name}"]
        [[filters]]
        filter = "balance"
        share = {{ 2 = 0.5 }}
        """
    )
    return chain.load(path)


def verdicts(db: Database) -> list[VerdictRow]:
    with db.session() as session:
        mine = VerdictRow.check_name.startswith(PREFIX)
        return list(session.scalars(select(VerdictRow).where(mine).order_by(VerdictRow.id)))


# ---- the funnel ---------------------------------------------------------------------------------


def test_the_funnel_reconciles_to_the_row_and_what_was_planted_falls(
    db: Database, candidates: dict[str, int], filters: chain.Chain
) -> None:
    curated = chain.apply(db, filters, ALL, seed=3)
    decided = verdicts(db)
    alive = set(candidates.values())
    for stage in curated.stages:
        mine = [v for v in decided if v.check_name == PREFIX + stage.name]
        assert {v.trajectory_id for v in mine} == alive, "one verdict each, and on nothing else"
        assert len(mine) == stage.before == len(alive)
        assert {v.version for v in mine} == {stage.version}
        alive = {v.trajectory_id for v in mine if v.passed}
        assert len(alive) == stage.after
    assert curated.kept == sorted(alive)
    dropped = {v.trajectory_id: v for v in decided if not v.passed}
    assert len(dropped) + len(alive) == len(candidates)

    by = {name: dropped[id].check_name for name, id in candidates.items() if id in dropped}
    balanced = [name for name, check in by.items() if check == PREFIX + "balance"]
    assert all(name.startswith("world") for name in balanced)
    assert {name: check for name, check in by.items() if name not in balanced} == {
        "bad_format": "filter/format",
        "wrong": "filter/answer",
        "long": "filter/length",
        "second": "filter/one_per_problem",
        "near": "filter/near_duplicates",
        "reworded": "filter/decontaminate",
        "world 3": "filter/decontaminate",
    }
    copy, reworded = dropped[candidates["world 3"]], dropped[candidates["reworded"]]
    assert (copy.evidence["method"], copy.evidence["item"]) == ("exact", "copied")
    assert (reworded.evidence["method"], reworded.evidence["item"]) == ("near", "ferry")
    assert reworded.evidence["score"] > 0.7
    near = dropped[candidates["near"]].evidence
    assert near["trajectory"] == candidates["world 6"]
    assert near["pairs"][0]["score"] > 0.7


def test_applied_again_it_says_the_same_and_doubles_nothing(
    db: Database, candidates: dict[str, int], filters: chain.Chain
) -> None:
    first = chain.apply(db, filters, ALL, seed=3)
    n = len(verdicts(db))
    assert chain.apply(db, filters, ALL, seed=3) == first
    assert len(verdicts(db)) == n
    with db.session() as session:
        assert session.scalar(select(func.count()).select_from(CurationRow)) == 1
        stages = session.scalar(select(func.count()).select_from(CurationStageRow))
        assert stages == len(first.stages)


def test_batches_do_not_matter(
    db: Database,
    candidates: dict[str, int],
    filters: chain.Chain,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nor does what was applied before; the verdicts of the smaller batches are the same ones."""
    whole = chain.apply(db, filters, ALL, seed=3)
    n = len(verdicts(db))
    monkeypatch.setattr(chain, "BATCH", 7)
    assert chain.apply(db, filters, ALL, seed=3) == whole
    assert len(verdicts(db)) == n


def test_after_a_crash_the_rest_is_written(
    db: Database,
    candidates: dict[str, int],
    filters: chain.Chain,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Killed in its fifth batch, and applied again: as if nothing had happened."""
    monkeypatch.setattr(chain, "BATCH", 7)
    calls: Iterator[int] = iter(range(10**6))
    record = chain._record

    def dying(*args: Any) -> None:
        if next(calls) == 12:
            raise KeyboardInterrupt
        record(*args)

    with monkeypatch.context() as patch:
        patch.setattr(chain, "_record", dying)
        with pytest.raises(KeyboardInterrupt):
            chain.apply(db, filters, ALL, seed=3)
    n_before = len(verdicts(db))
    curated = chain.apply(db, filters, ALL, seed=3)
    found = verdicts(db)
    assert 0 < n_before < len(found) == sum(stage.before for stage in curated.stages)
    assert len({(v.trajectory_id, v.check_name) for v in found}) == len(found)


def test_a_changed_decision_is_a_new_verdict_and_the_old_one_stays(
    db: Database, candidates: dict[str, int]
) -> None:
    """One per problem depends on who else is there: with more candidates it decides otherwise."""
    one = chain.parse('[[filters]]\nfilter="one_per_problem"\nprefer="shortest"', "x", "x")
    alone = ALL.where(TrajectoryRow.id == candidates["second"])
    assert chain.apply(db, one, alone, seed=0).kept == [candidates["second"]]
    chain.apply(db, one, ALL, seed=0)
    said = [v.passed for v in verdicts(db) if v.trajectory_id == candidates["second"]]
    assert said == [True, False]


def test_the_seed_decides_draws_and_is_in_their_versions(
    db: Database, candidates: dict[str, int], filters: chain.Chain
) -> None:
    one, other = (chain.apply(db, filters, ALL, seed=seed) for seed in (3, 4))
    assert one.kept != other.kept
    assert [s.before for s in one.stages[:4]] == [s.before for s in other.stages[:4]]
    changed = [a.name for a, b in zip(one.stages, other.stages, strict=True)
               if a.version != b.version]  # fmt: skip
    assert changed == ["one_per_problem", "balance"]


def test_candidates_keep_their_order(db: Database, candidates: dict[str, int]) -> None:
    backwards = ALL.order_by(TrajectoryRow.n_tokens.desc())
    none = chain.parse("filters = []", "none", "x")
    curated = chain.apply(db, none, backwards, seed=0)
    with db.session() as session:
        rows = session.execute(select(TrajectoryRow.id, TrajectoryRow.n_tokens)).all()
        tokens = {row.id: row.n_tokens for row in rows}
    keys = [(-tokens[id], id) for id in curated.kept]
    assert keys == sorted(keys)
    assert curated.stages == []


# ---- what problems are worth --------------------------------------------------------------------


def samples(problem: str, right: int, wrong: int, undecided: int = 0) -> list[Given]:
    outcomes = [True] * right + [False] * wrong + [None] * undecided
    return [Given(problem=problem, text=f"{i} \\boxed{{1}}", correct=c) for i, c in
            enumerate(outcomes)]  # fmt: skip


def test_pass_rates_count_decided_answers_by_the_newest_verdict(db: Database) -> None:
    ids = add_run(db, "r", samples("a", right=2, wrong=1, undecided=1))
    with db.begin() as session:
        session.add(VerdictRow(
            trajectory_id=ids[0], check_name="answer", passed=False, version="2", reason="better",
            evidence={}, duration=0.0,
        ))  # fmt: skip
    with db.session() as session:
        (row,) = session.execute(select(pass_rates)).mappings()
    assert (row["n_passed"], row["n_samples"]) == (1, 3)


def test_problems_that_the_reasoner_solves_alone_are_dropped_with_their_rate(db: Database) -> None:
    """Measured by runs without the tool of the same model; others do not count."""
    add_run(db, "run", [solution(one) for one in world(4)])
    easy, hard, once, few = (one.text for one in world(4))
    alone = [*samples(easy, 4, 0), *samples(hard, 0, 4), *samples(once, 3, 1), *samples(few, 3, 0)]
    add_run(db, "alone", alone, calls=0)
    add_run(db, "other model", samples(hard, 8, 0), calls=0, model="other")
    add_run(db, "with tool", samples(hard, 8, 0))
    one = chain.parse('[[filters]]\nfilter="cot_solvable"', "x", "x")
    of_run = ALL.where(TrajectoryRow.run_id == 1)
    curated = chain.apply(db, one, of_run, seed=0)
    said = {v.trajectory_id: (v.passed, v.evidence) for v in verdicts(db)}
    assert [said[id][0] for id in sorted(said)] == [False, True, True, None]
    assert said[1][1] == {"solved": 4, "samples": 4, "runs": ["alone"]}
    assert curated.stages == [Stage("cot_solvable", one.filters[0].version(0), 4, 2)]


def test_without_a_run_that_measured_it_the_command_to_do_so_is_named(db: Database) -> None:
    add_run(db, "run", [Given()])
    with pytest.raises(ConfigError, match="--no-tool --samples 4"):
        chain.apply(db, chain.load("paper"), ALL, seed=0)
    assert verdicts(db) == [], "found before anything is written"


def test_difficulty_is_the_runs_own_pass_rate_or_that_of_named_runs(db: Database) -> None:
    add_run(db, "one", [*samples("a", 1, 3), *samples("b", 4, 0)])
    add_run(db, "two", [*samples("a", 4, 0), *samples("b", 0, 4)])
    text = '[[filters]]\nfilter="difficulty"\nmax_rate=0.5\n'
    own = chain.apply(db, chain.parse(text, "x", "x"), ALL, seed=0)
    assert own.kept == [1, 2, 3, 4, 13, 14, 15, 16]
    named = chain.apply(db, chain.parse(f'{text}runs=["two"]', "x", "x"), ALL, seed=0)
    assert named.kept == [5, 6, 7, 8, 13, 14, 15, 16]
    with pytest.raises(ConfigError, match="no run named 'three'"):
        chain.apply(db, chain.parse(f'{text}runs=["three"]', "x", "x"), ALL, seed=0)


# ---- the next run -------------------------------------------------------------------------------


def test_the_next_run_takes_what_the_last_policy_could_not_solve(db: Database) -> None:
    add_run(db, "old", [Given(problem=name) for name in "abcd"])
    Snapshots(db).create("first", where='run == "old"', kind=SnapshotKind.PROBLEMS)
    new = [*samples("a", 0, 4), *samples("b", 1, 3), *samples("c", 4, 0)]
    add_run(db, "new", [*new, *samples("e", 0, 2)])

    frozen = stored(db, snapshot="first")
    assert {problem.text for problem in frozen} == set("abcd")
    assert [p.text for p in unsolved(db, frozen, "new")] == ["a"], "d was not sampled, e not asked"
    assert {p.text for p in unsolved(db, frozen, "new", max_rate=0.25)} == {"a", "b"}
    assert {p.text for p in stored(db, run="new")} == set("abce")
    assert {p.text for p in stored(db, where='run == "new" and not vetted')} == set("abe")
    with pytest.raises(InputError, match="no problem has a pass rate of at most 0"):
        unsolved(db, [p for p in frozen if p.text == "c"], "new")
    with pytest.raises(InputError, match="no snapshot"):
        stored(db, snapshot="second")


# ---- what people see ----------------------------------------------------------------------------


def test_statistics_and_plot_go_on_to_curation(
    db: Database, candidates: dict[str, int], filters: chain.Chain, tmp_path: Path
) -> None:
    add_run(db, "other", [Given(problem="Another one?")])
    curated = chain.apply(db, filters, ALL, seed=3)
    found = stats.gather(db, "one")
    assert found.discrepancies() == []
    assert found.curation is not None
    assert found.to_json()["curation"]["stages"][0] == {
        "filter": "format",
        "before": 46,
        "after": 45,
    }
    # The other run's trajectory is not in this run's funnel.
    assert [after for _, _, after in found.curation.stages[:-1]] == [
        stage.after - 1 for stage in curated.stages[:-1]
    ]
    bars = plot._bars(found)
    assert ("after format", 45) in [(name, n) for name, n, _ in bars]
    plot.plot(found, tmp_path / "funnel.svg")
    assert (tmp_path / "funnel.svg").stat().st_size > 1000


def cli(*arguments: str) -> Any:
    return CliRunner().invoke(app, arguments, catch_exceptions=True)


def test_the_command_prints_funnel_and_evidence(
    db: Database,
    database_url: str,
    candidates: dict[str, int],
    tmp_path: Path,
    filters: chain.Chain,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TIRGEN_DATABASE_URL", database_url)
    path = str(tmp_path / "mine.toml")
    command = ("curate", path, "--where", 'run == "one"', "--seed", "3")
    said = cli(*command, "--dropped", "--format", "json")
    assert said.exit_code == 0, said.output
    found = json.loads(said.stdout)
    curated: Curated = chain.apply(db, filters, ALL, seed=3)
    assert found["kept"] == curated.kept
    assert len(found["dropped"]) + len(found["kept"]) == len(candidates)
    assert {d["filter"] for d in found["dropped"]} == {s.name for s in curated.stages}
    shown = cli(*command, "--dropped")
    assert shown.exit_code == 0
    assert "near_duplicates" in shown.stdout
    assert cli("filters", "test", path).exit_code == 0
    assert cli("filters", "list").exit_code == 0


def test_the_examples_of_a_file_decide_the_exit_code(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('[[filters]]\nfilter="answer"\nexamples=[{rows=[{correct=false, keep=true}]}]')
    said = cli("filters", "test", str(path))
    assert said.exit_code == 1
    assert "it should be kept, but different" in said.stdout
    assert cli("filters", "show", "paper").stdout.startswith("# THOR as published")
