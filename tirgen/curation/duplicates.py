"""Near-duplicates: MinHash finds the pairs, the exact Jaccard index of their words decides."""

from __future__ import annotations

import zlib
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from pydantic import Field

from shared.optional import require
from tirgen.curation.base import Context, Decision, Filter, Row, Sieve
from tirgen.curation.words import agreement, grams, numbers, words

PERMUTATIONS = 128
MARGIN = 0.15  # pairs that are estimated so far below the threshold are measured, too
PAIRS = 5  # that a verdict lists


class NearDuplicates(Filter):
    """Of near-equal problems, or responses, only the first; all samples of a problem are one.

    Two texts are near-duplicates if the Jaccard index of their runs of `shingle` words reaches
    `threshold` and they have the same numbers: the same template with others is another problem.
    Holds some kB of each text that it keeps.
    """

    KIND: ClassVar[str] = "near_duplicates"

    of: Literal["problem", "response"] = "problem"
    threshold: float = Field(default=0.7, gt=0, le=1)
    shingle: int = Field(default=3, ge=1)
    same_numbers: float = Field(
        default=1.0, ge=0, le=1, description="Share of numbers that two must have in common."
    )

    @property
    def reads_body(self) -> bool:
        return self.of == "response"

    def sieve(self, context: Context) -> Sieve:
        return _Seen(self)


@dataclass(frozen=True, slots=True)
class _Text:
    """`shingles`: 32-bit hashes, each once."""

    shingles: array[int]
    numbers: Counter[str]


@dataclass
class _Seen:
    filter: NearDuplicates
    surveys: bool = False
    kept: dict[int, _Text] = field(default_factory=dict)  # by trajectory
    decided: dict[str, Decision] = field(default_factory=dict)  # by problem
    index: Any = None

    def __post_init__(self) -> None:
        self.lib = require("datasketch", need="near_duplicates", install="tirgen[curation]")
        threshold = max(self.filter.threshold - MARGIN, 0.1)
        self.index = self.lib.MinHashLSH(threshold=threshold, num_perm=PERMUTATIONS)

    def survey(self, rows: Sequence[Row]) -> None:
        raise NotImplementedError

    def decide(self, rows: Sequence[Row]) -> list[Decision]:
        if self.filter.of == "response":
            return [self._decision(row.id, row.body.text) for row in rows]
        for row in rows:
            if row.problem_key not in self.decided:
                self.decided[row.problem_key] = self._decision(row.id, row.problem)
        return [self.decided[row.problem_key] for row in rows]

    def _decision(self, id: int, text: str) -> Decision:
        found = words(text)
        hashes = {zlib.crc32(gram.encode()) for gram in grams(found, self.filter.shingle)}
        this = _Text(array("I", hashes), numbers(found))
        sketch = self.lib.MinHash(num_perm=PERMUTATIONS, seed=1, hashfunc=int)
        sketch.update_batch(this.shingles)
        pairs = sorted(
            (self._pair(this, other) for other in self.index.query(sketch)), reverse=True
        )
        evidence = {
            "pairs": [
                {"trajectory": -other, "score": round(score, 4), "numbers": round(same, 4)}
                for score, same, other in pairs[:PAIRS]
            ]
        }
        for score, same, other in pairs:
            if score >= self.filter.threshold and same >= self.filter.same_numbers:
                reason = f"its {self.filter.of} is near that of trajectory {-other}: {score:.2f}"
                return Decision(False, reason, {"trajectory": -other, **evidence})
        self.kept[id] = this
        self.index.insert(id, sketch)
        return Decision(True, f"no {self.filter.of} before it is near", evidence if pairs else {})

    def _pair(self, this: _Text, other: int) -> tuple[float, float, int]:
        """(Jaccard index, agreement of numbers, minus its id: of equals the first is named)."""
        that = self.kept[other]
        common = len({*this.shingles} & {*that.shingles})
        union = len(this.shingles) + len(that.shingles) - common
        return common / union, agreement(this.numbers, that.numbers), -other
