"""The loop of a policy: a new run takes what an earlier policy could not solve."""

from __future__ import annotations

from shared.store import Database
from tests.acceptance.home import Home
from tests.curated import add_run, world
from tirgen.curation.base import Given

OLD, NEW = "loop-old", "loop-new"


def test_the_next_run_has_the_problems_that_the_last_policy_could_not_solve(home: Home) -> None:
    """Of a snapshot's problems, and without the tool: it measures, and vets nothing."""
    db = Database(home.postgres.start())
    solved, half, unsolved, _ = texts = [one.text for one in world(4)]
    right = {solved: (True, True), half: (True, False), unsolved: (False, False)}
    add_run(db, OLD, [Given(problem=text, correct=c) for text in right for c in right[text]])
    add_run(db, "loop-unseen", [Given(problem=text) for text in texts])
    db.close()
    kind = ("--kind", "problems", "--where", 'run == "loop-unseen"')
    assert home.quick("snapshot", "create", "loop-problems", *kind).code == 0

    said = home.quick(
        "generate", "--from-snapshot", "loop-problems", "--unsolved-by", OLD, "--max-rate", "0.5",
        "--no-tool", "--run", NEW,
    )  # fmt: skip
    assert said.code == 0, said
    home.assert_reconciles(NEW, 2)
    of_run = "run_id = (SELECT id FROM runs WHERE name = %s)"
    chosen = home.sql(
        f"SELECT p.text FROM work_items w JOIN problems p ON p.key = problem_key WHERE {of_run}",
        NEW,
    )
    assert {text for (text,) in chosen} == {half, unsolved}
    made = home.sql(f"SELECT n_calls, vetted FROM trajectories WHERE {of_run}", NEW)
    assert made == [(0, False)] * 2
    measured = home.sql(f"SELECT count(*) FROM pass_rates WHERE {of_run}", NEW)
    assert measured == [(2,)]


def test_a_run_without_problems_says_where_they_could_come_from(home: Home) -> None:
    said = home.quick("generate")
    assert said.code == 2
    assert "--from-snapshot" in said.text
    said = home.quick("generate", "--from-snapshot", "nothing")
    assert said.code == 2
    assert "no snapshot" in said.text
