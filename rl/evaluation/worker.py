"""Attempts: one slice of an evaluation opens engine, sandbox and grader once, and turns every item
into a trajectory with verdicts, or into a failure with a class.

An attempt depends on the weights, the problem and the sample's seed alone: an evaluation that was
killed and resumed has the figures of one that was not, where the engine keeps its own promise.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any

from rl.evaluation import config as configs
from rl.evaluation.config import EvaluationConfig
from rl.evaluation.engines import open_policy
from rl.evaluation.verdicts import Judge, Verifier, rejected_by
from shared import seeds
from shared.endpoints import Endpoint, Sampling, Usage
from shared.episode import Episode, run_episode
from shared.errors import EndpointError, SandboxError
from shared.grading import Grader
from shared.policy import Codec, Engine, Generated, Tool
from shared.sandbox.backend import Backend, backend
from shared.segments import Segment
from shared.store.trajectories import Completed, RoleUsage
from shared.trajectory import End
from shared.version import code_version
from shared.work.items import Failed, LeasedItem
from shared.work.slices import Handler, OpenHandler, RunInfo, SliceSettings

KIND = "evaluate"  # of the run, hence of its queue and its task

OpenPolicy = Callable[[EvaluationConfig], AbstractAsyncContextManager[tuple[Engine, Codec]]]
OpenTool = Callable[[EvaluationConfig], AbstractAsyncContextManager[Tool]]


def settings(run: RunInfo) -> SliceSettings:
    """As a worker works on it, slice by slice."""
    return SliceSettings(in_flight=_config(run).in_flight)


def open_tool(config: EvaluationConfig) -> Backend:
    return backend(config.tool.sandbox_url, config.tool.minimum_tier)


def opener(policy: OpenPolicy = open_policy, tool: OpenTool = open_tool) -> OpenHandler:
    """What opens everything that the items of one slice share."""

    @asynccontextmanager
    async def evaluator(run: RunInfo) -> AsyncIterator[Handler]:
        config = _config(run)
        async with AsyncExitStack() as stack:
            engine, codec = await stack.enter_async_context(policy(config))
            sandbox = await stack.enter_async_context(tool(config))
            grader = await stack.enter_async_context(
                Grader(zygotes=1, minimum_tier=config.tool.minimum_tier)
            )
            judge = None
            if config.judge is not None:
                asked = await stack.enter_async_context(Endpoint(config.judge.endpoint))
                judge = Judge(asked, config.judge)
            verifier = Verifier(config, sandbox, grader, judge)
            yield _Evaluator(config, engine, codec, sandbox, verifier, code_version())

    return evaluator


def _config(run: RunInfo) -> EvaluationConfig:
    return configs.read(run.config, f"run {run.name}")


@dataclass(frozen=True)
class _Evaluator:
    config: EvaluationConfig
    engine: Engine
    codec: Codec
    sandbox: Tool
    verifier: Verifier
    code_version: str

    async def __call__(self, item: LeasedItem) -> Completed | Failed:
        config, started = self.config, time.monotonic()
        seed = seeds.derive(config.seed, item.problem.key, item.sample_index)
        engine, judged = _Counted(self.engine), Usage()
        try:
            episode = await run_episode(
                engine, self.codec, self.sandbox, item.problem.text, config.episode(),
                seed=seed, key=f"{item.id}.{item.attempt}",
            )  # fmt: skip
            if episode.end is End.INFRASTRUCTURE:
                raise SandboxError("The sandbox failed while a call was run.")
            trajectory = episode.trajectory(
                item.problem, config.policy.thinking, described(episode, self.codec, config)
            )
            verdicts = await self.verifier(item.problem, trajectory, judged)
        except EndpointError as error:
            usage = self._usage(engine, judged)
            return Failed(error.kind, str(error), error.retryable, error.raw, usage)
        except SandboxError as error:
            usage = self._usage(engine, judged)
            return Failed("infrastructure", str(error), True, None, usage)
        return Completed(
            trajectory=trajectory,
            verdicts=verdicts,
            rejected_by=rejected_by(verdicts),
            duration=time.monotonic() - started,
            reasoner_model=config.policy.label,
            extractor_model=None,
            code_version=self.code_version,
            usage=self._usage(engine, judged),
        )

    def _usage(self, engine: _Counted, judged: Usage) -> tuple[RoleUsage, ...]:
        policy, judge = self.config.policy, self.config.judge
        where = policy.endpoint.base_url if policy.endpoint else "local"
        spent = [
            RoleUsage(
                role="policy",
                model=policy.label,
                endpoint=where,
                requests=engine.requests,
                prompt_tokens=engine.prompt_tokens,
                completion_tokens=engine.sampled_tokens,
                retries=0,
                duration=engine.seconds,
            )
        ]
        if judge is not None and judged.requests:
            spent.append(
                RoleUsage(
                    role="judge",
                    model=judge.endpoint.model,
                    endpoint=judge.endpoint.base_url,
                    requests=judged.requests,
                    prompt_tokens=judged.prompt_tokens,
                    completion_tokens=judged.completion_tokens,
                    retries=judged.retries,
                    duration=judged.seconds,
                )
            )
        return tuple(spent)


def described(episode: Episode, codec: Codec, config: EvaluationConfig) -> dict[str, Any]:
    """What a trajectory's meta says of an attempt beside `Episode.trajectory`'s own facts.

    segments: kind, number of tokens and text of each, prompt first. discarded: what
    self-correction took back, with the end of the thought that was dropped.
    """

    def told(segments: Sequence[Segment]) -> list[dict[str, Any]]:
        return [{"kind": s.kind, "n": len(s.ids), "text": codec.decode(s.ids)} for s in segments]

    return {
        "benchmark": config.benchmark.name,
        "model": config.policy.label,
        "fingerprint": config.fingerprint,
        "strategy": config.correction.strategy,
        "segments": told(episode.segments),
        "discarded": [
            {
                "step": one.step,
                "outcome": one.call.result.outcome,
                "observation": one.call.observation,
                "segments": told(one.segments),
            }
            for one in episode.discarded
        ],
    }


class _Counted:
    """An engine whose calls of one attempt are counted."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.requests = self.prompt_tokens = self.sampled_tokens = 0
        self.seconds = 0.0

    @property
    def version(self) -> int:
        return self._engine.version

    async def generate(
        self, ids: Sequence[int], sampling: Sampling, *, seed: int, key: str
    ) -> Generated:
        self.requests += 1
        self.prompt_tokens += len(ids)
        started = time.monotonic()
        try:
            made = await self._engine.generate(ids, sampling, seed=seed, key=key)
        finally:
            self.seconds += time.monotonic() - started
        self.sampled_tokens += len(made.ids)
        return made

    async def release(self, key: str) -> None:
        await self._engine.release(key)
