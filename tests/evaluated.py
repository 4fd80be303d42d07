"""A policy in a few lines for tests of evaluations: multiplies, often with a call that fails.

What it says is a function of question, text so far and seed, as an engine of real weights promises.
The sandbox is scripted as well: it multiplies, or complains of a name.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from random import Random
from typing import Any

from rl.evaluation import runs, worker
from rl.evaluation.config import EvaluationConfig, read
from shared.endpoints import Sampling
from shared.policy import Codec, Engine, Finish, Generated, Tool
from shared.sandbox.result import Outcome, RunResult
from shared.store import Database
from shared.trajectory import Problem, content_hash
from shared.work.slices import SliceSettings
from tests.scripted import ScriptedSandbox, ran
from tests.scripted_policy import EOS, HEADER, ByteCodec

QUICK = SliceSettings(in_flight=4, lease_seconds=1.0, heartbeat_seconds=0.2)


def questions(n: int) -> list[Problem]:
    return [
        Problem(f"What is {i + 12} times 7?", str(7 * (i + 12)), "times", f"t{i}", None, str(i % 2))
        for i in range(n)
    ]


def config(
    problems: Sequence[Problem], samples: int = 1, name: str = "times", **more: Any
) -> EvaluationConfig:
    values: Mapping[str, Any] = {
        "benchmark": {
            "name": name, "title": name.title(), "source": "tests", "n": len(problems),
            "digest": content_hash([p.key for p in problems])[:16],
        },
        "policy": {"model": "scripted", "prompts": "compact"},
        "samples": samples,
        "budgets": {"tokens": 400, "context": 600},
        "correction": {"strategy": "suffix", "l_suf": 4, "n_corr": 2},
        **more,
    }  # fmt: skip
    return read(values, "the test")


class Solver:
    """`shared.policy.Engine`: three in ten of its calls fail, and it errs now and then."""

    version = 0

    def __init__(self, codec: ByteCodec) -> None:
        self.codec = codec

    async def generate(
        self, ids: Sequence[int], sampling: Sampling, *, seed: int, key: str
    ) -> Generated:
        at = list(ids).index(HEADER)
        question, said = self.codec.decode(ids[:at]), self.codec.decode(ids[at + 1 :])
        wanted = [*self.codec.encode(solve(question, said, seed)), EOS]
        made: list[int] = []
        finish: Finish = "length"
        while len(made) < sampling.max_tokens:
            made.append(wanted[len(made)])
            if made[-1] == EOS:
                finish = "eos"
                break
            if any(stop in self.codec.decode(made) for stop in sampling.stop):
                finish = "stop"
                break
        return Generated(tuple(made), None, finish, 0)

    async def release(self, key: str) -> None:
        pass


def solve(question: str, said: str, seed: int) -> str:
    """The rest of the turn."""
    draw = Random(f"{question}|{said}|{seed}").random()
    found = re.search(r"What is (\d+) times (\d+)", question)
    assert found is not None
    a, b = found.groups()
    if "```output\n" in said:
        seen = re.findall(r"```output\n(.*?)\n```", said, re.DOTALL)[-1]
        answer = seen if draw < 0.8 and seen.isdecimal() else str(int(draw * 1000))
        return f"It is \\boxed{{{answer}}}."
    if said.endswith("```"):
        return f"python\nprint({a} * {b}{'' if draw < 0.7 else ' * zero'})\n```"
    whole = "Multiply them."
    return (whole[len(said) :] if whole.startswith(said) else "") + "\n```"


def calculate(code: str, seed: int) -> RunResult:
    numbers = re.fullmatch(r"print\((\d+) \* (\d+)\)", code)
    if numbers is None:
        return ran(Outcome.MODEL_ERROR, stderr="NameError: name 'zero' is not defined")
    return ran(Outcome.OK, f"{int(numbers[1]) * int(numbers[2])}\n")


@asynccontextmanager
async def open_solver(config: EvaluationConfig) -> AsyncIterator[tuple[Engine, Codec]]:
    codec = ByteCodec()
    yield Solver(codec), codec


@asynccontextmanager
async def open_calculator(config: EvaluationConfig) -> AsyncIterator[Tool]:
    yield ScriptedSandbox(calculate)


def work(db: Database, run_id: int, tool: worker.OpenTool = open_calculator) -> None:
    runs.work(db, run_id, open_handler=worker.opener(open_solver, tool), settings=QUICK)


def work_at(url: str, run_id: int) -> None:
    """`work`, in a process of its own."""
    work(Database(url), run_id)
