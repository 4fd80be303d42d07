"""A rollout: what is sampled, credited and left out, in an order that depends on nothing but seeds.

Policy, tokens, sandbox and grader are scripted; the loop of an episode has tests of its own.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, replace
from random import Random
from typing import Any, cast

import pytest
import torch

from rl.config import TrainConfig
from rl.data import Prompt
from rl.loss import Level
from rl.rollout.sampler import Rollout, Sampler, first_tries
from rl.world import World
from shared.errors import EndpointError
from shared.grading import Value
from shared.policy import Generated
from shared.sandbox.result import RunResult
from shared.trajectory import Outcome, Problem
from tests.scripted import ScriptedSandbox, ran
from tests.scripted_policy import ByteCodec, Script, ScriptedEngine

OK, BAD = Outcome.OK, Outcome.MODEL_ERROR


class FortyTwo:
    """Prompts without a snapshot, all with the same answer."""

    def __len__(self) -> int:
        return 1000

    def take(self, start: int, n: int) -> list[Prompt]:
        return [Prompt(i, Problem(f"P{i}", "42")) for i in range(start, start + n)]


@dataclass
class ScriptedGrader:
    """Equal texts are equal; a question mark cannot be decided."""

    async def agrade(self, answer: str, reference: str) -> Any:
        value = Value.EQUAL if answer == reference else Value.DIFFERENT
        return type("Verdict", (), {"value": Value.UNDECIDED if answer == "?" else value})


def config(**fields: Any) -> TrainConfig:
    schedule = {"prompts": 4, "group": 4, "step_group": 4, "refill_cap": 3.0}
    given: dict[str, Any] = {
        "model": {"path": "-"},
        "data": {"snapshot": "-"},
        "schedule": schedule | fields.pop("schedule", {}),
        "rollout": {"tokens": 5000, "context": 9000} | fields.pop("rollout", {}),
        "step": {"l_suf": 2},
    }
    return TrainConfig(**(given | fields))


def act(code: str) -> str:
    return f"Compute.\n```python\n{code}\n```"


def policy(right: float = 0.5, good: float = 0.7) -> Script:
    """One call that works with chance `good`, then a right answer with chance `right`."""

    def script(said: str, seed: int) -> str:
        draw = Random(f"{said}|{seed}")
        if "output" in said:
            return "So \\boxed{42}." if draw.random() < right else f"So \\boxed{{{draw.random()}}}."
        code = "good" if draw.random() < good else "bad"
        whole = act(f"{code} {draw.randrange(10**6)}")
        if said.endswith("```"):
            return whole[whole.index("```") + 3 :]
        return whole[len(said) :] if whole.startswith(said) else whole

    return script


def sandbox(order: Random | None = None, down: bool = False) -> ScriptedSandbox:
    class Slow(ScriptedSandbox):
        async def arun(self, code: str, *, seed: int, timeout: float) -> RunResult:
            for _ in range(order.randrange(10) if order else 0):
                await asyncio.sleep(0)
            if down:
                return ran(Outcome.INFRASTRUCTURE_ERROR)
            return ran(BAD, stderr="no") if code.startswith("bad") else ran(OK, "42\n")

    return Slow()


def sampler(
    script: Script, chosen: TrainConfig | None = None, *, order: Random | None = None,
    down: bool = False, engine: type[ScriptedEngine] = ScriptedEngine,
) -> Sampler:  # fmt: skip
    """`order`: engine and sandbox yield at random, so that nothing arrives in order."""
    codec = ByteCodec("```", "\n\n")

    async def yields() -> None:
        for _ in range(order.randrange(10) if order else 0):
            await asyncio.sleep(0)

    parts: list[Any] = [FortyTwo(), engine(codec, script, wait=yields, version=7), codec]
    parts += [sandbox(order, down), ScriptedGrader(), World(0, 1, 0, torch.device("cpu"))]
    return Sampler(chosen or config(), *parts)


def sample(
    script: Script, chosen: TrainConfig | None = None, *, number: int = 0, cursor: int = 0,
    order: Random | None = None, down: bool = False,
) -> Rollout:  # fmt: skip
    made = sampler(script, chosen, order=order, down=down)
    return asyncio.run(made.rollout(number, cursor))


def without_times(sums: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in sums.items() if "seconds" not in name}


def levels(rollout: Rollout) -> dict[Level, int]:
    return {level: sum(one.level is level for one in rollout.rows) for level in Level}


def test_rows_are_of_groups_that_teach_something() -> None:
    made = sample(policy())
    assert made.version == 7
    by_group: dict[tuple[Level, str], list[float]] = {}
    for one in made.rows:
        by_group.setdefault((one.level, one.group), []).append(one.advantage)
    for (level, _), advantages in by_group.items():
        assert len(set(advantages)) > 1, "members of a group differ in reward"
        assert len(advantages) <= 4
        if level is Level.STEP:
            assert len(advantages) == 4
        assert sum(advantages) == pytest.approx(0, abs=1e-4)
    sums = made.sums
    assert sums["groups/episode/trained"] == len({g for lv, g in by_group if lv is Level.EPISODE})
    # Every episode has a row or a reason.
    lost = sum(n for name, n in sums.items() if name.startswith("drop/episode"))
    assert levels(made)[Level.EPISODE] + lost == sums["episodes"]


def test_groups_that_teach_nothing_are_sampled_again_up_to_the_cap() -> None:
    """All are right: no group trains, and 3 x 4 prompts are the end. Half of them: it fills."""
    dull = sample(policy(right=1.0, good=1.0))
    assert (dull.cursor, dull.sums["groups/episode"]) == (12, 12)
    assert not dull.rows
    assert dull.sums["drop/episode/equal_rewards"] == 48
    lively = sample(policy(good=1.0))
    assert lively.sums["groups/episode/trained"] >= 4
    assert lively.cursor < 12


def test_the_next_rollout_begins_where_this_one_ended() -> None:
    first = sample(policy())
    second = sample(policy(), number=1, cursor=first.cursor)
    numbers = {one.group for one in first.rows if one.level is Level.EPISODE}
    later = {one.group for one in second.rows if one.level is Level.EPISODE}
    assert max(map(int, numbers)) < first.cursor <= min(map(int, later))


def test_a_failed_execution_is_filtered_before_advantages() -> None:
    made = sample(policy(good=0.5))
    assert made.sums["drop/episode/failed_call"] > 0
    kept = sample(policy(good=0.5), config(credit={"failed_call": "keep"}))
    assert kept.sums["drop/episode/failed_call"] == 0
    assert kept.sums["against/episode/failed_call"] > 0


def test_step_groups_are_no_more_than_prompts_and_reward_what_executes() -> None:
    made = sample(policy(good=0.3))
    sums = made.sums
    assert 0 < sums["steps/groups"] <= made.cursor < sums["steps/failed"]
    assert sums["steps/tries"] == 4 * sums["steps/groups"]
    for one in made.rows:
        if one.level is Level.STEP:
            text = ByteCodec("```", "\n\n").decode(one.row.ids)
            learned = [i for i, x in zip(one.row.ids, one.row.learn, strict=True) if x]
            said = ByteCodec("```", "\n\n").decode(learned)
            assert text.endswith("\n```")
            assert "<eos>" not in said
            assert ("good" in said) is (one.advantage > 0)
            assert said.count("python") == 1


def test_a_sandbox_that_is_down_gives_no_rows_at_all() -> None:
    """Neither level may learn from it; control: with the sandbox up there are rows."""
    chosen = config(schedule={"prompts": 1, "refill_cap": 1.0})
    made = sample(policy(), chosen, down=True)
    assert not made.rows
    assert made.sums["drop/episode/infrastructure"] == made.sums["episodes"] == 4
    assert made.sums["steps/failed"] == 0
    assert sample(policy(), config(), down=False).rows


def test_an_undecided_answer_is_no_reward() -> None:
    def script(said: str, seed: int) -> str:
        return "\\boxed{?}" if Random(seed).random() < 0.5 else "\\boxed{42}"

    made = sample(script)
    assert made.sums["episodes/undecided"] == made.sums["drop/episode/undecided"] > 0


@pytest.mark.parametrize("level", ["episode", "step"])
def test_one_level_alone(level: str) -> None:
    made = sample(policy(good=0.5), config(levels=[level]))
    assert {one.level.value for one in made.rows} == {level}


def test_latency_and_concurrency_change_nothing() -> None:
    """Three orders of arrival and one episode at a time: the same rows, to the bit. Controls:
    another seed, and other prompts, give others."""
    first = sample(policy(), order=Random(1))
    for other in (
        sample(policy(), order=Random(2)),
        sample(policy(), order=Random(3)),
        sample(policy(), config(rollout={"in_flight": 1}), order=Random(4)),
    ):
        assert other.rows == first.rows
        assert without_times(other.sums) == without_times(first.sums)
    assert sample(policy(), config(seed=1)).rows != first.rows
    assert sample(policy(), cursor=100).rows != first.rows


def test_members_of_a_group_differ() -> None:
    made = sample(policy(), config(credit={"equal_rewards": "keep", "failed_call": "keep"}))
    rows = [one.row.ids for one in made.rows if one.level is Level.EPISODE]
    assert len(set(rows)) == len(rows)


def test_the_curriculum_decides_the_number_of_calls() -> None:
    chosen = config(
        schedule={"curriculum": [{"rollout": 0, "calls": 0}, {"rollout": 2, "calls": 3}]}
    )
    assert [chosen.schedule.calls(n, 5) for n in (0, 1, 2, 9)] == [0, 0, 3, 3]
    assert sample(policy(), chosen).sums["calls"] == 0
    assert sample(policy(), chosen, number=2).sums["calls"] > 0


def test_what_the_engine_raises_comes_out_as_it_is() -> None:
    class Down(ScriptedEngine):
        async def generate(self, *_: Any, **__: Any) -> Generated:
            raise EndpointError("gone", kind="unreachable", retryable=True)

    made = sampler(policy(), engine=Down)
    with pytest.raises(EndpointError, match="gone"):
        asyncio.run(made.rollout(0, 0))


def test_an_engine_that_tells_no_logprobs_is_not_trained_with() -> None:
    """They would count as certainty: every ratio would be wrong."""

    class Silent(ScriptedEngine):
        async def generate(self, *arguments: Any, **named: Any) -> Generated:
            return replace(await super().generate(*arguments, **named), logprobs=None)

    with pytest.raises(EndpointError, match="log-probabilities"):
        asyncio.run(sampler(policy(), engine=Silent).rollout(0, 0))


def test_heldout_problems_get_the_same_draws_every_time() -> None:
    made = sampler(policy())
    one, two = (asyncio.run(made.heldout(cast(Any, FortyTwo()), 6, 2)) for _ in range(2))
    assert one["episodes"] == 12
    assert without_times(one) == without_times(two)


@pytest.mark.parametrize(
    ("outcomes", "expected"),
    [
        ((), (0, 0)),
        ((OK, OK), (2, 2)),
        ((BAD, OK), (1, 0)),
        ((BAD, BAD, OK, OK), (2, 1)),
        ((OK, Outcome.TIMEOUT, OK), (2, 1)),
    ],
)
def test_a_repair_is_no_first_try(outcomes: tuple[Outcome, ...], expected: tuple[int, int]) -> None:
    assert first_tries(outcomes) == expected
