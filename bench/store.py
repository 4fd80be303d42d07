"""Trajectories written per second, and how long a query's first page takes, on the embedded server.

    python bench/store.py [N]        N trajectories (10 000; a million takes some 15 GB)

All N are written through `shared.work.items.complete_many`, the code that closes items everywhere:
leased items, transactions of 200 on one connection, each guarded by its leases; canonical JSON,
hashing and compression included; leasing is not. Bodies are of 14 to 16 KB, 5 steps, 6 verdicts.
The peer is what one would write first: psycopg, the same rows, the body as JSONB.

Then every query of QUERIES is asked for its first 20 rows, as `tirgen query` asks, again and again.
One JSON object a line.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from random import Random

import psycopg
from psycopg.types.json import Jsonb
from sqlalchemy import text

from shared.sandbox.result import CodeError, Outcome, RunResult, Tier
from shared.store import Completed, Database, EmbeddedPostgres, migrate, upkeep
from shared.store.trajectories import RoleUsage, encode, import_problems
from shared.trajectory import Check, End, Problem, Step, ToolCall, Trajectory, Verdict
from shared.work import items
from shared.work.runs import create_run
from tirgen import query

N_STEPS, N_VERDICTS, N_RUNS = 5, 6, 10
POOL = 500  # different trajectories, written again and again
SUBJECTS = ("Algebra", "Geometry", "Number Theory", "Counting", None)
LEASED = 1000  # items at once, in transactions of items.COMPLETE_BATCH
PEER = 1000  # trajectories that the peer writes
ROUNDS = 20  # times that each query is asked

WORDS = """let the sum of all positive integers be such that we have equation root number value so
compute check then divide by multiply add subtract both sides using python total cost price each
student remaining triangle angle area circle radius probability outcome sequence term ratio prime
factor modulo remainder polynomial coefficient therefore because hence answer is""".split()

QUERIES = (
    'run == "bench7"',
    'run == "bench7" and vetted',
    'run == "bench7" and not vetted and n_calls >= 3',
    "vetted",
    "not vetted and n_tokens > 2000",
    "n_tool_calls == 5 and vetted",
    "n_tokens > 3990",
    "n_failed_calls > 0 and vetted",
    'end == "gave_up"',
    'reject_check == "answer"',
    '"networkx" in imports',
    '"sympy" in imports and vetted',
    '"timeout" in outcomes',
    'any_step(outcome == "timeout")',
    'subject in ("Algebra",) and n_calls >= 2',
    'problem_id == "p7"',
    'created_at > "2000-01-01" and vetted',
    'run == "bench7" and vetted and n_tool_calls >= 2 and any_step(outcome == "timeout") '
    'and subject in ("Algebra",) and "sympy" in imports',
    'check("answer") and n_calls == 5',
)


def problem(i: int) -> Problem:
    return Problem(f"How much is {i}?", str(i), "bench", f"p{i}", SUBJECTS[i % 5], str(i % 6))


def examples(n: int) -> list[Completed]:
    """Rare facts are rare: a time-out in 1 of 250, and so on; facts that run together are not."""
    return [example(i, Random(i)) for i in range(n)]


def example(i: int, random: Random) -> Completed:
    def prose(n: int) -> str:
        return " ".join(random.choice(WORDS) for _ in range(n))

    module = "networkx" if i % 100 == 7 else "sympy" if i % 3 == 0 else "math"
    outcome = Outcome.TIMEOUT if i % 250 == 9 else Outcome.OK
    failed = Outcome.MODEL_ERROR if i % 20 == 3 else outcome
    error = CodeError("ValueError", "math domain error", 3, "") if i % 20 == 3 else None
    n_calls = random.randint(1, 5)

    def step(position: int) -> Step:
        if position >= n_calls:
            return Step(prose(190), original=prose(60))
        result = RunResult(
            failed if position == 0 else Outcome.OK, f"{random.random()}\n" * 5, "",
            error if position == 0 else None, Tier.A, random.random(), 0.01, 1 << 25, 0,
        )  # fmt: skip
        code = f"import {module}\n# {prose(40)}\nprint({random.random()})"
        return Step(prose(120), ToolCall(code, result.stdout, result), original=prose(50))

    steps = tuple(step(position) for position in range(N_STEPS))
    whole = "\n".join(s.thought + (s.call.code if s.call else "") for s in steps)
    end = End.GAVE_UP if i % 125 == 0 else End.ANSWERED
    rejected = Check.ANSWER if i % 10 == 4 else None
    made = Trajectory(
        problem(i).key, steps, whole, end, str(i), False, i, 500 + i * 7 % 3500, {"model": "m"}
    )
    verdicts = tuple(
        Verdict(check, check is not rejected, "1", "as it should be", {"stage": "number", "n": i})
        for check in list(Check)[:N_VERDICTS]
    )
    usage = (RoleUsage("reasoner", "model", "http://127.0.0.1/v1", 5, 5000, 2500, 0, 9.5),)
    return Completed(made, verdicts, rejected, 1.0, "model", "model", "bench", usage)


def queue(db: Database, n: int) -> list[int]:
    """N_RUNS runs with `n` items in all."""
    problems = [problem(i) for i in range(POOL)]
    samples = -(-n // (POOL * N_RUNS))
    with db.begin() as session:
        import_problems(session, problems)
        run_ids = []
        for number in range(1, N_RUNS + 1):
            run_id = create_run(
                session, name=f"bench{number}", kind="generate", config={}, fingerprint="f",
                code_version="c",
            )  # fmt: skip
            items.create_items(session, run_id, [p.key for p in problems], samples, "f")
            run_ids.append(run_id)
    return run_ids


@dataclass(frozen=True, slots=True)
class Spent:
    """Seconds: on the wall, and of CPU, which a busy machine bends less."""

    wall: float
    client: float
    server: float

    @classmethod
    def now(cls, backend: int) -> Spent:
        stat = Path(f"/proc/{backend}/stat").read_text().rpartition(")")[2].split()
        server = (int(stat[11]) + int(stat[12])) / os.sysconf("SC_CLK_TCK")
        return cls(time.perf_counter(), time.process_time(), server)

    def since(self, start: Spent) -> Spent:
        return Spent(self.wall - start.wall, self.client - start.client, self.server - start.server)


def write(db: Database, run_ids: list[int], pool: list[Completed], n: int) -> Iterator[Spent]:
    """Write n trajectories, LEASED at once; what each of these took, leasing left out."""
    by_key = {done.trajectory.problem_key: done for done in pool}
    with db.session() as session:
        backend = int(session.scalar(text("SELECT pg_backend_pid()")) or 0)
    runs = cycle(run_ids)
    for _ in range(0, n, LEASED):
        leased = items.lease(db, next(runs), "bench", LEASED, 600.0)
        batch = [(item, by_key[item.problem.key]) for item in leased]
        start = Spent.now(backend)
        written = items.complete_many(db, batch)
        yield Spent.now(backend).since(start)
        assert len(written) == len(batch)


def one_by_one(db: Database, run_id: int, pool: list[Completed], n: int) -> float:
    """A slice's way: each in a transaction of its own. Trajectories per second."""
    by_key = {done.trajectory.problem_key: done for done in pool}
    leased = items.lease(db, run_id, "bench", n, 600.0)
    started = time.perf_counter()
    for item in leased:
        items.complete(db, item, by_key[item.problem.key])
    return len(leased) / (time.perf_counter() - started)


def peer(db: Database, pool: list[Completed], n: int) -> float:
    """200 a transaction: trajectory with JSONB body, steps, verdicts, an item closed."""
    done = [(json.loads(json.dumps(one.trajectory.body())), one) for one in pool]
    with psycopg.connect(db.conninfo) as connection, connection.cursor() as cursor:
        cursor.execute(
            "CREATE TABLE peer_t (id bigserial PRIMARY KEY, body jsonb, h text);"
            "CREATE TABLE peer_s (t bigint, i int, outcome text, duration float);"
            "CREATE TABLE peer_v (t bigint, name text, passed bool, reason text);"
            "CREATE TABLE peer_i (id int PRIMARY KEY, state text);"
            f"INSERT INTO peer_i SELECT i, 'leased' FROM generate_series(1, {n}) i"
        )
        connection.commit()
        started = time.perf_counter()
        for number, (body, one) in enumerate(islice(cycle(done), n), start=1):
            cursor.execute(
                "INSERT INTO peer_t (body, h) VALUES (%s, %s) RETURNING id", (Jsonb(body), "h" * 64)
            )
            (key,) = cursor.fetchone() or (0,)
            steps = [(key, i, "ok", 0.1) for i in range(N_STEPS)]
            cursor.executemany("INSERT INTO peer_s VALUES (%s, %s, %s, %s)", steps)
            verdicts = [(key, v.check, v.passed, v.reason) for v in one.verdicts]
            cursor.executemany("INSERT INTO peer_v VALUES (%s, %s, %s, %s)", verdicts)
            cursor.execute("UPDATE peer_i SET state = 'vetted' WHERE id = %s", (number,))
            if number % items.COMPLETE_BATCH == 0:
                connection.commit()
        connection.commit()
        took = time.perf_counter() - started
        cursor.execute("DROP TABLE peer_t, peer_s, peer_v, peer_i")
    return n / took


def first_pages(db: Database) -> dict[str, list[float]]:
    """Milliseconds of every asking, by query; the caches are warm after the first."""
    took: dict[str, list[float]] = {expression: [] for expression in QUERIES}
    for round in range(ROUNDS + 1):
        for expression in QUERIES:
            started = time.perf_counter()
            with query.run(db, query.Query(expression, limit=20)) as rows:
                list(rows)
            if round > 0:
                took[expression].append((time.perf_counter() - started) * 1000)
    return took


def report(
    metric: str, value: float, unit: str, against: float | None = None, **more: object
) -> None:
    peer_name = None if against is None else "psycopg, JSONB body, 200 a transaction"
    ratio = None if against is None else round(value / against, 2)
    line = {"bench": "store", "metric": metric, "value": round(value, 1), "unit": unit,
            "peer": peer_name, "ratio": ratio, **more}  # fmt: skip
    print(json.dumps(line), flush=True)


def main() -> None:
    n = int(sys.argv[1]) if len(sys.argv) > 1 else 10_000
    with tempfile.TemporaryDirectory() as home:
        server = EmbeddedPostgres(Path(home))
        db = Database(server.start())
        try:
            migrate.upgrade(db)
            measure(db, n)
        finally:
            db.close()
            server.stop()


def measure(db: Database, n: int) -> None:
    pool = examples(POOL)
    sizes = [encode(done.trajectory).size for done in pool]
    assert 14_000 <= statistics.mean(sizes) <= 16_000, statistics.mean(sizes)
    run_ids = queue(db, n + 10_000)
    list(write(db, run_ids, pool, 2000))  # warm
    against = peer(db, pool, PEER)
    one = one_by_one(db, run_ids[0], pool, 300)
    report("written, one transaction each", one, "trajectories/s")

    spent = list(write(db, run_ids, pool, n))
    rate = n / sum(one.wall for one in spent)
    typical = LEASED / statistics.median(one.wall for one in spent)
    body = round(statistics.mean(sizes))
    report("written, 200 a transaction", rate, "trajectories/s", against, n=n,
           median=round(typical), mean_body=body)  # fmt: skip
    report("CPU of the writer", sum(one.client for one in spent) / n * 1e6, "us/trajectory")
    report("CPU of the server", sum(one.server for one in spent) / n * 1e6, "us/trajectory")

    upkeep.vacuum(db)
    bytes_each = upkeep.together(upkeep.sizes(db)).total_bytes / (n + 2300)
    report("stored, all tables and indexes", bytes_each, "bytes/trajectory")
    took = first_pages(db)
    every = sorted(ms for one in took.values() for ms in one)
    slowest = max(took, key=lambda expression: statistics.median(took[expression]))
    report("first page of 20 rows, p50", statistics.median(every), "ms", n=n)
    report("first page of 20 rows, p95", every[int(0.95 * len(every))], "ms", n=n,
           slowest=slowest, slowest_median=round(statistics.median(took[slowest]), 1))  # fmt: skip


if __name__ == "__main__":
    main()
