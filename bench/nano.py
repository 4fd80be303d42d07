"""What nano can do on held-out problems: alone, with the tool, and as a tool-using policy.

    python bench/nano.py [--problems 300] [--model FOLDER]

Prints JSON lines. Shares come with 95 % Wilson intervals; sampling is seeded, so a rerun on one
machine gives the same counts. `alone`: the reasoner without tool, temperature 0.6. `policy`: the
`policy` prompt, temperature 1 as in RL rollouts, every first try of a call executed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
from itertools import islice
from pathlib import Path

from shared.endpoints import Endpoint, EndpointConfig, Sampling
from shared.fences import Kind, observation, parse
from shared.grading import Grader, Value
from shared.grading.extract import last_boxed
from shared.nano.launch import start_server, stop_server
from shared.problems import load_problems
from shared.prompts import render
from shared.sandbox import Outcome, Sandbox
from shared.sandbox.observation import observe
from shared.trajectory import Problem
from tirgen.seeds import derive
from tirgen.stack import WEIGHTS
from tirgen.stats import wilson

CALLS, TOKENS = 4, 160


def report(metric: str, hits: int, n: int) -> None:
    low, high = wilson(hits, n)
    print(json.dumps({
        "bench": "nano", "metric": metric, "value": round(hits / n, 4), "unit": "share",
        "peer": None, "ratio": None, "n": n, "low": round(low, 4), "high": round(high, 4),
    }))  # fmt: skip


async def alone(endpoint: Endpoint, problem: Problem, thinking: bool) -> str:
    """One answer without tool."""
    prompt = render("compact", "reasoner", problem=problem.text)
    ids = await endpoint.tokenize_chat(
        [{"role": "user", "content": prompt}], enable_thinking=thinking
    )
    sampling = Sampling(temperature=0.6, top_k=50, max_tokens=2 * TOKENS)
    reply = await endpoint.complete(ids, sampling, seed=derive(problem.key, "alone"))
    return reply.text


async def with_tool(
    endpoint: Endpoint, sandbox: Sandbox, problem: Problem
) -> tuple[str, list[bool]]:
    """The policy's trajectory, and for every call but repeats after an error: did it succeed?"""
    prompt = render("compact", "policy", problem=problem.text)
    ids = await endpoint.tokenize_chat([{"role": "user", "content": prompt}], enable_thinking=False)
    sampling = Sampling(temperature=1.0, max_tokens=TOKENS, stop=("```",), include_stop=True)
    text, tries, failed_before = "", list[bool](), False
    for turn in range(4 * CALLS):
        context = ids + await endpoint.tokenize(text)
        reply = await endpoint.complete(context, sampling, seed=derive(problem.key, turn))
        text += reply.text
        if not reply.text.endswith("```"):
            break
        block = parse(text)[-1]
        if block.kind is Kind.PYTHON and block.closed:
            result = await sandbox.arun(block.body, seed=derive(problem.key, "tool"), timeout=5)
            ok = result.outcome is Outcome.OK
            if not failed_before:
                tries.append(ok)
            failed_before = not ok
            text += observation(observe(result))
    return text, tries


async def main(n: int, model: Path) -> None:
    problems = list(islice(load_problems("nano"), n))
    with tempfile.TemporaryDirectory() as folder:
        server = start_server(model, log=Path(folder) / "log")
        try:
            config = EndpointConfig(base_url=server.url, model="nano")
            async with Endpoint(config) as endpoint, Sandbox() as sandbox, Grader() as grader:

                async def right(problem: Problem, text: str) -> bool:
                    answer = last_boxed(text)
                    if answer is None:
                        return False
                    return (await grader.agrade(answer, problem.answer)).value is Value.EQUAL

                for name, thinking in (("alone", False), ("alone, thinking", True)):
                    texts = await asyncio.gather(*(alone(endpoint, p, thinking) for p in problems))
                    grades = await asyncio.gather(*map(right, problems, texts))
                    report(f"solved {name}", sum(grades), n)
                done = await asyncio.gather(*(with_tool(endpoint, sandbox, p) for p in problems))
                grades = await asyncio.gather(
                    *(right(p, t) for p, (t, _) in zip(problems, done, strict=True))
                )
                report("solved by the tool-using policy", sum(grades), n)
                tries = [ok for _, each in done for ok in each]
                report("policy's calls that succeed at first try", sum(tries), len(tries))
        finally:
            stop_server(server.pid)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--problems", type=int, default=300)
    parser.add_argument("--model", type=Path, default=WEIGHTS, help="the packaged one, or another")
    given = parser.parse_args()
    asyncio.run(main(given.problems, given.model))
