"""Self-correction by strategy and number of tries; a report's time; an evaluation that is killed.

    python bench/evaluation.py [--model nano] [--label sft] [--problems 200] [--seeds 3]
    python bench/evaluation.py --report [--problems 500] [--samples 4]
    python bench/evaluation.py --kills 10

One JSON object a line. Figures have 95 % intervals over questions, all seeds of a question drawn
together; `p` is of the paired comparison with no self-correction. `peer` is THOR's published figure
on its own models and benchmarks (method.md 5.1), for the direction only. The database is of the
bench's own.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from sqlalchemy import func, select

from rl.evaluation import benchmarks, report, results, runs
from rl.evaluation.figures import Figure, Settings, figures, ratios
from rl.evaluation.intervals import compare, interval
from rl.evaluation.plan import NANO_SETTINGS, Asked, plan
from rl.evaluation.results import Question, Results
from shared.store import Database, EmbeddedPostgres, migrate
from shared.store.models import RunRow, TrajectoryRow

POINTS = (
    ("none", "correction.strategy=none"),
    *(
        (f"{strategy}, N_corr {n}", f"correction.strategy={strategy}", f"correction.n_corr={n}")
        for strategy in ("action", "suffix", "replan")
        for n in (1, 4)
    ),
)
SHOWN = ("accuracy", "first-try call pass rate", "call pass rate", "retries", "sampled tokens",
         "response tokens")  # fmt: skip
PAPER = {
    "suffix, N_corr 4": {
        "call pass rate": "THOR-7B 0.987",
        "sampled tokens": "THOR-7B 0.94 of its base model's",
    }
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--model", default="nano", help="a folder, or nano: the packaged SFT policy"
    )
    parser.add_argument("--label", default="", help="in every line, to tell policies apart")
    parser.add_argument("--problems", type=int)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--report", action="store_true")
    parser.add_argument("--kills", type=int, default=0)
    parser.add_argument("--set", action="append", default=[], dest="settings")
    options = parser.parse_args()
    label = options.label or Path(options.model).name
    with database() as (db, home):
        if options.kills:
            kills(db, home, label, options)
        elif options.report:
            whole_report(db, home, label, options)
        else:
            strategies(db, label, options)


@contextmanager
def database() -> Iterator[tuple[Database, Path]]:
    with tempfile.TemporaryDirectory() as folder:
        server = EmbeddedPostgres(Path(folder))
        url = server.start()
        os.environ["TIRGEN_DATABASE_URL"] = url
        db = Database(url)
        migrate.upgrade(db)
        try:
            yield db, Path(folder)
        finally:
            db.close()
            server.stop()


def say(metric: str, value: Any, unit: str, label: str, **more: Any) -> None:
    line = {"bench": "evaluation", "metric": metric, "value": value, "unit": unit, "policy": label}
    print(json.dumps({**line, "peer": None, "ratio": None, **more}), flush=True)


# ---- strategies -----------------------------------------------------------------------------


def strategies(db: Database, label: str, options: argparse.Namespace) -> None:
    made = {}
    for name, *settings in POINTS:
        parts = []
        for seed in range(options.seeds):
            [planned] = plan(
                f"{name}, seed {seed}",
                Asked(
                    model=options.model,
                    values=NANO_SETTINGS,
                    settings=(*settings, f"seed={seed}", *options.settings),
                ),
                [benchmarks.find("nano")],
                limit=options.problems or 200,
            )
            run_id = runs.start(db, planned.evaluation, planned.config, planned.problems)
            runs.work(db, run_id)
            parts.append(results.load(db, runs.find(db, planned.evaluation)[0]))
        made[name] = pooled(parts)
        tell(name, made[name], made["none"], label, options.seeds)


def pooled(parts: list[Results]) -> list[Question]:
    """The questions with the attempts of every seed, one after the other."""
    by_key = [{q.key: q for q in part.questions} for part in parts]
    return [
        replace(
            question,
            attempts=tuple(a for each in by_key if key in each for a in each[key].attempts),
            agreement=None,
        )
        for key, question in sorted(by_key[0].items())
    ]


def tell(
    name: str, questions: list[Question], base: list[Question], label: str, seeds: int
) -> None:
    mine = {figure: (unit, made) for figure, unit, _, made in ratios(questions)}
    theirs = {figure: made for figure, _, _, made in ratios(base)}
    n = sum(len(q.attempts) for q in questions)
    for figure in SHOWN:
        unit, made = mine[figure]
        found, against = interval(made, seed=0), theirs[figure]
        paired = compare(against, made, seed=0)
        of_none = found.value / against.value if found.value and against.value else None
        say(
            f"{figure}: {name}", _round(found.value), unit, label,
            low=_round(found.low), high=_round(found.high), questions=len(questions), attempts=n,
            seeds=seeds, p=None if name == "none" else _round(paired.p), of_none=_round(of_none),
            peer=PAPER.get(name, {}).get(figure),
        )  # fmt: skip


def _round(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.4g}")


# ---- the report -----------------------------------------------------------------------------


def whole_report(db: Database, home: Path, label: str, options: argparse.Namespace) -> None:
    """From nothing to the page: attempts, figures, plots, HTML."""
    started = time.monotonic()
    [planned] = plan(
        "report",
        Asked(model=options.model, settings=("correction.strategy=suffix", *options.settings)),
        [benchmarks.find(f"nano@{options.samples}")],
        limit=options.problems or 500,
    )
    run_id = runs.start(db, planned.evaluation, planned.config, planned.problems)
    runs.work(db, run_id)
    sampled = time.monotonic() - started
    found = [results.load(db, run) for run in runs.find(db, "report")]
    page = report.write(db, "report", found, home / "report", Settings())
    whole = time.monotonic() - started
    size = f"{len(planned.problems)} x {options.samples}"
    say(f"report of {size}", round(whole, 1), "s", label, goal="300 s", sampling=round(sampled, 1),
        page_bytes=page.stat().st_size)  # fmt: skip


# ---- killed ---------------------------------------------------------------------------------


def kills(db: Database, home: Path, label: str, options: argparse.Namespace) -> None:
    """`tirgen-rl eval` killed with -9 at random moments and started again, against one that ran."""
    n = options.problems or 40
    command = [
        sys.executable, "-m", "rl.cli", "eval", "--model", options.model, "--benchmark", "nano",
        "--limit", str(n), "--samples", str(options.samples), "--strategy", "suffix",
        "--format", "json", *(f"--set={one}" for one in ("in_flight=8", *options.settings)),
    ]  # fmt: skip
    total = n * options.samples
    moments = sorted(random.Random(0).sample(range(1, total - 10), options.kills))
    with (home / "log").open("wb") as log:
        for moment in moments:
            process = subprocess.Popen(
                [*command, "--run", "killed"], stdout=log, stderr=log, start_new_session=True
            )
            while process.poll() is None and stored(db, "killed/nano") < moment:
                time.sleep(0.01)
            assert process.poll() is None, (home / "log").read_text()
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        for name in ("killed", "whole"):
            subprocess.run([*command, "--run", name], stdout=log, stderr=log, check=True)
    killed, whole = (results.load(db, runs.find(db, name)[0]) for name in ("killed", "whole"))
    same = [_values(one) for one in (killed, whole)]
    say(f"killed {len(moments)} times", int(same[0] == same[1] and len(killed.attempts) == total),
        "same figures", label, attempts=len(killed.attempts), moments=moments)  # fmt: skip


def stored(db: Database, run: str) -> int:
    """How many attempts of it there are; 0 before it has begun."""
    with db.session() as session:
        of_run = select(func.count(TrajectoryRow.id)).join(RunRow).where(RunRow.name == run)
        return session.scalar(of_run) or 0


def _values(one: Results) -> list[tuple[str, Any]]:
    is_counted: Callable[[Figure], bool] = lambda f: not f.name.startswith("seconds")  # noqa: E731
    return [(f.name, f.interval) for f in figures(one) if is_counted(f)]


if __name__ == "__main__":
    main()
