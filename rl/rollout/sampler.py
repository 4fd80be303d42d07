"""One rollout: prompts -> groups of episodes -> advantages -> failed steps tried again -> rows.

    episode level   G episodes per prompt; reward 1[answer correct]; groups that teach nothing are
                    dropped and others sampled in their place, up to a cap
    step level      failed steps of these episodes, each with G regenerations of one action from its
                    prefix; reward 1[the action executes]

Every episode is a task of its own in one event loop: none waits for another's tool or turn. What
comes out is in order of prompt and sample, never of arrival, and every draw has a seed from (job
seed, prompt number, sample), so a rollout depends on the weights and nothing else.

Ranks share the prompts. A group is sampled, judged and credited on one rank; how many groups are
still missing, and which failed steps are tried again, all of them decide alike.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

from rl.config import TrainConfig
from rl.credit import Credit, credit, episode, refill, step
from rl.data import Prompt, Prompts
from rl.loss import Level
from rl.packing import TrainRow, train_row
from rl.steps import FailedStep, choose, failed_steps, prefix
from rl.world import World
from shared import seeds
from shared.endpoints.config import Sampling
from shared.episode import Episode, EpisodeSettings, StepAttempt, run_episode, run_step
from shared.errors import EndpointError
from shared.grading import Grader, Value
from shared.policy import Codec, Engine, Tool
from shared.segments import SAMPLED, Segment
from shared.trajectory import End, Outcome

T = TypeVar("T")
Sums = defaultdict[str, float]


@dataclass(frozen=True, slots=True)
class RlRow:
    """A training row: of which level and group, with the advantage of its group's member."""

    level: Level
    group: str
    advantage: float
    row: TrainRow


@dataclass(frozen=True, slots=True)
class Solved:
    """An episode with its verdict: reward 1 right, 0 wrong, None undecided."""

    prompt: Prompt
    sample: int
    episode: Episode
    reward: float | None


@dataclass(frozen=True, slots=True)
class Rollout:
    """What this rank sampled: its rows, in order, and sums for the metrics.

    `cursor`: the number of the prompt after the last one that any rank took. `version`: of the
    weights that sampled it. `shown`: a few episodes to look at. `seconds` that it took.
    """

    rows: tuple[RlRow, ...]
    sums: Sums
    cursor: int
    version: int
    seconds: float = field(default=0.0, compare=False)
    shown: tuple[Solved, ...] = field(default=(), repr=False)


class Sampler:
    """Makes rollouts with one engine, sandbox and grader. `world` is for its thread alone."""

    def __init__(
        self,
        config: TrainConfig,
        prompts: Prompts,
        engine: Engine,
        codec: Codec,
        sandbox: Tool,
        grader: Grader,
        world: World,
    ) -> None:
        self.config, self.prompts, self.world = config, prompts, world
        self.engine, self.codec, self.sandbox, self.grader = engine, codec, sandbox, grader

    async def rollout(self, number: int, cursor: int) -> Rollout:
        """Rollout `number` of the job, from prompt number `cursor` on. Every rank calls it."""
        schedule, settings = self.config.schedule, self.settings(number)
        permits = asyncio.Semaphore(self.config.rollout.in_flight)
        version, start, began = self.engine.version, cursor, time.perf_counter()
        sums, rows, solved = Sums(float), list[RlRow](), list[Solved]()
        kept = 0
        while True:
            sampled = cursor - start
            wanted = refill(schedule.prompts, kept, sampled, schedule.refill_cap)
            if not wanted:
                break
            mine = self.prompts.take(cursor, wanted)[self.world.rank :: self.world.size]
            groups = await self._solve(mine, settings, permits)
            cursor += wanted
            trained = 0
            for group in groups:
                found = self._credit(group)
                _tally_credit(sums, Level.EPISODE, found)
                trained += found.trains
                rows += _rows(group, found)
                solved += group
            kept += int(self.world.total({"kept": trained})["kept"])
            if "episode" not in self.config.levels:
                break  # no group is missed where none is trained on
        if "episode" not in self.config.levels:
            rows.clear()
        for one in solved:
            _tally_episode(sums, one)
        if "step" in self.config.levels:
            rows += await self._steps(number, solved, cursor - start, settings, permits, sums)
        sums["prompts"] = cursor - start if self.world.is_first else 0
        seconds = time.perf_counter() - began
        return Rollout(tuple(rows), sums, cursor, version, seconds, tuple(solved[:8]))

    def settings(self, number: int) -> EpisodeSettings:
        """Of the episodes of rollout `number`: the curriculum decides the number of calls."""
        rollout = self.config.rollout
        return EpisodeSettings(
            calls=self.config.schedule.calls(number, rollout.calls),
            tokens=rollout.tokens,
            context=rollout.context,
            sampling=Sampling(
                temperature=rollout.temperature, top_p=rollout.top_p, top_k=rollout.top_k
            ),
            thinking=self.config.model.thinking,
            tool_timeout=rollout.tool.timeout,
            observation=rollout.tool.observation,
            abort_at_failure=rollout.abort_at_failure,
        )

    # ---- the episode level ----------------------------------------------------------------------

    async def _solve(
        self, prompts: Sequence[Prompt], settings: EpisodeSettings, permits: asyncio.Semaphore
    ) -> list[list[Solved]]:
        """A group for each prompt, in their order."""
        group = self.config.schedule.group
        wanted = [(prompt, sample) for prompt in prompts for sample in range(group)]
        solved = await _all(permits, [partial(self.solve, p, s, settings) for p, s in wanted])
        return [solved[i : i + group] for i in range(0, len(solved), group)]

    async def heldout(self, prompts: Prompts, limit: int, samples: int) -> Sums:
        """Sums over this rank's share of the first `limit` problems, with the same draws each time.

        By the settings of a rollout of the last stage.
        """
        settings = self.settings(self.config.schedule.rollouts)
        permits = asyncio.Semaphore(self.config.rollout.in_flight)
        mine = prompts.take(0, min(limit, len(prompts)))[self.world.rank :: self.world.size]
        solved = await _all(
            permits,
            [
                partial(self.solve, prompt, sample, settings, "heldout")
                for prompt in mine
                for sample in range(samples)
            ],
        )
        sums = Sums(float)
        for one in solved:
            _tally_episode(sums, one)
        return sums

    async def solve(
        self, prompt: Prompt, sample: int, settings: EpisodeSettings, purpose: str = "episode"
    ) -> Solved:
        """One episode, judged. An answer counts only where the policy ended with it."""
        name = f"{purpose}/{prompt.number}/{sample}"
        done = await run_episode(
            self.engine,
            self.codec,
            self.sandbox,
            prompt.problem.text,
            settings,
            seed=seeds.derive(self.config.seed, name),
            key=name,
        )
        reward: float | None = 0.0
        if done.end is End.ANSWERED and done.answer is not None:
            verdict = await self.grader.agrade(done.answer, prompt.problem.answer)
            reward = {Value.EQUAL: 1.0, Value.DIFFERENT: 0.0}.get(verdict.value)
        return Solved(prompt, sample, done, reward)

    def _credit(self, group: Sequence[Solved]) -> Credit:
        members = [
            episode(
                one.reward,
                one.episode.outcomes,
                overlong=one.episode.end is End.LENGTH_BUDGET,
                void_turn=one.episode.void_turns > 0,
            )
            for one in group
        ]
        return credit(members, self.config.credit)

    # ---- the step level -------------------------------------------------------------------------

    async def _steps(
        self,
        number: int,
        solved: Sequence[Solved],
        n_prompts: int,
        settings: EpisodeSettings,
        permits: asyncio.Semaphore,
        sums: Sums,
    ) -> list[RlRow]:
        """Rows of the failed steps that were tried again on this rank."""
        config = self.config
        by_name = {f"{one.prompt.number}/{one.sample}": one for one in solved}
        failed = [
            each
            for name, one in by_name.items()
            for each in failed_steps(
                one.prompt.problem.key, name, one.episode.outcomes, config.step
            )
        ]
        every = self.world.concatenated(failed)
        seed = seeds.derive(config.seed, "steps", number)
        chosen = choose(every, math.floor(config.step.share * n_prompts), seed)
        mine = [each for each in chosen if each.rollout in by_name]
        sums["steps/failed"] += len(failed)
        sums["steps/groups"] += len(mine)
        size = config.schedule.step_group
        tries = await _all(
            permits,
            [
                partial(self._again, each, by_name[each.rollout].episode, sample, settings)
                for each in mine
                for sample in range(size)
            ],
        )
        rows: list[RlRow] = []
        for at, each in enumerate(mine):
            group = tries[at * size : (at + 1) * size]
            found = credit([step(one.outcome, config.credit) for one in group], config.credit)
            _tally_credit(sums, Level.STEP, found)
            pref = prefix(by_name[each.rollout].episode.segments, each.action, config.step.l_suf)
            for attempt, advantage in zip(group, found.advantages_G, strict=True):
                sums["steps/tries"] += 1
                sums["steps/right"] += attempt.outcome is Outcome.OK
                sums["tokens/generated"] += attempt.n_generated
                if advantage is not None:
                    row = _row([pref.segment, *attempt.segments])
                    name = f"{each.rollout}#{each.action}"
                    rows.append(RlRow(Level.STEP, name, advantage, row))
        return rows

    async def _again(
        self, failed: FailedStep, of: Episode, sample: int, settings: EpisodeSettings
    ) -> StepAttempt:
        pref = prefix(of.segments, failed.action, self.config.step.l_suf)
        name = f"{failed.rollout}#{failed.action}/{sample}"
        return await run_step(
            self.engine,
            self.codec,
            self.sandbox,
            pref.segment,
            settings,
            seed=seeds.derive(self.config.seed, "step", name),
            key=name,
            begun=pref.begun,
        )


async def _all(permits: asyncio.Semaphore, calls: Sequence[Callable[[], Awaitable[T]]]) -> list[T]:
    """All of them at once, as far as there are permits; results in order.

    Where one raises, the others are cancelled and its exception comes out.
    """

    async def one(call: Callable[[], Awaitable[T]]) -> T:
        async with permits:
            return await call()

    try:
        async with asyncio.TaskGroup() as tasks:
            made = [tasks.create_task(one(call)) for call in calls]
    except ExceptionGroup as group:
        raise group.exceptions[0] from group
    return [task.result() for task in made]


def _row(segments: Sequence[Segment]) -> TrainRow:
    """Raises EndpointError where the engine did not say how likely what it sampled was."""
    if any(s.kind in SAMPLED and s.ids and s.logprobs is None for s in segments):
        raise EndpointError(
            "The engine gives no log-probabilities of what it samples.",
            kind="bad_reply",
            retryable=False,
            remedy="sample at temperature 1, from vLLM, nano's server or the local engine",
        )
    return train_row(segments)


def _rows(group: Sequence[Solved], found: Credit) -> list[RlRow]:
    return [
        RlRow(
            Level.EPISODE,
            str(one.prompt.number),
            advantage,
            _row(one.episode.segments),
        )
        for one, advantage in zip(group, found.advantages_G, strict=True)
        if advantage is not None
    ]


def _tally_credit(sums: Sums, level: Level, found: Credit) -> None:
    sums[f"groups/{level}"] += 1
    sums[f"groups/{level}/trained"] += found.trains
    for reason, n in found.against.items():
        sums[f"against/{level}/{reason}"] += n
    for reason, n in found.dropped.items():
        sums[f"drop/{level}/{reason}"] += n


def _tally_episode(sums: Sums, one: Solved) -> None:
    done = one.episode
    sums["episodes"] += 1
    sums["episodes/right"] += one.reward == 1.0
    sums["episodes/undecided"] += one.reward is None
    sums["episodes/with_call"] += bool(done.calls)
    sums[f"end/{done.end}"] += 1
    sums["tokens/response"] += done.n_tokens
    sums["tokens/generated"] += done.n_generated
    sums["calls"] += len(done.calls)
    for outcome in done.outcomes:
        sums[f"calls/{outcome}"] += 1
    first, right = first_tries(done.outcomes)
    sums["calls/first"] += first
    sums["calls/first/right"] += right
    sums["seconds/generate"] += done.seconds_generate
    sums["seconds/tool"] += done.seconds_tool


def first_tries(outcomes: Sequence[Outcome]) -> tuple[int, int]:
    """(calls that do not follow a failed one, those of them that succeeded).

    A call after a failed one is its repair: counted, it would hide how often the policy fails.
    """
    firsts = [o for i, o in enumerate(outcomes) if i == 0 or outcomes[i - 1] is Outcome.OK]
    return len(firsts), sum(o is Outcome.OK for o in firsts)
