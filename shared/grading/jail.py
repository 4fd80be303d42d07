"""The jail of grading: a sandbox whose interpreters have loaded what reads and compares answers.

The interpreters see no file of this project, so its modules travel as text with the warm-up, in the
order of their imports. Model text travels as a JSON literal in the program, and is never code.
"""

from __future__ import annotations

import base64
import hashlib
import json
import zlib
from dataclasses import dataclass
from pathlib import Path

from shared.grading.verdict import Decision, Stage, Value
from shared.sandbox import Limits, Sandbox, Tier

BUDGET = 10.0  # seconds of wall time for one pair
_CPU_SHARE = 0.3  # of the budget: CPU time ends a run unless the machine is very busy
_MODULES = ("caps", "words", "tree", "verdict", "tokens", "units", "matrices", "cursor", "commands",
            "atoms", "parse", "forms", "values", "symbolic", "scalars", "families", "reals",
            "settle", "labels", "naming", "items", "relations", "equal", "opinion",
            "inside")  # fmt: skip
_PRELOAD = ("sympy", "mpmath", "math_verify", "latex2sympy2_extended")
_LOADER = """
import base64, json, sys, types, zlib
for name, text in json.loads(zlib.decompress(base64.b64decode(MODULES))):
    module = sys.modules[name] = types.ModuleType(name)
    if name == "shared.grading":
        module.__path__ = []
    else:
        setattr(sys.modules["shared.grading"], name.rpartition(".")[2], module)
        exec(compile(text, name, "exec"), module.__dict__)
from shared.grading.inside import decide
for pair in WARM_PAIRS:
    decide(*pair)
"""
_WARM_PAIRS = (
    (r"\frac{\sqrt{3}}{2}", r"\sqrt{\frac{3}{4}}"),
    (r"x^2+2x+1", r"(x+1)^2"),
    (r"\frac{x^2-1}{x-1}", "x+1"),
    (r"\sin^2 x", r"1-\cos^2 x"),
    (r"2\pi r", r"2\pi R"),
    (r"e^{x}\ln 3", r"\ln(3) e^x + 1"),
    (r"(1,2]\cup(3,\infty)", r"1<x\le 2 \text{ or } x>3"),
    (r"\{1,2\}", r"\{2,1\}"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}1\\3\end{pmatrix}"),
    (r"y=2x+1", "2x-y+1=0"),
    (r"5\text{ cm}", r"50\text{ mm}"),
    (r"\int_0^1 x\,dx", r"\frac12"),
    (r"\angle ABC = 3", r"\angle ABC = 4"),
)


@dataclass(frozen=True, slots=True)
class HardWall(Limits):
    """Grading has a budget of wall time, not only of CPU time."""

    budget: float = BUDGET

    def wall(self, timeout: float) -> float:
        return self.budget


def cpu(budget: float) -> float:
    """CPU seconds of a run with that budget."""
    return budget * _CPU_SHARE


def sandbox(zygotes: int, minimum_tier: Tier, budget: float) -> Sandbox:
    here = Path(__file__).parent
    modules = [("shared.grading", "")]
    for name in _MODULES:
        text = (here / f"{name}.py").read_text(encoding="utf-8")
        modules.append((f"shared.grading.{name}", text))
    # One packet is at most 64 KiB.
    packed = base64.b64encode(zlib.compress(json.dumps(modules).encode(), 9))
    warmup = f"MODULES = {packed!r}\nWARM_PAIRS = {_WARM_PAIRS!r}\n{_LOADER}"
    return Sandbox(
        zygotes=zygotes,
        minimum_tier=minimum_tier,
        preload=_PRELOAD,
        warmup=warmup,
        limits=HardWall(budget=budget),
    )


def fingerprint() -> str:
    """Of everything that decides: a rule cannot change without it."""
    here = Path(__file__).parent
    digest = hashlib.sha256()
    for name in (*_MODULES, "exact", "extract"):
        digest.update((here / f"{name}.py").read_bytes())
    return digest.hexdigest()[:8]


def program(pairs: list[tuple[str, str]]) -> str:
    """What decides these pairs, one line of output each."""
    data = json.dumps(json.dumps(pairs))
    return f"import json\nfrom shared.grading.inside import main\nmain(json.loads({data}))\n"


def decisions(output: str, at_most: int) -> list[Decision]:
    """What a run wrote, up to its first line that is not complete."""
    found = []
    for line in output.splitlines()[:at_most]:
        try:
            value, stage, reason = json.loads(line)
            found.append(Decision(Value(value), Stage(stage), str(reason)))
        except (ValueError, TypeError):
            break
    return found
