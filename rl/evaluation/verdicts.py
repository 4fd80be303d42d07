"""Verdicts on an attempt: the same checks, by the same names, as those of generated trajectories.

`answer` decides: by the rules of `shared.grading`, or by the tests of a code task. The judge's
opinion stands beside it. Undecided is not passed.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

from rl.evaluation import code
from rl.evaluation.config import EvaluationConfig, JudgeConfig
from shared import seeds
from shared.endpoints import Endpoint, Sampling, Usage
from shared.grading import Grader, Value
from shared.grading.grader import VERSION as GRADER_VERSION
from shared.policy import Tool
from shared.prompts import render
from shared.trajectory import Check, Problem, Trajectory, Verdict

VERSION = "eval-1"


@dataclass(frozen=True, slots=True)
class Judge:
    """A model that is asked whether two answers mean the same."""

    endpoint: Endpoint
    config: JudgeConfig

    async def __call__(self, problem: Problem, trajectory: Trajectory, meter: Usage) -> Verdict:
        """Passed, not passed, or None where its word is neither yes nor no."""
        model = self.config.endpoint.model
        if trajectory.answer is None:
            return Verdict(Check.JUDGE, False, VERSION, "no boxed answer", {"model": model})
        content = render(
            self.config.prompts, "judge", reference=problem.answer, answer=trajectory.answer
        )
        reply = await self.endpoint.chat(
            [{"role": "user", "content": content}],
            Sampling(temperature=0, max_tokens=self.config.max_tokens),
            seed=seeds.derive(trajectory.seed, "judge"),
            meter=meter,
        )
        word = reply.text.strip()
        passed = {"yes": True, "no": False}.get(word.rstrip(".").lower())
        return Verdict(Check.JUDGE, passed, VERSION, word[:200], {"model": model})


@dataclass(frozen=True, slots=True)
class Verifier:
    config: EvaluationConfig
    sandbox: Tool
    grader: Grader
    judge: Judge | None = None

    async def __call__(
        self, problem: Problem, trajectory: Trajectory, meter: Usage
    ) -> tuple[Verdict, ...]:
        """Raises SandboxError where an answer could not be judged at all, EndpointError of the
        judge."""
        found = [_executed(trajectory), _calls_ok(trajectory)]
        started = time.monotonic()
        answer = await self._answer(problem, trajectory)
        found.append(replace(answer, duration=time.monotonic() - started))
        if self.judge is not None and self.config.benchmark.kind == "math":
            started = time.monotonic()
            said = await self.judge(problem, trajectory, meter)
            found.append(replace(said, duration=time.monotonic() - started))
        return tuple(found)

    async def _answer(self, problem: Problem, trajectory: Trajectory) -> Verdict:
        if self.config.benchmark.kind == "code":
            return await code.judge(
                self.sandbox,
                trajectory.text,
                problem.answer,
                seed=trajectory.seed,
                timeout=self.config.tool.tests_timeout,
            )
        version = f"{VERSION}/{GRADER_VERSION}"
        if trajectory.answer is None:
            return Verdict(Check.ANSWER, False, version, "no boxed answer")
        grade = await self.grader.agrade(trajectory.answer, problem.answer)
        passed = {Value.EQUAL: True, Value.DIFFERENT: False}.get(grade.value)
        reason = grade.reason or grade.stage
        return Verdict(Check.ANSWER, passed, version, reason, {"stage": grade.stage})


def rejected_by(verdicts: tuple[Verdict, ...]) -> Check | None:
    """An attempt is "vetted" where its answer is right."""
    return None if any(v.check is Check.ANSWER and v.passed for v in verdicts) else Check.ANSWER


def _executed(trajectory: Trajectory) -> Verdict:
    n = trajectory.n_calls
    return Verdict(Check.EXECUTED, n > 0, VERSION, f"{n} executed tool calls", {"calls": n})


def _calls_ok(trajectory: Trajectory) -> Verdict:
    n, failed = trajectory.n_calls, trajectory.n_failed_calls
    reason = f"{failed} of {n} calls failed" if failed else f"{n} calls succeeded"
    evidence = {"calls": n, "failed": failed}
    return Verdict(Check.CALLS_OK, failed == 0, VERSION, reason, evidence)
