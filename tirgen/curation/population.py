"""Filters that weigh a trajectory against the others: difficulty, one per problem, balance."""

from __future__ import annotations

import heapq
from array import array
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from tirgen.curation.base import Context, Decision, Filter, Rate, Row, Sieve, rank

Share = Annotated[float, Field(ge=0, le=1)]


class Difficulty(Filter):
    """The pass rate of its problem, k of n samples, lies within bounds, both included."""

    KIND: ClassVar[str] = "difficulty"

    runs: tuple[str, ...] = Field(
        default=(), description="Runs that measure it; the trajectory's own if empty."
    )
    min_rate: Share = 0.0
    max_rate: Share = 1.0
    min_samples: int = Field(default=1, ge=1)
    unmeasured: Literal["drop", "keep"] = "drop"

    def sieve(self, context: Context) -> Sieve:
        context.require_runs(self.runs, tool=True)
        return _Rated(self, context, tool=True)

    def rated(self, rate: Rate) -> Decision:
        within = self.min_rate <= rate.k / rate.n <= self.max_rate
        reason = f"{rate} samples solved it, wanted is {self.min_rate:g} to {self.max_rate:g}"
        return Decision(within, reason, _evidence(rate))


class CotSolvable(Filter):
    """Drops problems that the reasoner solves without the tool (method.md 1.4, 9.2 no. 19).

    Measured by a run of the service itself (tirgen generate --no-tool); one k/n per problem.
    """

    KIND: ClassVar[str] = "cot_solvable"

    runs: tuple[str, ...] = Field(
        default=(),
        description="Runs that measure it; all runs of the reasoner without the tool if empty.",
    )
    threshold: float = Field(default=1.0, gt=0, le=1, description="Solved at this rate: dropped.")
    min_samples: int = Field(default=4, ge=1)
    unmeasured: Literal["drop", "keep"] = "drop"

    def sieve(self, context: Context) -> Sieve:
        context.require_runs(self.runs, tool=False)
        return _Rated(self, context, tool=False)

    def rated(self, rate: Rate) -> Decision:
        solved = rate.k / rate.n >= self.threshold
        reason = f"{rate} samples solved it without the tool, {self.threshold:g} is too many"
        return Decision(not solved, reason, _evidence(rate))


@dataclass(frozen=True)
class _Rated:
    filter: Difficulty | CotSolvable
    context: Context
    tool: bool
    surveys: bool = False

    def survey(self, rows: Sequence[Row]) -> None:
        raise NotImplementedError

    def decide(self, rows: Sequence[Row]) -> list[Decision]:
        rates = self.context.rates(rows, self.filter.runs, tool=self.tool)
        return [self._decision(rate) for rate in rates]

    def _decision(self, rate: Rate) -> Decision:
        if rate.n >= self.filter.min_samples:
            return self.filter.rated(rate)
        keep = True if self.filter.unmeasured == "keep" else None
        reason = f"measured by {rate.n} samples, {self.filter.min_samples} are needed"
        return Decision(keep, reason, _evidence(rate))


def _evidence(rate: Rate) -> dict[str, object]:
    return {"solved": rate.k, "samples": rate.n, "runs": list(rate.runs)}


class OnePerProblem(Filter):
    """Of each problem's trajectories the best `keep` (9.2 no. 21); ties are drawn by the seed."""

    KIND: ClassVar[str] = "one_per_problem"
    seeded: ClassVar[bool] = True

    prefer: Literal["first", "shortest", "longest", "fewest_calls", "most_calls", "random"] = (
        "most_calls"
    )
    keep: int = Field(default=1, ge=1)

    def sieve(self, context: Context) -> Sieve:
        return _Best(self, context.seed)


@dataclass
class _Best:
    """Holds the keys of the best of each problem."""

    filter: OnePerProblem
    seed: int
    surveys: bool = True
    n_seen: int = 0
    best: dict[str, list[tuple[tuple[int, ...], int]]] = field(
        default_factory=lambda: defaultdict(list)
    )

    def survey(self, rows: Sequence[Row]) -> None:
        for row in rows:
            best = self.best[row.problem_key]
            # A heap of the smallest is one of the greatest negatives.
            entry = (tuple(-part for part in self._key(row)), row.id)
            heapq.heappush(best, entry)
            if len(best) > self.filter.keep:
                heapq.heappop(best)
            self.n_seen += 1

    def decide(self, rows: Sequence[Row]) -> list[Decision]:
        decisions = []
        for row in rows:
            chosen = sorted(id for _, id in self.best[row.problem_key])
            kept = row.id in chosen
            said = f"preferred is {self.filter.prefer}"
            reason = f"stands for its problem, {said}" if kept else f"others stand for it, {said}"
            decisions.append(Decision(kept, reason, {"chosen": chosen}))
        return decisions

    def _key(self, row: Row) -> tuple[int, ...]:
        """Smaller is better."""
        draw = rank(self.seed, row.content_hash)
        return {
            "first": (self.n_seen,),
            "shortest": (row.n_tokens, draw),
            "longest": (-row.n_tokens, draw),
            "fewest_calls": (row.n_calls, row.n_tokens, draw),
            "most_calls": (-row.n_calls, row.n_tokens, draw),
            "random": (draw,),
        }[self.filter.prefer]


class Balance(Filter):
    """Down-sampling by number of tool calls (method.md 1.4, 1.5; 9.2 no. 20), drawn by the seed.

    Each stratum (1, 2, ... `last` or more calls) keeps its share, and at most its cap.
    """

    KIND: ClassVar[str] = "balance"
    seeded: ClassVar[bool] = True

    last: int = Field(default=7, ge=1)
    share: dict[int, Share] = Field(default={}, description="Calls -> share kept; else all.")
    cap: dict[int, int] = Field(default={}, description="Calls -> at most so many.")

    def sieve(self, context: Context) -> Sieve:
        return _Strata(self, context.seed)

    def allowed(self, calls: int, n: int) -> int:
        """How many of a stratum of `n` are kept."""
        share = int(n * self.share.get(calls, 1.0) + 0.5)
        return min(share, self.cap.get(calls, share))


@dataclass
class _Strata:
    """Holds one number of 8 bytes of each row: its draw."""

    filter: Balance
    seed: int
    surveys: bool = True
    draws: dict[int, array[int]] = field(default_factory=lambda: defaultdict(lambda: array("Q")))
    limits: dict[int, tuple[int, int]] = field(default_factory=dict)  # stratum -> (draw, ties)

    def survey(self, rows: Sequence[Row]) -> None:
        for row in rows:
            self.draws[self._stratum(row)].append(self._draw(row))

    def decide(self, rows: Sequence[Row]) -> list[Decision]:
        decisions = []
        for row in rows:
            stratum, draw = self._stratum(row), self._draw(row)
            limit, ties = self._limit(stratum)
            kept = draw < limit or (draw == limit and ties > 0)
            if draw == limit and kept:
                self.limits[stratum] = (limit, ties - 1)
            n = len(self.draws[stratum])
            allowed = self.filter.allowed(stratum, n)
            more = " or more" if stratum == self.filter.last else ""
            reason = f"{allowed} of {n} with {stratum}{more} calls are kept"
            evidence = {"calls": stratum, "allowed": allowed, "of": n}
            decisions.append(Decision(kept, reason, evidence))
        return decisions

    def _limit(self, stratum: int) -> tuple[int, int]:
        """The greatest draw that is kept, and how many of those that are equal to it."""
        if stratum not in self.limits:
            draws = sorted(self.draws[stratum])
            allowed = self.filter.allowed(stratum, len(draws))
            limit = draws[allowed - 1] if allowed else -1
            below = sum(draw < limit for draw in draws[:allowed])
            self.limits[stratum] = (limit, allowed - below)
        return self.limits[stratum]

    def _stratum(self, row: Row) -> int:
        return min(row.n_calls, self.filter.last)

    def _draw(self, row: Row) -> int:
        return rank(self.seed, row.content_hash)
