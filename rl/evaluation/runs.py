"""An evaluation is a run of kind "evaluate" for each benchmark, named EVALUATION/BENCHMARK.

Its items are made, leased, completed and recovered like those of any run (shared/work). They are
worked on here, in this process, or by `tirgen-rl worker`; or by both, whoever leases an item. In
process, the slot is this process's own, so that no bell has to be rung and nobody else's is taken.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from sqlalchemy import select

from rl.evaluation import worker
from rl.evaluation.config import EvaluationConfig, differences, read
from rl.evaluation.worker import KIND
from shared.errors import ConfigError, InputError
from shared.store.database import Database
from shared.store.models import RunRow, RunState
from shared.store.queries import Funnel, funnel
from shared.store.trajectories import import_problems
from shared.trajectory import Problem
from shared.version import code_version
from shared.work import items, slots
from shared.work.celery_app import make_app, prepare_broker, publish
from shared.work.items import create_items
from shared.work.runs import create_run
from shared.work.slices import OpenHandler, RunInfo, SliceSettings, run_slice
from shared.work.slots import open_slots

POLL = 0.5  # seconds between looks at items that somebody else holds

Progress = Callable[[Funnel], None]


def name_of(evaluation: str, benchmark: str) -> str:
    return f"{evaluation}/{benchmark}"


def start(
    db: Database, evaluation: str, config: EvaluationConfig, problems: Sequence[Problem]
) -> int:
    """Make the run, or take up the one of that name; returns its id.

    More samples than before are added. Cancelled and failed items are queued again. Raises
    ConfigError, naming the settings, where the run of that name measures something else.
    """
    name = name_of(evaluation, config.benchmark.name)
    with db.begin() as session:
        import_problems(session, problems)
        run = session.scalar(select(RunRow).where(RunRow.name == name).with_for_update())
        if run is None:
            run_id = create_run(
                session, name=name, kind=KIND, config=config.model_dump(mode="json"),
                fingerprint=config.fingerprint, code_version=code_version(),
            )  # fmt: skip
        else:
            run_id = run.id
            _check_same(run, config)
            stored = read(run.config, f"run {name}")
            samples = max(stored.samples, config.samples)
            run.config = config.model_copy(update={"samples": samples}).model_dump(mode="json")
            run.state = RunState.RUNNING
            run.finished_at = None
        keys = [problem.key for problem in problems]
        create_items(session, run_id, keys, config.samples, config.fingerprint)
    items.reopen(db, run_id)
    items.retry(db, run_id)
    items.finish(db, run_id)
    return run_id


def _check_same(run: RunRow, config: EvaluationConfig) -> None:
    if run.kind != KIND:
        raise ConfigError(f"{run.name!r} is a run of another kind ({run.kind}).", where="--run")
    if run.fingerprint != config.fingerprint:
        changed = differences(read(run.config, f"run {run.name}"), config)
        raise ConfigError(
            f"The evaluation {run.name!r} was begun with other settings:\n    "
            + "\n    ".join(changed or ["its prompts were others"]),
            where=f"run {run.name}",
            remedy="use them again, or give this evaluation another name with --run",
        )


def hand_out(db: Database, run_ids: Sequence[int], n: int) -> None:
    """Leave runs to `tirgen-rl worker`, `n` slices at once each. Raises BrokerError."""
    with db.begin() as session:
        for run_id in run_ids:
            open_slots(session, run_id, n)
    app = make_app(db)
    prepare_broker(db, app)
    publish(app, slots.ring(db))


def work(
    db: Database,
    run_id: int,
    *,
    stopping: Callable[[], bool] = lambda: False,
    progress: Progress = lambda now: None,
    open_handler: OpenHandler | None = None,
    settings: SliceSettings | None = None,
) -> Funnel:
    """Work on a run in this process until no item of it is open, or `stopping`; how it stands.

    May be killed at any moment: what was under way is leased again once its lease has run out.
    """
    handler = open_handler or worker.opener()

    def settings_of(run: RunInfo) -> SliceSettings:
        chosen = settings or replace(worker.settings(run), lease_seconds=10, heartbeat_seconds=2)
        return replace(chosen, slice_seconds=float("inf"))

    async def until_done() -> None:
        seen = asyncio.create_task(_report(db, run_id, progress))
        try:
            while _is_open(now := _funnel(db, run_id)) and not stopping():
                progress(now)
                bell = await asyncio.to_thread(slots.claim, db, run_id, 30.0)
                try:
                    await run_slice(db, bell, handler, settings_of, stopping)
                finally:
                    slots.give_up(db, bell)
                items.sweep(db)
                if _is_open(_funnel(db, run_id)) and not stopping():
                    await asyncio.sleep(POLL)  # somebody else holds the rest, or held it
        finally:
            seen.cancel()

    asyncio.run(until_done())
    last = _funnel(db, run_id)
    progress(last)
    return last


async def _report(db: Database, run_id: int, progress: Progress) -> None:
    while True:
        await asyncio.sleep(1)
        progress(await asyncio.to_thread(_funnel, db, run_id))


def _funnel(db: Database, run_id: int) -> Funnel:
    with db.session() as session:
        return funnel(session, run_id)


def _is_open(now: Funnel) -> bool:
    return now.state is RunState.RUNNING and now.n_open > 0


def wait(db: Database, run_id: int, progress: Progress) -> Funnel:
    """Watch a run that others work on until it has ended."""
    while _is_open(now := _funnel(db, run_id)):
        progress(now)
        time.sleep(POLL)
    return now


def find(db: Database, evaluation: str) -> list[RunRow]:
    """The runs of an evaluation, in the order in which they were made; one of them by its name.

    Raises InputError, naming the evaluations that there are.
    """
    with db.session() as session:
        of_kind = select(RunRow).where(RunRow.kind == KIND).order_by(RunRow.id)
        runs = list(session.scalars(of_kind))
    found = [run for run in runs if evaluation in (run.name, _evaluation(run.name))]
    if not found:
        names = list(dict.fromkeys(_evaluation(run.name) for run in reversed(runs)))[:10]
        there = f"newest: {', '.join(names)}" if names else "there is none yet"
        raise InputError(f"there is no evaluation named {evaluation!r}", remedy=there)
    return found


def points(db: Database, evaluation: str) -> list[str]:
    """The evaluations of a sweep of that name, oldest first."""
    with db.session() as session:
        names = session.scalars(select(RunRow.name).where(RunRow.kind == KIND).order_by(RunRow.id))
        made = dict.fromkeys(map(_evaluation, names))
    return [name for name in made if name.startswith(f"{evaluation}@")]


def _evaluation(run: str) -> str:
    return run.rpartition("/")[0]
