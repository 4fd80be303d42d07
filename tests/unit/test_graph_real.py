"""One trajectory through everything that is real but the models: HTTP, sandbox, grading, rules."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace

from shared.endpoints import Endpoint, UsageMeter
from shared.grading import Grader
from shared.sandbox import Sandbox
from shared.sandbox.result import Outcome
from shared.trajectory import Check, End, Problem, Trajectory, Verdict
from tests.fake_endpoint import FakeEndpoint
from tests.scripted import Server, http, speech
from tirgen.agents.code_extractor import CodeExtractor
from tirgen.agents.reasoner import Reasoner
from tirgen.agents.verifier import Verifier
from tirgen.config import load
from tirgen.graph import Agents, Graph

PROBLEM = Problem("ZQUESTIONZ: what are 12 factorial and 1/0?", "958003200/2")
CODES = {
    "S0": "import math\nprint(math.factorial(12))",
    "S1": "import random\nprint([random.random() for _ in range(3)])",
    "S2": "for i in range(1):\n    print(1 / 0)",
}
STEPS = ["S0 the factorial CALC is 7", "S1 any CALC numbers", "S2 and a CALC division"]
FINAL = "S3 hence \\boxed{479001600}"


def chat(user: str, seed: int) -> str:
    step = user.partition("\n")[2]
    if "CALC" not in step:
        return json.dumps({"solvable": False})
    name = step.split()[0]
    return json.dumps({"solvable": True, "logic": name, "code": CODES[name]})


def generate(
    *steps: str, answer: str = PROBLEM.answer, tampered: bool = False
) -> tuple[Trajectory, dict[Check, Verdict], UsageMeter, list[str]]:
    """(trajectory, its verdicts, usage, every request's body)"""

    async def run(base_url: str) -> tuple[Trajectory, dict[Check, Verdict], UsageMeter]:
        config = load("nano", base_url=base_url, model="fake")
        config = config.model_copy(update={"correction": type(config.correction)()})
        problem, meter = replace(PROBLEM, answer=answer), UsageMeter()
        async with (
            Endpoint(config.reasoner.endpoint) as endpoint,
            Sandbox(minimum_tier=config.tool.minimum_tier) as sandbox,
            Grader(minimum_tier=config.tool.minimum_tier) as grader,
        ):
            verifier = Verifier(config, sandbox, grader)
            agents = Agents(
                config=config,
                reasoner=Reasoner(endpoint, config.reasoner, config.prompts),
                extractor=CodeExtractor(endpoint, config.extractor, config.prompts),
                sandbox=sandbox,
                verifier=verifier,
            )
            trajectory, verdicts = await Graph(agents).run(problem, 7, meter)
            if tampered:
                trajectory = replace(trajectory, seed=8)
                verdicts = await verifier.verify(problem, trajectory, meter["verifier"])
        return trajectory, {v.check: v for v in verdicts}, meter

    with FakeEndpoint(http(Server(speech(*steps), chat))) as fake:
        return (*asyncio.run(run(fake.base_url)), [json.dumps(r.json) for r in fake.requests])


def test_a_trajectory_that_really_ran_is_vetted_by_every_rule() -> None:
    """Random numbers too: the sandbox is seeded by the step, so the verifier gets them again."""
    trajectory, verdicts, meter, requests = generate(STEPS[0], STEPS[1], FINAL)
    assert trajectory.end is End.ANSWERED
    assert trajectory.calls[0].observation == "479001600"
    assert {c: v.passed for c, v in verdicts.items()} == dict.fromkeys(verdicts, True)
    assert len(verdicts) == 6
    assert "is 7" not in trajectory.text, "the reasoner's own result is gone"
    assert (meter["reasoner"].requests, meter["extractor"].requests) == (3, 3)
    critic = [r for r in requests if "Turn the step" in r]
    assert len(critic) == 3
    assert not [r for r in critic if "ZQUESTIONZ" in r]
    assert not [r for r in requests if PROBLEM.answer in r], "nobody sees the reference"
    assert [r for r in requests if "ZQUESTIONZ" in r], "control: the reasoner saw the question"


def test_controls_another_seed_a_wrong_answer_a_failed_call() -> None:
    def refused(verdicts: dict[Check, Verdict]) -> set[Check]:
        return {c for c, v in verdicts.items() if v.passed is not True}

    assert refused(generate(STEPS[1], FINAL, tampered=True)[1]) == {Check.REPRODUCED}
    assert refused(generate(STEPS[0], FINAL, answer="479001601")[1]) == {Check.ANSWER}
    trajectory, verdicts, _, _ = generate(STEPS[2], FINAL)
    assert refused(verdicts) == {Check.CALLS_OK}
    assert trajectory.calls[0].result.outcome is Outcome.MODEL_ERROR
    assert trajectory.calls[0].observation == "ZeroDivisionError: division by zero"
