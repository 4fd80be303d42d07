"""Trajectories written per second, through the code that workers use, on the embedded PostgreSQL.

The peer is what one would write first: psycopg, the same rows, the body as JSONB.
Usage: python bench/store.py [N]. One JSON object a line.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from random import Random

import psycopg
from psycopg.types.json import Jsonb

from shared.sandbox.result import Outcome, RunResult, Tier
from shared.store import Completed, Database, EmbeddedPostgres, migrate
from shared.store.trajectories import import_problems, write_trajectory
from shared.trajectory import Check, End, Problem, Step, ToolCall, Trajectory, Verdict
from shared.work import items
from shared.work.runs import create_run

N_STEPS = 5
BATCH = 200
WORDS = [f"{i * 7919 % 10007:x}" for i in range(3000)]


def example(problem_key: str) -> Completed:
    """About 14 kB in 5 steps with 5 verdicts: the size of a real trajectory."""
    result = RunResult(Outcome.OK, "42\n" * 20, "", None, Tier.A, 0.01, 0.01, 1 << 25, 0)
    random = Random(0)

    def text(n: int) -> str:
        return " ".join(random.choice(WORDS) for _ in range(n))

    def step() -> Step:
        call = ToolCall(f"import math\n# {text(60)}\nprint(math.factorial(20))", "42", result)
        return Step(text(120), call, original=text(40))

    steps = tuple(step() for _ in range(N_STEPS))
    whole = "\n".join(step.thought for step in steps)
    made = Trajectory(problem_key, steps, whole, End.ANSWERED, "42", False, 1, 2500)
    verdicts = tuple(Verdict(check, True, "1", "passed") for check in list(Check)[:5])
    return Completed(made, verdicts, None, 1.0, "model", "model", "bench")


def setup(db: Database, n: int) -> tuple[int, Completed]:
    problem = Problem("How much?", "42")
    with db.begin() as session:
        import_problems(session, [problem])
        run_id = create_run(
            session, name="bench", kind="generate", config={}, fingerprint="f", code_version="c"
        )
        items.create_items(session, run_id, [problem.key], n, "f")
    return run_id, example(problem.key)


def one_by_one(db: Database, run_id: int, done: Completed, n: int) -> None:
    """A worker's way: lease 32, complete each in a transaction of its own."""
    while n > 0 and (leased := items.lease(db, run_id, "bench", 32, 600.0)):
        for item in leased:
            items.complete(db, item, done)
        n -= len(leased)


def in_batches(db: Database, run_id: int, done: Completed, n: int) -> None:
    """An import's way: no leases, BATCH trajectories a transaction."""
    leased = items.lease(db, run_id, "bench", n, 600.0)
    for start in range(0, len(leased), BATCH):
        with db.begin() as session:
            for item in leased[start : start + BATCH]:
                write_trajectory(session, run_id, item.id, done)


def peer(db: Database, done: Completed, n: int) -> None:
    """One transaction each: trajectory with JSONB body, steps, verdicts, the item closed."""
    body = json.loads(json.dumps(done.trajectory.body()))
    with psycopg.connect(db.conninfo, autocommit=True) as connection:
        connection.execute(
            "CREATE TABLE IF NOT EXISTS peer_t (id bigserial PRIMARY KEY, body jsonb, h text);"
            "CREATE TABLE IF NOT EXISTS peer_s (t bigint, i int, outcome text, duration float);"
            "CREATE TABLE IF NOT EXISTS peer_v (t bigint, name text, passed bool, reason text)"
        )
        for _ in range(n):
            with connection.transaction(), connection.cursor() as cursor:
                cursor.execute(
                    "INSERT INTO peer_t (body, h) VALUES (%s, %s) RETURNING id", (Jsonb(body), "h")
                )
                (key,) = cursor.fetchone() or (0,)
                steps = [(key, i, "ok", 0.1) for i in range(N_STEPS)]
                cursor.executemany("INSERT INTO peer_s VALUES (%s, %s, %s, %s)", steps)
                verdicts = [(key, v.check, v.passed, v.reason) for v in done.verdicts]
                cursor.executemany("INSERT INTO peer_v VALUES (%s, %s, %s, %s)", verdicts)
                cursor.execute("UPDATE runs SET n_items = n_items WHERE id = 1")


def rate(action: Callable[[], None], n: int) -> float:
    started = time.perf_counter()
    action()
    return n / (time.perf_counter() - started)


def report(metric: str, value: float, against: float | None = None) -> None:
    line = {"bench": "store", "metric": metric, "value": round(value, 1), "unit": "trajectories/s"}
    if against is not None:
        line |= {"peer": "psycopg, JSONB body", "ratio": round(value / against, 2)}
    print(json.dumps(line), flush=True)


def main() -> None:
    n = int(sys.argv[1]) if len(sys.argv) > 1 else 1000
    with tempfile.TemporaryDirectory() as home:
        server = EmbeddedPostgres(Path(home))
        db = Database(server.start())
        try:
            migrate.upgrade(db)
            run_id, done = setup(db, 2 * n + 64)
            one_by_one(db, run_id, replace(done, code_version="warm-up"), 64)
            against = rate(lambda: peer(db, done, n), n)
            one = rate(lambda: one_by_one(db, run_id, done, n), n)
            report("one transaction each, leased", one, against)
            report("batches of 200, one transaction each", rate(
                lambda: in_batches(db, run_id, done, n), n), against)  # fmt: skip
        finally:
            db.close()
            server.stop()


if __name__ == "__main__":
    main()
