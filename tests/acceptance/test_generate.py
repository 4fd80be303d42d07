"""What a newcomer does first: packaged problems, the packaged policy, one command."""

from __future__ import annotations

import json
import os
from unittest import mock

from tests.acceptance.home import Home
from tirgen import Client

CHECKS = {"executed", "format", "calls_ok", "reproduced", "answer", "code_quality"}


def test_one_command_turns_packaged_problems_into_vetted_trajectories(home: Home) -> None:
    """Real generation, real execution: the yield is the one promised, and SQL accounts for all."""
    said = home.tirgen("generate", "nano", "--limit", "60", "--run", "first")
    assert said.code == 0, said
    home.assert_reconciles("first", 60)
    vetted = home.count("first", "state = 'vetted'")
    assert vetted >= 36, said
    assert "The counts reconcile: 60 items" in said.text
    assert f"{vetted} vetted" in said.text
    assert "tirgen query 'run == \"first\" and vetted'" in said.text

    unproven = home.sql(
        "SELECT t.id FROM trajectories t JOIN runs r ON r.id = t.run_id \
            WHERE r.name = 'first' AND t.vetted AND (NOT EXISTS (SELECT FROM steps s \
            WHERE s.trajectory_id = t.id AND s.has_call AND s.outcome = 'ok') \
            OR t.n_calls < 1 OR t.n_failed_calls > 0)"
    )
    assert unproven == [], "vetted, but no code of it ran well"
    rows = home.sql(
        "SELECT t.vetted, array_agg(v.check_name), bool_and(coalesce(v.passed, false)) \
            FROM trajectories t JOIN verdicts v ON v.trajectory_id = t.id \
            JOIN runs r ON r.id = t.run_id WHERE r.name = 'first' GROUP BY t.id"
    )
    assert len(rows) == 60
    assert all(set(checks) == CHECKS and len(checks) == len(CHECKS) for _, checks, _ in rows)
    assert all(vetted == passed for vetted, _, passed in rows)
    spent = home.sql(
        "SELECT role, sum(requests), sum(completion_tokens), count(DISTINCT item_id) \
            FROM model_usage u JOIN runs r ON r.id = u.run_id WHERE r.name = 'first' \
            GROUP BY role ORDER BY role"
    )
    assert [(row[0], row[3]) for row in spent] == [("extractor", 60), ("reasoner", 60)]
    assert all(requests >= 60 and tokens > 60 for _, requests, tokens, _ in spent)


def test_the_same_seed_gives_the_same_trajectories_at_any_concurrency(home: Home) -> None:
    """One sample at a time, or all at once among others; another seed is the control."""

    def generate(run: str, *settings: str) -> dict[tuple[str, int], str]:
        asked = ["--limit", "6", "--samples", "2", "--run", run]
        said = home.quick("generate", "nano", *asked, *(f"--set={s}" for s in settings))
        assert said.code == 0, said
        rows = home.sql(
            "SELECT w.problem_key, w.sample_index, t.content_hash FROM trajectories t \
                JOIN work_items w ON w.id = t.item_id JOIN runs r ON r.id = t.run_id \
                WHERE r.name = %s",
            run,
        )
        return {(key, sample): digest for key, sample, digest in rows}

    alone = generate("alone", "in_flight=1")
    crowd = generate("crowd", "in_flight=32")
    assert len(alone) == 12
    assert alone == crowd
    other = generate("other", "in_flight=32", "seed=1")
    assert other.keys() == alone.keys()
    assert other != alone


def test_resume_refuses_a_changed_setting_and_names_it(home: Home) -> None:
    """Settings that only say how patiently to ask are no change."""
    name = "kept"
    assert home.quick("generate", "nano", "--limit", "1", "--run", name).code == 0
    said = home.tirgen("resume", name, "--set", "budgets.calls=2")
    assert said.code == 2, said
    assert "budgets.calls: 4 in the run, 2 now" in said.text
    said = home.quick("resume", name, "--set", "in_flight=2")
    assert said.code == 0, said
    assert "nothing left to do" in said.text
    stored = home.sql("SELECT config FROM runs WHERE name = %s", name)[0][0]
    assert (stored["in_flight"], stored["budgets"]["calls"]) == (2, 4)


def test_a_notebook_does_it_with_four_calls(home: Home) -> None:
    """generate, wait, query, trajectory: the same run that the command line would see."""
    with mock.patch.dict(os.environ, home.environ, clear=True):
        client = Client()
        run = client.generate("nano", limit=8, run="notebook")
        done = client.wait(run)
        assert (done.state, done.n_items, done.n_open) == ("done", 8, 0)
        assert done.reconciles
        columns = ("id", "answer", "n_calls")
        rows = client.query(f'run == "{run}" and vetted', columns=columns)
        assert rows
        assert all(row["n_calls"] >= 1 for row in rows)
        made = client.trajectory(rows[0]["id"])
        assert made.answer == rows[0]["answer"]
        assert made.calls[0].code in made.text
        client.db.close()
    listed = json.loads(home.quick("query", f'run == "{run}" and vetted', "--format", "json").text)
    assert {row["id"] for row in listed} == {row["id"] for row in rows}
