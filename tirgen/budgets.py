"""What a run costs, and when it has cost enough.

Money is tokens times the prices of each role's endpoint, as they stand in the run's configuration
now. A run is stopped by whichever worker finds a limit reached: what is queued is cancelled, what
is in flight is finished, and the run ends as `cancelled` with the reason. So that it ends near its
limit and not beyond, what is in flight is counted ahead at the mean of what is finished.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from shared.errors import ConfigError
from shared.store.database import Database
from shared.store.models import ItemState, RunRow
from shared.store.queries import Funnel, UsageTotal, funnel, usage
from shared.work import items
from tirgen.config import Limits

SECTIONS = {"reasoner": "reasoner", "extractor": "extractor", "verifier": "judge"}  # by role
LOOK_LOCK = 0x7469_7267  # with the run's id: who adds up what it has cost
UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}


@dataclass(frozen=True, slots=True)
class Spent:
    """Of a run so far, failed attempts included; `whole` is the projected total of all its items,
    None while nothing is finished. `ahead` counts what is in flight at the mean."""

    tokens: int
    cost: float
    ahead: float
    whole: float | None

    @property
    def tokens_ahead(self) -> float:
        return self.tokens * self.ahead

    @property
    def cost_ahead(self) -> float:
        return self.cost * self.ahead

    def projected(self) -> tuple[float, float] | None:
        """Tokens and cost of the whole run."""
        return None if self.whole is None else (self.tokens * self.whole, self.cost * self.whole)


def cost(config: Mapping[str, Any], one: UsageTotal) -> float:
    """Of one role's tokens, by the run's configuration as it is stored; 0 without prices."""
    section = config.get(SECTIONS.get(one.role, one.role)) or {}
    address = section.get("endpoint") or {}
    prompt, completion = (address.get(f"{kind}_price") or 0 for kind in ("prompt", "completion"))
    return float(one.prompt_tokens * prompt + one.completion_tokens * completion) / 1e6


def spent(config: Mapping[str, Any], used: Iterable[UsageTotal], run: Funnel) -> Spent:
    used = list(used)
    tokens = sum(one.prompt_tokens + one.completion_tokens for one in used)
    done = run.n_items - run.n_open - run.items[ItemState.CANCELLED]
    ahead = 1 + run.items[ItemState.LEASED] / done if done else 1.0
    whole = run.n_items / done if done else None
    return Spent(tokens, sum(cost(config, one) for one in used), ahead, whole)


def reached(limits: Limits, so_far: Spent, now: datetime) -> str | None:
    """Which limit is reached, as people read it; None if there is none."""
    if limits.max_tokens is not None and so_far.tokens_ahead >= limits.max_tokens:
        return f"max_tokens: {so_far.tokens} of {limits.max_tokens} tokens"
    if limits.max_cost is not None and so_far.cost_ahead >= limits.max_cost:
        return f"max_cost: {so_far.cost:.4g} of {limits.max_cost:g}"
    if limits.deadline is not None and now >= limits.deadline:
        return f"deadline: {limits.deadline:%Y-%m-%d %H:%M:%S %z}"
    return None


def hold(db: Database, run_id: int) -> str | None:
    """Stop the run if it has reached a limit of its stored configuration; the reason, if so.

    To add up a large run takes the server a while, so one process does it at a time: where another
    is at it, this does nothing.
    """
    with db.session() as session:
        reason = _check(session, run_id, alone=True)
    if reason is not None:
        items.stop(db, run_id, reason)
    return reason


def require_room(db: Database, run_id: int) -> None:
    """Raise ConfigError where the run would be stopped again as soon as it goes on."""
    with db.session() as session:
        reason = _check(session, run_id)
    if reason is not None:
        option = "--" + reason.partition(":")[0].replace("_", "-")
        raise ConfigError(
            f"The run has reached its limit already ({reason}).", remedy=f"raise it with {option}"
        )


def _check(session: Session, run_id: int, alone: bool = False) -> str | None:
    """The limit that is reached, by the database's clock; with `alone`, if nobody else looks."""
    run = session.get_one(RunRow, run_id)
    limits = Limits.model_validate(run.config.get("limits") or {})
    if limits == Limits():
        return None
    free = func.pg_try_advisory_xact_lock(LOOK_LOCK, run_id)
    if alone and not session.execute(select(free)).scalar_one():
        return None
    now = session.execute(select(func.clock_timestamp())).scalar_one()
    so_far = spent(run.config, usage(session, run_id), funnel(session, run_id))
    return reached(limits, so_far, now)


def brief(so_far: Spent) -> str:
    """On one line: tokens and, where there are prices, cost, each of its projected total."""
    whole = so_far.projected()
    tokens = _short(so_far.tokens) + (f" of ~{_short(whole[0])}" if whole else "") + " tokens"
    if not so_far.cost:
        return tokens
    return f"{tokens}, cost {so_far.cost:.4g}" + (f" of ~{whole[1]:.4g}" if whole else "")


def _short(tokens: float) -> str:
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if tokens >= size:
            return f"{tokens / size:.3g}{unit}"
    return f"{tokens:.0f}"


def deadline(given: str, now: datetime) -> datetime:
    """`90m`, `8h`, `2d` from now, or a date and time with its zone. Raises ConfigError."""
    number, unit = given[:-1], given[-1:]
    try:
        if unit in UNITS:
            return now + timedelta(**{UNITS[unit]: float(number)})
        at = datetime.fromisoformat(given)
    except (ValueError, OverflowError) as error:
        remedy = "write 90m, 8h, 2d or 2026-12-01T08:00+01:00"
        raise ConfigError(f"{given!r} is no deadline", where="--deadline", remedy=remedy) from error
    return at.astimezone() if at.tzinfo is None else at
