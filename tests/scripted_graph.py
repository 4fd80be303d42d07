"""The real graph between scripted models and a scripted sandbox."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from shared.endpoints import UsageMeter
from shared.fences import action, observation
from shared.sandbox.result import Outcome, RunResult
from shared.trajectory import Problem, Trajectory, Verdict
from tests.scripted import (
    Continue,
    InMemory,
    ScriptedSandbox,
    Server,
    calculator,
    prints_its_code,
    ran,
)  # fmt: skip
from tirgen.agents.code_extractor import CodeExtractor
from tirgen.agents.reasoner import Reasoner
from tirgen.config import RunConfig, parse
from tirgen.graph import Agents, Graph

PROBLEM = Problem("How many pens?", "7")
BOXED = "\\boxed{7}"


class NoVerdicts:
    async def verify(self, *args: object) -> tuple[Verdict, ...]:
        return ()


@dataclass
class Case:
    """A graph on scripted models, with what they were asked."""

    server: Server
    sandbox: ScriptedSandbox
    graph: Graph

    def run(self, problem: Problem = PROBLEM, seed: int = 1) -> Trajectory:
        return asyncio.run(self.arun(problem, seed))

    async def arun(self, problem: Problem = PROBLEM, seed: int = 1) -> Trajectory:
        trajectory, _ = await self.graph.run(problem, seed, UsageMeter())
        return trajectory


def settings_of(**sections: Any) -> RunConfig:
    role = {"endpoint": {"base_url": "http://memory/v1", "model": "scripted"}}
    given = {name: value for name, value in sections.items() if name != "reasoner"}
    reasoner = {**role, "l_step": 200, **sections.get("reasoner", {})}
    values = {"prompts": "compact", "reasoner": reasoner, "extractor": role, **given}
    return parse(values, "test")


def case(
    says: Continue,
    outcome: Callable[[str, int], RunResult] = prints_its_code,
    wait: Callable[[], Any] = lambda: asyncio.sleep(0),
    chat: Any = calculator,
    **sections: Any,
) -> Case:
    config = settings_of(**sections)
    server, sandbox = Server(says, chat), ScriptedSandbox(outcome)
    endpoint = InMemory(server, wait)
    agents = Agents(
        config=config,
        reasoner=Reasoner(endpoint, config.reasoner, config.prompts),
        extractor=CodeExtractor(endpoint, config.extractor, config.prompts),
        sandbox=sandbox,  # type: ignore[arg-type]
        verifier=NoVerdicts(),  # type: ignore[arg-type]
    )
    return Case(server, sandbox, Graph(agents))


def piece(step: Any) -> str:
    if step.call is None:
        return str(step.thought)
    return str(step.thought + action(step.call.code) + observation(step.call.observation))


def judged(made: Case) -> list[str]:
    """The steps that the extractor was shown."""
    return [content.partition("\n")[2] for content in made.server.chats()]


def fails(*codes: str, times: int = 10**9) -> Callable[[str, int], RunResult]:
    left = dict.fromkeys(codes, times)

    def outcome(code: str, seed: int) -> RunResult:
        name = code[5:7]
        if left.get(name, 0) > 0:
            left[name] -= 1
            return ran(Outcome.MODEL_ERROR, stderr=f"NameError: {name}")
        return prints_its_code(code, seed)

    return outcome


def rambler(*steps: str) -> Continue:
    """As `speech`, but continues a step that backtracking has cut: words never run out."""

    def reasoner(user: str, response: str, seed: int) -> str:
        at = max((i for i in range(len(steps)) if f"S{i}" in response), default=-1)
        open_step = at >= 0 and not response.endswith(("```\n", "\n\n"))
        return (f"CALC again {seed}\n\n" if open_step else "") + "\n\n".join(steps[at + 1 :])

    return reasoner


SUFFIX = {"strategy": "suffix", "l_suf": 5, "n_corr": 2, "n_corr_total": 3}
