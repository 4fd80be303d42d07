"""Right and wrong verdicts over the labelled pairs, beside Math-Verify alone on the same pairs.

    python bench/grading_labelled.py

One JSON object a line on standard output (false positives and negatives of every category); the
same as a table, and every pair that was judged wrongly, on standard error.
"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from shared.grading import Grade, Grader, Value
from tests.labelled import Pair, counted, grades, math_verify_accepts, score, table


async def judge(pairs: list[Pair]) -> list[Grade]:
    async with Grader() as grader:
        return await grades(grader, pairs)


def main() -> None:
    pairs = counted()
    found = asyncio.run(judge(pairs))
    ours = score(pairs, [grade.value is Value.EQUAL for grade in found])
    theirs = score(pairs, math_verify_accepts(pairs, 20.0))
    for name in sorted(ours):
        for metric in ("accuracy", "false_positives", "false_negatives"):
            mine, peer = getattr(ours[name], metric), getattr(theirs[name], metric)
            line = {"bench": "grading_labelled", "metric": f"{name}: {metric}",
                    "value": round(mine, 4), "unit": "share" if metric == "accuracy" else "pairs",
                    "peer": round(peer, 4), "ratio": round(mine / peer, 3) if peer else None,
                    "n": ours[name].n, "version": found[0].version}  # fmt: skip
            print(json.dumps(line), flush=True)
    print(table(ours, theirs), file=sys.stderr)
    for pair, grade in zip(pairs, found, strict=True):
        if (grade.value is Value.EQUAL) != pair.equal:
            kind = "false negative" if pair.equal else "FALSE POSITIVE"
            said = f"{grade.value} by {grade.stage} ({grade.reason})"
            print(f"{kind} [{pair.category}] {pair.answer!r} | {pair.reference!r}: {said}",
                  file=sys.stderr)  # fmt: skip


if __name__ == "__main__":
    main()
