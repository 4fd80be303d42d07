"""The labelled pairs of answers, and what Math-Verify alone says of them.

Accepted means: counted as a right answer. Undecided is not accepted, so a false positive is always
a wrong label, and a false negative at worst a lost one.
"""

from __future__ import annotations

import asyncio
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from shared.grading import Grade, Grader
from shared.sandbox import Sandbox

PAIRS = Path(__file__).with_name("grading_pairs.txt")
LABELS = {"=": True, "!": False, "?": None}
BATCH = 10  # pairs per run in the jail

_WARMUP = """
from math_verify import parse, verify
for text in ("$x^2+1$", "$\\\\frac{1}{2}$", "(1,2]", "1/2", "$\\\\{1,2\\\\}$", "$x<1$"):
    found = parse(text, parsing_timeout=None)
    verify(found, found, timeout_seconds=None)
"""
_PEER = """
import json, sys
from math_verify import parse, verify
for answer, reference in json.loads({pairs!r}):
    print("begun", flush=True)
    try:
        said = verify(parse(reference, parsing_timeout=None), parse(answer, parsing_timeout=None),
                      timeout_seconds=None)
    except BaseException:
        said = False
    print(json.dumps(bool(said)), flush=True)
"""


@dataclass(frozen=True, slots=True)
class Pair:
    """`equal`: what a careful mathematician says; None where careful people disagree."""

    answer: str
    reference: str
    equal: bool | None
    category: str
    reason: str


@dataclass(frozen=True, slots=True)
class Score:
    """Of `n` pairs, `n_equal` are equal."""

    n: int = 0
    n_equal: int = 0
    false_positives: int = 0
    false_negatives: int = 0

    @property
    def accuracy(self) -> float:
        return 1 - (self.false_positives + self.false_negatives) / self.n if self.n else 1.0


def load() -> list[Pair]:
    """Every pair of the file, in its order, those without a label included."""
    pairs, category = [], ""
    for line in PAIRS.read_text(encoding="utf-8").splitlines():
        if line.startswith("["):
            category = line.strip("[]")
        elif line and not line.startswith("#"):
            answer, reference, reason = line[2:].split(" || ")
            answer, reference = (side.replace("⏎", "\n") for side in (answer, reference))
            pairs.append(Pair(answer, reference, LABELS[line[0]], category, reason))
    return pairs


def counted() -> list[Pair]:
    """The pairs that have a label."""
    return [pair for pair in load() if pair.equal is not None]


def score(pairs: Iterable[Pair], accepted: Iterable[bool]) -> dict[str, Score]:
    """By category, and under "all"."""
    counts: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0, 0])
    for pair, yes in zip(pairs, accepted, strict=True):
        for name in (pair.category, "all"):
            of = counts[name]
            of[0] += 1
            of[1] += bool(pair.equal)
            of[2] += bool(yes and not pair.equal)
            of[3] += bool(pair.equal) and not yes
    return {name: Score(*of) for name, of in counts.items()}


def math_verify_accepts(pairs: Sequence[Pair], timeout: float) -> list[bool]:
    """Math-Verify with its defaults. What hangs is killed and counts as not accepted.

    `timeout`: CPU seconds for each BATCH; ten pairs take less than one.

    It is given LaTeX as its documentation asks for it: between dollar signs, where the text has
    neither these nor a box.
    """
    batches = [pairs[i : i + BATCH] for i in range(0, len(pairs), BATCH)]

    async def every() -> list[list[bool]]:
        async with Sandbox(preload=("sympy", "math_verify")) as sandbox:
            return list(
                await asyncio.gather(*(_peer(sandbox, batch, timeout) for batch in batches))
            )

    return [said for batch in asyncio.run(every()) for said in batch]


async def grades(grader: Grader, pairs: Sequence[Pair]) -> list[Grade]:
    """What this project says, all at once."""
    return list(await asyncio.gather(*(grader.agrade(p.answer, p.reference) for p in pairs)))


async def _peer(sandbox: Sandbox, pairs: Sequence[Pair], timeout: float) -> list[bool]:
    said: list[bool] = []
    while len(said) < len(pairs):
        rest = [[_wrapped(p.answer), _wrapped(p.reference)] for p in pairs[len(said) :]]
        result = await sandbox.arun(_PEER.format(pairs=json.dumps(rest)), timeout=timeout)
        lines = [line for line in result.stdout.splitlines() if line in ("true", "false")]
        said += [line == "true" for line in lines]
        if len(lines) < len(rest):
            said.append(False)  # the next one hung or died
    return said


def _wrapped(text: str) -> str:
    return text if "$" in text or "boxed" in text or "\\(" in text else f"${text}$"


def table(ours: Mapping[str, Score], theirs: Mapping[str, Score]) -> str:
    """Both, a category a line: accuracy, false positives, false negatives."""
    lines = [f"{'category':26}{'pairs':>6}{'equal':>6}   {'ours':^20}   {'math-verify':^20}"]
    for name in sorted(ours, key=lambda name: (name == "all", name)):
        one = ours[name]
        parts = [f"{s.accuracy:8.3f} {s.false_positives:5} {s.false_negatives:5}" for s in
                 (one, theirs[name])]  # fmt: skip
        lines.append(f"{name:26}{one.n:6}{one.n_equal:6}   " + "   ".join(parts))
    return "\n".join(lines)
