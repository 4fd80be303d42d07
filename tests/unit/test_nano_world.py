"""nano's problem world and teacher: true solutions, split apart, honest about failure."""

from __future__ import annotations

import contextlib
import io
import json
from itertools import islice
from random import Random

import pytest

from shared.fences import Kind, parse
from shared.nano.teacher import CALL_FAILURES, block, demonstrations, observe, policy, sabotage
from shared.nano.world import FAMILIES, solved, stream
from shared.problems import packaged_problems
from shared.trajectory import Problem
from tirgen.code_quality import is_trivial


@pytest.mark.parametrize("family", FAMILIES)
def test_every_computation_prints_its_value(family: str) -> None:
    """The reference comes from plain Python in the generator; the code, run, must agree."""
    rng = Random(5)
    for _ in range(15):
        for calc in solved(rng, family).calcs:
            out = io.StringIO()
            with contextlib.redirect_stdout(out):
                exec(calc.code, {})  # noqa: S102  the world's own template
            assert out.getvalue().strip() == calc.value


def test_at_least_half_of_twelve_families_want_more_than_arithmetic() -> None:
    rng = Random(1)
    natural = [
        name
        for name in FAMILIES
        if all(any(not is_trivial(c.code) for c in solved(rng, name).calcs) for _ in range(10))
    ]
    assert len(FAMILIES) >= 12
    assert len(natural) >= len(FAMILIES) / 2


def test_the_splits_share_no_problem() -> None:
    train = {item.text for item in islice(stream(1, "train"), 5000)}
    heldout = {item.text for item in islice(stream(2, "heldout"), 2000)}
    assert len(heldout) > 500
    assert not train & heldout


def test_packaged_problems_are_held_out_and_distinct() -> None:
    rows = [json.loads(line) for line in packaged_problems().read_text().splitlines()]
    keys = {Problem(row["problem"], row["answer"]).key for row in rows}
    train = {item.text for item in islice(stream(7, "train"), 5000)}
    assert len(keys) == len(rows) >= 300
    assert not train & {row["problem"] for row in rows}


def test_streams_are_reproducible() -> None:
    first, again = (list(islice(demonstrations(3), 200)) for _ in range(2))
    assert first == again != list(islice(demonstrations(4), 200))


def test_a_sabotaged_program_never_succeeds() -> None:
    """What the teacher sells as a failure is one: an error, or nothing printed."""
    rng = Random(9)
    for item in islice(stream(9, "train"), 200):
        for calc in item.calcs:
            broken, seen = sabotage(rng, calc.code)
            assert broken != calc.code
            assert seen == "(no output; use print)" or "Error: " in seen
            assert observe(calc.code) == calc.value  # the control: the sound one does succeed


def test_the_policy_errs_as_often_as_announced() -> None:
    """Binomial, n ~ 4,000 calls: the share of failing first tries within 4 standard errors."""
    rng, calls, failed = Random(2), 0, 0
    for item in islice(stream(2, "train"), 3000):
        calls += len(item.calcs)
        failed += policy(rng, item).text.count("The code failed")
    error = (CALL_FAILURES * (1 - CALL_FAILURES) / calls) ** 0.5
    assert abs(failed / calls - CALL_FAILURES) < 4 * error


def test_observations_and_the_extractors_code_carry_no_loss_for_the_reasoner() -> None:
    roles = set()
    for demo in islice(demonstrations(11), 2000):
        roles.add(demo.role)
        learned = "".join(s.text for s in demo.reply if s.learn)
        if demo.role in ("reasoner", "policy"):
            assert "```output" not in learned
        if demo.role == "reasoner":
            assert "```python" not in learned
    assert roles == {
        "reasoner", "policy", "extractor", "extractor_judge", "extractor_logic", "extractor_code",
        "judge",
    }  # fmt: skip


def test_demonstrated_blocks_are_what_the_fence_parser_reads() -> None:
    action, observation = block("print(1)", "1")
    blocks = parse("Thought." + action + observation)
    assert [(b.kind, b.body) for b in blocks[1:]] == [(Kind.PYTHON, "print(1)"), (Kind.OUTPUT, "1")]
