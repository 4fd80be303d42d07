"""What a filter is: declared parameters (`Filter`), at work on one population (`Sieve`).

A filter decides over `Row`s and gives one `Decision` for each, which becomes a verdict row. Filters
are pure: what they need of the database comes through their rows and their `Context`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol

from pydantic import BaseModel, ConfigDict, Field

from shared.fences import Kind, parse
from shared.grading.extract import last_boxed
from shared.sandbox.result import Outcome, RunResult, Tier
from shared.trajectory import End, Problem, Step, ToolCall, Trajectory, content_hash

PREFIX = "filter/"  # of the check name of a filter's verdicts: a filter may be called as a check is


@dataclass(frozen=True, slots=True)
class Row:
    """One candidate. `correct`: what the newest verdict on its answer says, None for undecided.

    `trajectory` is there for filters that say `reads_body`.
    """

    id: int
    run_id: int
    problem_key: str
    problem: str
    content_hash: str
    model: str  # the reasoner's
    n_calls: int
    n_tokens: int
    outcomes: tuple[str, ...]  # of the calls that stand, each once
    correct: bool | None
    trajectory: Trajectory | None = None

    @property
    def body(self) -> Trajectory:
        assert self.trajectory is not None, "the filter does not say that it reads bodies"
        return self.trajectory


@dataclass(frozen=True, slots=True)
class Decision:
    """`passed` None: could not decide, which is not passed."""

    passed: bool | None
    reason: str
    evidence: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Rate:
    """How many of `n` samples solved a problem; `runs` they come from."""

    k: int
    n: int
    runs: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.k}/{self.n}"


class Context(Protocol):
    """What the filters of one application share."""

    @property
    def seed(self) -> int: ...

    def rates(self, rows: Sequence[Row], runs: Sequence[str], *, tool: bool) -> list[Rate]:
        """Of each row, how often the samples of its problem were right in `runs`.

        Without names: with the tool, in the row's own run; else in all runs of its model without
        the tool. 0/0 where there are none.
        """

    def require_runs(self, runs: Sequence[str], *, tool: bool) -> None:
        """Raises ConfigError where `rates` would have no run to look at."""


class Sieve(Protocol):
    """A filter at work. One that `surveys` is shown all rows, in batches, before it decides any."""

    @property
    def surveys(self) -> bool: ...

    def survey(self, rows: Sequence[Row]) -> None: ...

    def decide(self, rows: Sequence[Row]) -> list[Decision]: ...


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Given(Section):
    """A row of an example: what it is, in as much as the filter looks, and whether it is kept."""

    keep: bool | None = Field(default=None, description="Left out where a draw decides.")
    problem: str = "What is 6 times 7?"
    text: str = "We multiply.\n```python\nprint(6 * 7)\n```\n```output\n42\n```\nIt is \\boxed{42}."
    model: str = "model"
    thinking: bool = False
    n_tokens: int | None = None  # a word is one, unless given
    outcomes: tuple[Outcome, ...] | None = None  # of its calls; ok unless given
    correct: bool | None = True
    solved: tuple[int, int] | None = Field(default=None, description="[k, n] of its problem.")

    def row(self, id: int) -> Row:
        trajectory = self._trajectory(id)
        calls = trajectory.calls
        return Row(
            id=id,
            run_id=1,
            problem_key=trajectory.problem_key,
            problem=self.problem,
            content_hash=content_hash(trajectory.identity()),
            model=self.model,
            n_calls=len(calls),
            n_tokens=trajectory.n_tokens,
            outcomes=tuple(sorted({call.result.outcome.value for call in calls})),
            correct=self.correct,
            trajectory=trajectory,
        )

    def _trajectory(self, seed: int) -> Trajectory:
        steps: list[Step] = []
        thought, code = "", None
        outcomes = list(self.outcomes or ())
        for block in parse(self.text):
            if block.kind is Kind.PYTHON:
                code = block.body
            elif block.kind is Kind.OUTPUT and code is not None:
                outcome = outcomes[len(steps)] if len(steps) < len(outcomes) else Outcome.OK
                result = RunResult(outcome, block.body, "", None, Tier.A, 0.0, 0.0, 0, 0)
                steps.append(Step(thought, ToolCall(code, block.body, result)))
                thought, code = "", None
            else:
                thought += block.raw
        steps += [Step(thought)] if thought else []
        answer = last_boxed(self.text)
        return Trajectory(
            problem_key=Problem(self.problem, "").key,
            steps=tuple(steps),
            text=self.text,
            end=End.GAVE_UP if answer is None else End.ANSWERED,
            answer=answer,
            thinking=self.thinking,
            seed=seed,
            n_tokens=self.n_tokens if self.n_tokens is not None else len(self.text.split()),
        )


class Example(Section):
    """A small population, and what the filter makes of each of its rows."""

    about: str = ""
    rows: tuple[Given, ...] = Field(min_length=1)
    n_kept: int | None = Field(default=None, ge=0, description="How many are kept in all.")


class Filter(Section):
    """Parameters of a filter, as declared. A subclass has `judge`, or a `sieve` of its own.

    `VERSION` changes whenever the filter could decide differently with equal parameters.
    """

    VERSION: ClassVar[str] = "1"
    KIND: ClassVar[str]
    seeded: ClassVar[bool] = False

    name: str = Field(default="", description="What its verdicts are called; its kind if empty.")
    examples: tuple[Example, ...] = ()

    @property
    def called(self) -> str:
        return self.name or self.KIND

    @property
    def reads_body(self) -> bool:
        """Whether it looks at more of a trajectory than its columns."""
        return False

    def located(self, folder: Path) -> Filter:
        """The same, with relative paths taken from `folder`; what it needs is read and checked."""
        return self

    def parameters(self) -> dict[str, Any]:
        """Everything that its decisions depend on, but the seed."""
        return self.model_dump(mode="json", exclude={"name", "examples"})

    def version(self, seed: int) -> str:
        parts = [self.KIND, self.parameters(), seed if self.seeded else None]
        return f"{self.VERSION}/{content_hash(parts)[:8]}"

    def judge(self, row: Row) -> Decision:
        """The decision on one row by itself."""
        raise NotImplementedError

    def sieve(self, context: Context) -> Sieve:
        return EachRow(self)


@dataclass(frozen=True)
class EachRow:
    """The sieve of a filter that looks at one row at a time."""

    filter: Filter
    surveys: bool = False

    def survey(self, rows: Sequence[Row]) -> None:
        raise NotImplementedError

    def decide(self, rows: Sequence[Row]) -> list[Decision]:
        return [self.filter.judge(row) for row in rows]


def rank(seed: int, *parts: str | int) -> int:
    """A number below 2^64 that stands for a random draw: equal parts draw equally."""
    text = "\x1f".join(map(str, (seed, *parts)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


@dataclass(frozen=True, slots=True)
class OfExample:
    """The `Context` of an example: rates are those that its rows give."""

    example: Example
    seed: int = 0

    def rates(self, rows: Sequence[Row], runs: Sequence[str], *, tool: bool) -> list[Rate]:
        solved = [self.example.rows[row.id - 1].solved or (0, 0) for row in rows]
        return [Rate(k, n) for k, n in solved]

    def require_runs(self, runs: Sequence[str], *, tool: bool) -> None:
        """Examples bring their rates with them."""


def failures(filter: Filter) -> Iterator[str]:
    """What the filter's own examples expect and do not get; nothing if it does as it says."""
    for number, example in enumerate(filter.examples, start=1):
        rows = [given.row(i) for i, given in enumerate(example.rows, start=1)]
        sieve = filter.sieve(OfExample(example))
        if sieve.surveys:
            sieve.survey(rows)
        decisions = sieve.decide(rows)
        about = f", {example.about}" if example.about else ""
        place = f"{filter.called}, example {number}{about}"
        for given, row, decision in zip(example.rows, rows, decisions, strict=True):
            if given.keep not in (None, decision.passed is True):
                wanted = "kept" if given.keep else "dropped"
                yield f"{place}, row {row.id}: it should be {wanted}, but {decision.reason}"
        n_kept = sum(decision.passed is True for decision in decisions)
        if example.n_kept not in (None, n_kept):
            yield f"{place}: {example.n_kept} rows should be kept, {n_kept} are"
