"""What a comparison comes to: one of three values, the stage that decided, and why."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import StrEnum

from shared.grading.tree import Node


class Value(StrEnum):
    EQUAL = "equal"
    DIFFERENT = "different"
    UNDECIDED = "undecided"


class Stage(StrEnum):
    """Which stage decided, or where it was left undecided; in the order in which they are asked."""

    CAPS = "caps"
    STRING = "string"
    RATIONAL = "rational"
    STRUCTURE = "structure"
    SYMBOLIC = "symbolic"
    NUMERIC = "numeric"
    MATH_VERIFY = "math_verify"
    JUDGE = "judge"


_ORDER = {stage: place for place, stage in enumerate(Stage)}


@dataclass(frozen=True, slots=True)
class Decision:
    value: Value
    stage: Stage
    reason: str = ""

    @property
    def equal(self) -> bool:
        return self.value is Value.EQUAL

    def at(self, stage: Stage) -> Decision:
        """This decision, as one of which `stage` was a part."""
        return Decision(self.value, max(self.stage, stage, key=_ORDER.__getitem__), self.reason)


Compare = Callable[[Node, Node], Decision]
Rule = Callable[[Node, Node, Compare], Decision | None]


def equal(stage: Stage, reason: str = "") -> Decision:
    return Decision(Value.EQUAL, stage, reason)


def different(stage: Stage, reason: str) -> Decision:
    return Decision(Value.DIFFERENT, stage, reason)


def undecided(stage: Stage, reason: str) -> Decision:
    return Decision(Value.UNDECIDED, stage, reason)


def every(parts: Iterable[Decision]) -> Decision:
    """Equal when all are; different when one is; else undecided. Stops at the first different."""
    found = equal(Stage.STRUCTURE)
    for part in parts:
        if part.value is Value.DIFFERENT:
            return part.at(Stage.STRUCTURE)
        if part.value is Value.UNDECIDED or not found.equal:
            found = found if not found.equal else part
        else:
            found = part.at(found.stage)
    return found
