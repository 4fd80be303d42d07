"""An attempt: what one sample of one question came to, as numbers that figures are made of.

It is read off the stored trajectory and its verdicts, so that any run of the database can be looked
at in the same way, and no figure rests on anything that was not stored.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from shared.trajectory import Check, End, Outcome, Step, Trajectory, Verdict


@dataclass(frozen=True, slots=True)
class Tried:
    """One action with its tries, oldest first; failures of the sandbox itself are not among them.

    `stands`: the last try is part of the trajectory. It is not where the policy, after a try had
    been taken back, took no action any more.
    """

    outcomes: tuple[Outcome, ...]
    stands: bool = True

    @property
    def first_ok(self) -> bool:
        return self.outcomes[0] is Outcome.OK

    @property
    def ok(self) -> bool:
        """The call that stands succeeded."""
        return self.stands and self.outcomes[-1] is Outcome.OK

    @property
    def corrected_at(self) -> int | None:
        """Which regeneration (1, 2, ...) succeeded; None where none did or none was needed."""
        return len(self.outcomes) - 1 if self.ok and len(self.outcomes) > 1 else None


@dataclass(frozen=True, slots=True)
class Attempt:
    """One sample of one question.

    right: by the rules; None where they are undecided, which counts as not right. judged: by a
        model, None where it was not asked or said nothing usable.
    boxed: there is an answer at all. n_tokens: of the response that stands, observations included.
    n_generated: every token that was sampled, those of retries included. Seconds are waits of this
    attempt alone, not time of the machine; None where they were not recorded.
    """

    question: str
    sample: int
    right: bool | None
    judged: bool | None
    answer: str | None
    calls: tuple[Tried, ...]
    end: End
    n_tokens: int
    n_generated: int
    n_retries: int
    seconds_generate: float | None = None
    seconds_tool: float | None = None
    trajectory_id: int | None = None

    @property
    def boxed(self) -> bool:
        return bool(self.answer and self.answer.strip())

    @property
    def n_calls(self) -> int:
        """Calls that stand."""
        return sum(call.stands for call in self.calls)

    @property
    def n_ok(self) -> int:
        return sum(call.ok for call in self.calls)


def attempt(
    question: str,
    sample: int,
    trajectory: Trajectory,
    verdicts: Iterable[Verdict],
    trajectory_id: int | None = None,
    *,
    answer: str | None,
) -> Attempt:
    """The facts of a stored trajectory; of each check the last of `verdicts` counts.

    `answer`: what was judged, the boxed answer or a program.
    """
    current: Mapping[Check, Verdict] = {verdict.check: verdict for verdict in verdicts}
    meta = trajectory.meta
    right = current.get(Check.ANSWER)
    judged = current.get(Check.JUDGE)
    return Attempt(
        question=question,
        sample=sample,
        right=right.passed if right else None,
        judged=judged.passed if judged else None,
        answer=answer,
        calls=tried(trajectory.steps),
        end=trajectory.end,
        n_tokens=trajectory.n_tokens,
        n_generated=_number(meta, "n_generated", trajectory.n_tokens),
        n_retries=sum(len(step.discarded) for step in trajectory.steps),
        seconds_generate=meta.get("seconds_generate"),
        seconds_tool=meta.get("seconds_tool"),
        trajectory_id=trajectory_id,
    )


def tried(steps: Sequence[Step]) -> tuple[Tried, ...]:
    """Every action of a trajectory with its tries, in order."""
    found = []
    for step in steps:
        made = [*step.discarded, *([step.call] if step.call is not None else [])]
        outcomes = [call.result.outcome for call in made]
        seen = tuple(o for o in outcomes if o is not Outcome.INFRASTRUCTURE_ERROR)
        stands = step.call is not None and outcomes[-1] is not Outcome.INFRASTRUCTURE_ERROR
        if seen:
            found.append(Tried(seen, stands))
    return tuple(found)


def _number(meta: Mapping[str, Any], name: str, otherwise: int) -> int:
    value = meta.get(name, otherwise)
    return int(value) if isinstance(value, int | float) else otherwise
