"""Demonstrations of every role, from which nano learns.

A demonstration is a prompt (one user message) and a reply cut into segments; only segments with
`learn` set carry loss, so that nano never learns to write observations, or code in the reasoner's
place. The teacher errs on purpose: `CALL_FAILURES` of its tool calls fail, so that step-level RL
and self-correction have something to do.
"""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random

from shared.nano.world import Calc, Solved, stream
from shared.prompts import Name, render

CALL_FAILURES = 0.18  # share of a tool-using policy's calls that fail at first try
EXTRACTOR_FAILURES = 0.05  # share of the extractor's programs that fail

RESULTS = ("This gives {}.", "The result is {}.", "That makes {}.", "So we get {}.")


@dataclass(frozen=True, slots=True)
class Segment:
    text: str
    learn: bool = True


@dataclass(frozen=True, slots=True)
class Demo:
    """One exchange: `role` names the prompt, `prompt` is the user message, `reply` follows it."""

    role: Name
    prompt: str
    reply: tuple[Segment, ...]
    thinking: bool = False

    @property
    def text(self) -> str:
        return "".join(segment.text for segment in self.reply)


def block(code: str, output: str) -> tuple[str, str]:
    """The action and the observation as they stand in a trajectory."""
    return f"\n```python\n{code}\n```", f"\n```output\n{output}\n```\n"


def sabotage(rng: Random, code: str) -> tuple[str, str]:
    """A version of `code` that fails, and the observation it earns."""
    lines = code.split("\n")
    ways: list[str] = [code[:-1]]  # an unclosed parenthesis
    if lines[0].startswith(("import", "from")):
        ways.append("\n".join(lines[1:]))
    if any(line.endswith(":") for line in lines):
        ways.append(code.replace(":\n", "\n", 1))
    if "print(count)" in code:
        ways.append(code.replace("print(count)", "print(total)"))
    if lines[-1].startswith("print(") and len(lines) > 1:
        ways.append("\n".join([*lines[:-1], lines[-1][6:-1]]))  # computes, but prints nothing
    broken = rng.choice(ways)
    return broken, observe(broken)


def observe(code: str) -> str:
    """What the tool would show for the world's own (trusted) code."""
    out = io.StringIO()
    try:
        with contextlib.redirect_stdout(out):
            exec(code, {})  # noqa: S102  our own templates, never a model's output
    except Exception as error:  # noqa: BLE001  any failure is the demonstration's observation
        return f"{type(error).__name__}: {error.args[0] if error.args else ''}"
    return out.getvalue().strip() or "(no output; use print)"


def _result(rng: Random, calc: Calc) -> str:
    return f"{calc.thought} {rng.choice(RESULTS).format(calc.value)}"


def _final(item: Solved) -> str:
    return f"The answer is \\boxed{{{item.answer}}}."


def _wrap(thinking: bool, body: list[Segment], final: str) -> tuple[Segment, ...]:
    if thinking:
        return (Segment("<think>\n"), *body, Segment(f"</think>\n\n{final}"))
    return (*body, Segment(final))


def reasoner(rng: Random, item: Solved) -> Demo:
    """Mental arithmetic, after the first `done` steps were replaced by code and its output.

    What stands replaced is context without loss: the reasoner itself always writes a result.
    """
    thinking = rng.random() < 0.3
    mental = item.size == "small" and rng.random() < 0.8  # what can be learned by heart
    done = 0 if mental else rng.randint(0, len(item.calcs))
    body = [Segment(f"{item.plan}\n\n")] if rng.random() < 0.4 else []
    for calc in item.calcs[:done]:
        body.append(Segment(calc.thought + "".join(block(calc.code, calc.value)), learn=False))
    body += [Segment(f"{_result(rng, calc)}\n\n") for calc in item.calcs[done:]]
    prompt = render("compact", "reasoner", problem=item.text)
    return Demo("reasoner", prompt, _wrap(thinking, body, _final(item)), thinking)


def policy(rng: Random, item: Solved) -> Demo:
    """A tool-using policy: code at every computation, which sometimes fails and is then mended."""
    thinking = rng.random() < 0.3
    body = [Segment(f"{item.plan}\n\n")] if rng.random() < 0.4 else []
    for calc in item.calcs:
        body.append(Segment(calc.thought))
        if rng.random() < CALL_FAILURES:
            broken, error = sabotage(rng, calc.code)
            action, observation = block(broken, error)
            body += [Segment(action), Segment(observation, learn=False)]
            body.append(Segment("The code failed, so we write it again."))
        action, observation = block(calc.code, calc.value)
        body += [Segment(action), Segment(observation, learn=False)]
    return Demo(
        "policy",
        render("compact", "policy", problem=item.text),
        _wrap(thinking, body, _final(item)),
        thinking,
    )


def _guess(rng: Random, value: str) -> str:
    """The number that a reasoner computing in its head may have written."""
    if rng.random() < 0.5 or not value.lstrip("-").isdigit():
        return value
    return str(int(value) + rng.choice([-1, 1]) * rng.choice([1, 2, 10, rng.randint(1, 400)]))


def _step(rng: Random, item: Solved) -> tuple[str, Calc | None]:
    """A step as the extractor meets it, and the computation in it if there is one."""
    if rng.random() < 0.3:
        return rng.choice([item.plan, _final(item)]), None
    calc = rng.choice(item.calcs)
    return f"{calc.thought} {rng.choice(RESULTS).format(_guess(rng, calc.value))}", calc


def _program(rng: Random, code: str) -> str:
    return sabotage(rng, code)[0] if rng.random() < EXTRACTOR_FAILURES else code


def extractor(rng: Random, item: Solved) -> Demo:
    """Judge, extract and convert as one JSON object."""
    step, calc = _step(rng, item)
    reply: dict[str, object] = {"solvable": False}
    if calc is not None:
        reply = {"solvable": True, "logic": calc.thought, "code": _program(rng, calc.code)}
    return Demo(
        "extractor", render("compact", "extractor", step=step), (Segment(json.dumps(reply)),)
    )


def extractor_judge(rng: Random, item: Solved) -> Demo:
    step, calc = _step(rng, item)
    prompt = render("compact", "extractor_judge", step=step)
    return Demo("extractor_judge", prompt, (Segment("yes" if calc else "no"),))


def extractor_logic(rng: Random, item: Solved) -> Demo:
    calc = rng.choice(item.calcs)
    step = f"{calc.thought} {rng.choice(RESULTS).format(_guess(rng, calc.value))}"
    prompt = render("compact", "extractor_logic", step=step)
    return Demo("extractor_logic", prompt, (Segment(calc.thought),))


def extractor_code(rng: Random, item: Solved) -> Demo:
    calc = rng.choice(item.calcs)
    prompt = render("compact", "extractor_code", step=calc.thought, logic=calc.thought)
    code = _program(rng, calc.code)
    return Demo("extractor_code", prompt, (Segment(f"```python\n{code}\n```"),))


def judge(rng: Random, item: Solved) -> Demo:
    answer = item.answer
    if rng.random() < 0.5:
        answer = _guess(rng, answer)
    prompt = render("compact", "judge", reference=item.answer, answer=answer)
    return Demo("judge", prompt, (Segment("yes" if answer == item.answer else "no"),))


MIX: tuple[tuple[Callable[[Random, Solved], Demo], float], ...] = (
    (reasoner, 0.65),
    (policy, 0.12),
    (extractor, 0.12),
    (extractor_code, 0.03),
    (extractor_logic, 0.03),
    (extractor_judge, 0.03),
    (judge, 0.02),
)


def demonstrations(seed: int) -> Iterator[Demo]:
    """An endless, seeded stream over the train split; roles are drawn by `MIX`."""
    rng = Random(seed)
    makers, weights = zip(*MIX, strict=True)
    for item in stream(seed, "train"):
        yield rng.choices(makers, weights)[0](rng, item)
