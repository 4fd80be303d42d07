"""Snapshots: rows frozen per second, and rows streamed per second against a bare cursor.

The bare cursor is what one would write first: a server-side cursor of psycopg (binary, 1000 rows a
fetch) over the same join in the same order, each body unpacked into a Trajectory. It hands out the
same and checks nothing. A second one does not even unpack: it only fetches the bytes.
All take turns; the ratio is of the medians. CPU of the client is printed too: other work on the
machine bends it less than the wall.
Usage: python bench/snapshots.py [N]. One JSON object a line.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import psycopg

from shared.sandbox.result import Outcome, RunResult, Tier
from shared.store import Completed, Database, EmbeddedPostgres, Snapshot, migrate
from shared.store.trajectories import decode, import_problems, write_trajectories
from shared.trajectory import Check, End, Problem, Step, ToolCall, Trajectory, Verdict
from shared.work import items
from shared.work.runs import create_run
from tirgen.curation.snapshots import Snapshots

BATCH = 200
ROUNDS = 5
WORDS = [f"{i * 7919 % 10007:x}" for i in range(3000)]

BARE = """
SELECT r.position, r.split, p.*, r.content_hash, t.body
FROM snapshot_rows r JOIN problems p ON p.key = r.problem_key
JOIN trajectories t ON t.id = r.trajectory_id
ORDER BY r.position
"""


def example(problem: Problem, random: Random) -> Completed:
    """14-16 KB in 5 steps with 6 verdicts, no two alike: the size of a real trajectory."""
    result = RunResult(Outcome.OK, "42\n" * 20, "", None, Tier.A, 0.01, 0.01, 1 << 25, 0)

    def text(n: int) -> str:
        return " ".join(random.choices(WORDS, k=n))

    def step() -> Step:
        call = ToolCall(f"import math\n# {text(60)}\nprint(math.factorial(20))", "42", result)
        return Step(text(200), call, original=text(100))

    steps = tuple(step() for _ in range(5))
    whole = "\n".join(step.thought for step in steps)
    made = Trajectory(problem.key, steps, whole, End.ANSWERED, "42", False, 1, 2500)
    verdicts = tuple(Verdict(check, True, "1", "passed") for check in list(Check)[:6])
    return Completed(made, verdicts, None, 1.0, "model", "model", "bench")


def fill(db: Database, n: int) -> None:
    random = Random(0)
    problems = [Problem(f"How much is {i}?", "42", "bench") for i in range(n)]
    with db.begin() as session:
        import_problems(session, problems)
        run_id = create_run(
            session, name="bench", kind="generate", config={}, fingerprint="f", code_version="c"
        )
        items.create_items(session, run_id, [problem.key for problem in problems], 1, "f")
    by_key = {problem.key: problem for problem in problems}
    while leased := items.lease(db, run_id, "bench", BATCH, 600.0):
        with db.begin() as session:
            made = [(one.id, example(by_key[one.problem.key], random)) for one in leased]
            write_trajectories(session, run_id, made)
    with psycopg.connect(db.conninfo, autocommit=True) as connection:
        connection.execute("VACUUM ANALYZE")


def bare(db: Database, unpack: bool) -> Iterator[object]:
    with (
        psycopg.connect(db.conninfo) as connection,
        connection.cursor("bare", binary=True) as cursor,
    ):
        cursor.itersize = 1000
        cursor.execute(BARE)
        for row in cursor:
            yield decode(row[-1]) if unpack else row


def spent(rows: Callable[[], Iterator[object]], n: int) -> tuple[float, float]:
    """Rows a second, and microseconds of the client's CPU a row."""
    started, cpu = time.perf_counter(), time.process_time()
    counted = sum(1 for _ in rows())
    assert counted == n, f"{counted} rows of {n}"
    return n / (time.perf_counter() - started), (time.process_time() - cpu) / n * 1e6


def report(
    metric: str, values: list[float], peer: str = "", against: list[float] | None = None,
    unit: str = "rows/s",
) -> None:  # fmt: skip
    value = statistics.median(values)
    line: dict[str, object] = {
        "bench": "snapshots", "metric": metric, "value": round(value, 1), "unit": unit,
        "spread": [round(min(values), 1), round(max(values), 1)],
    }  # fmt: skip
    if against is not None:
        other = statistics.median(against)
        line |= {"peer": peer, "peer_value": round(other, 1), "ratio": round(value / other, 2),
                 "peer_spread": [round(min(against), 1), round(max(against), 1)]}  # fmt: skip
    print(json.dumps(line), flush=True)


def main() -> None:
    n = int(sys.argv[1]) if len(sys.argv) > 1 else 20_000
    with tempfile.TemporaryDirectory() as home:
        server = EmbeddedPostgres(Path(home))
        db = Database(server.start())
        try:
            migrate.upgrade(db)
            fill(db, n)
            started = time.perf_counter()
            Snapshots(db).create("bench", where='run == "bench" and vetted', seed=1)
            report("create", [n / (time.perf_counter() - started)])
            started = time.perf_counter()
            Snapshots(db).export("bench", Path(home) / "export")
            report("export to Parquet", [n / (time.perf_counter() - started)])

            stored = Snapshot.open("bench", db.url.render_as_string(hide_password=False))
            folder = Snapshot.open(Path(home) / "export")
            ways: dict[str, Callable[[], Iterator[object]]] = {
                "stream": stored.rows,
                "folder": folder.rows,
                "bare": lambda: bare(db, unpack=True),
                "bytes": lambda: bare(db, unpack=False),
            }
            rates: dict[str, list[float]] = {name: [] for name in ways}
            cpu: dict[str, list[float]] = {name: [] for name in ways}
            for way in ways.values():
                spent(way, n)  # into the page cache
            for _ in range(ROUNDS):
                for name, way in ways.items():
                    per_second, each = spent(way, n)
                    rates[name].append(per_second)
                    cpu[name].append(each)
            peer = "bare server-side cursor, bodies unpacked, nothing checked"
            report("stream from the database", rates["stream"], peer, rates["bare"])
            report("stream from Parquet", rates["folder"], peer, rates["bare"])
            report("stream from the database, CPU", cpu["stream"], peer, cpu["bare"], "us/row")
            peer = "bare server-side cursor, bytes only"
            report("stream from the database, unpacked", rates["stream"], peer, rates["bytes"])
        finally:
            db.close()
            server.stop()


if __name__ == "__main__":
    main()
