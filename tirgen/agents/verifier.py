"""The verifier: vets a finished trajectory. Rules decide; a model's judgement is only recorded.

Every check gives one verdict, whatever the others say. `VERSION` changes whenever a check could
decide differently, so that stored verdicts say which rules they come from.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Collection, Iterator
from dataclasses import dataclass, replace

from shared.endpoints import Endpoint, Usage
from shared.errors import SandboxError
from shared.fences import Block, Kind, parse, prose
from shared.grading import Grader, Value
from shared.grading.grader import VERSION as GRADER_VERSION
from shared.prompts import Profile, render
from shared.sandbox.backend import Backend
from shared.sandbox.observation import observe
from shared.trajectory import Check, End, Outcome, Problem, Trajectory, Verdict
from tirgen import code_quality, seeds
from tirgen.agents.reasoner import BEGIN_THINK, END_THINK
from tirgen.config import JudgeConfig, RunConfig, VerifierConfig

VERSION = "1"
RULES = tuple(check for check in Check if check is not Check.JUDGE)  # these decide


def version_of(check: Check) -> str:
    """The version that a verdict of `check` has if it is made now."""
    return f"{VERSION}/{GRADER_VERSION}" if check is Check.ANSWER else VERSION


@dataclass(frozen=True, slots=True)
class Judge:
    """A model's opinion on the final answer."""

    endpoint: Endpoint
    config: JudgeConfig
    prompts: Profile

    async def __call__(self, problem: Problem, answer: str, seed: int, meter: Usage) -> str:
        content = render(self.prompts, "judge", reference=problem.answer, answer=answer)
        reply = await self.endpoint.chat(
            [{"role": "user", "content": content}],
            self.config.sampling(self.config.max_tokens),
            seed=seed,
            meter=meter,
        )
        return reply.text.strip()


@dataclass(frozen=True)
class Verifier:
    config: RunConfig
    sandbox: Backend
    grader: Grader
    judge: Judge | None = None

    async def verify(
        self,
        problem: Problem,
        trajectory: Trajectory,
        meter: Usage,
        checks: Collection[Check] = tuple(Check),
    ) -> tuple[Verdict, ...]:
        """One verdict for each of `checks`, the judge's only where there is a judge.

        Raises SandboxError where a check could not be made at all.
        """
        ways: dict[Check, Callable[[], Awaitable[Verdict]]] = {
            Check.EXECUTED: lambda: _now(executed(trajectory)),
            Check.FORMAT: lambda: _now(format_ok(trajectory)),
            Check.CALLS_OK: lambda: _now(calls_ok(trajectory)),
            Check.REPRODUCED: lambda: self._reproduced(trajectory),
            Check.ANSWER: lambda: self._answer(problem, trajectory),
            Check.CODE_QUALITY: lambda: _now(quality(trajectory, self.config.verifier)),
        }
        if self.judge is not None:
            ways[Check.JUDGE] = lambda: self._judged(problem, trajectory, meter)
        verdicts = []
        for check, way in ways.items():
            if check in checks:
                started = time.monotonic()
                verdict = await way()
                verdicts.append(replace(verdict, duration=time.monotonic() - started))
        return tuple(verdicts)

    def rejected_by(self, verdicts: tuple[Verdict, ...]) -> Check | None:
        """The first required check that did not pass; undecided is not passed. None: vetted."""
        passed = {v.check for v in verdicts if v.passed}
        return next((c for c in self.config.verifier.required if c not in passed), None)

    async def _reproduced(self, trajectory: Trajectory) -> Verdict:
        """Run every block again: the stored observation must come out, character for character."""
        tool = self.config.tool
        for position, step in enumerate(trajectory.steps):
            if step.call is None:
                continue
            seed = seeds.tool(trajectory.seed, position)
            result = await self.sandbox.arun(step.call.code, seed=seed, timeout=tool.timeout)
            if result.outcome is Outcome.INFRASTRUCTURE_ERROR:
                raise SandboxError("The sandbox failed while a trajectory was verified.")
            again = observe(result, tool.observation)
            if (result.outcome, again) != (step.call.result.outcome, step.call.observation):
                return _verdict(
                    Check.REPRODUCED, False, "another output", step=position, output=again
                )
        return _verdict(Check.REPRODUCED, True, "every block gave its observation again")

    async def _answer(self, problem: Problem, trajectory: Trajectory) -> Verdict:
        if trajectory.answer is None:
            verdict = _verdict(Check.ANSWER, False, "no boxed answer")
            return replace(verdict, version=version_of(Check.ANSWER))
        grade = await self.grader.agrade(trajectory.answer, problem.answer)
        passed = {Value.EQUAL: True, Value.DIFFERENT: False}.get(grade.value)
        verdict = _verdict(Check.ANSWER, passed, grade.reason or grade.stage, stage=grade.stage)
        return replace(verdict, version=f"{VERSION}/{grade.version}")

    async def _judged(self, problem: Problem, trajectory: Trajectory, meter: Usage) -> Verdict:
        assert self.judge is not None
        if trajectory.answer is None:
            return _verdict(Check.JUDGE, False, "no boxed answer")
        seed = seeds.derive(trajectory.seed, "judge")
        word = await self.judge(problem, trajectory.answer, seed, meter)
        passed = {"yes": True, "no": False}.get(word.strip(".").lower())
        return _verdict(Check.JUDGE, passed, word[:200], model=self.judge.config.endpoint.model)


def executed(trajectory: Trajectory) -> Verdict:
    n = sum(c.result.outcome is not Outcome.INFRASTRUCTURE_ERROR for c in trajectory.calls)
    return _verdict(Check.EXECUTED, n > 0, f"{n} executed tool calls", calls=n)


def calls_ok(trajectory: Trajectory) -> Verdict:
    """The pass rate of the calls that stand is 1 (the release keeps only such, method.md 1.4)."""
    n, failed = trajectory.n_calls, trajectory.n_failed_calls
    reason = f"{failed} of {n} calls failed" if failed else f"{n} calls succeeded"
    return _verdict(Check.CALLS_OK, failed == 0, reason, calls=n, failed=failed)


def format_ok(trajectory: Trajectory) -> Verdict:
    """The text holds exactly the executed blocks with their observations, and one boxed end."""
    problems = list(_format_problems(trajectory))
    return _verdict(Check.FORMAT, not problems, "; ".join(problems) or "well formed")


def _format_problems(trajectory: Trajectory) -> Iterator[str]:
    if trajectory.end is not End.ANSWERED:
        yield f"ended by {trajectory.end.value}"
    if not (trajectory.answer or "").strip():
        yield "no boxed answer"
    blocks = parse(trajectory.text)
    found = [(b.kind, b.body) for b in blocks if b.kind in (Kind.PYTHON, Kind.OUTPUT)]
    executed_blocks = [
        pair
        for c in trajectory.calls
        for pair in ((Kind.PYTHON, c.code), (Kind.OUTPUT, c.observation))
    ]
    if found != executed_blocks:
        yield "code or output blocks that are not the executed ones"
    if any(not b.closed for b in blocks):
        yield "an unclosed block"
    if trajectory.thinking:
        said = prose(trajectory.text)
        counts = (said.count(BEGIN_THINK), said.count(END_THINK))
        if counts != (1, 1) or not said.lstrip().startswith(BEGIN_THINK):
            yield "not exactly one <think>...</think>"
        elif _code_after_thinking(blocks):
            yield "code after </think>"


def _code_after_thinking(blocks: list[Block]) -> bool:
    said = ""
    for block in blocks:
        if block.kind in (Kind.TEXT, Kind.OTHER):
            said += block.raw
        elif END_THINK in said:
            return True
    return False


def quality(trajectory: Trajectory, config: VerifierConfig) -> Verdict:
    codes = [call.code for call in trajectory.calls]
    passed, trivial = code_quality.passes(codes, config.max_trivial, config.trivial)
    return _verdict(
        Check.CODE_QUALITY, passed, f"{trivial} of {len(codes)} blocks trivial", trivial=trivial
    )


def _verdict(check: Check, passed: bool | None, reason: str, **evidence: object) -> Verdict:
    return Verdict(check, passed, VERSION, reason, evidence)


async def _now(verdict: Verdict) -> Verdict:
    return verdict
