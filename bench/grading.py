"""Grading at work: verdicts per second, hostile answers, and every reference answer of a data set.

The peer is math-verify called in process, on the same pairs, in the same run.
Usage: python bench/grading.py [--data DIR] [--pairs N]. DIR holds *.jsonl with an "answer" in each
row (searched in all its folders); without it the pairs come from a few templates. One JSON object a
line; every exception of the mass check is printed with its reason.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import random
import re
import statistics
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from shared.grading import Grade, Grader, Value

Pair = tuple[str, str]
AT_ONCE = 64
PEER_WALL = 15.0  # seconds after which the peer is killed on one hostile answer

TEMPLATES = (
    "{a}", "{a},{b:03d}", "\\frac{{{a}}}{{{b}}}", "{a}\\sqrt{{{b}}}", "x = {a}", "({a}, {b})",
    "[{a}, \\infty)", "x^2 + {a}x - {b}", "{a}\\pi", "{a}\\text{{ cm}}", "\\{{{a}, {b}\\}}",
    "\\frac{{\\sqrt{{{a}}}}}{{{b}}} + 1", "{a}^\\circ", "y = {a}x + {b}", "{a}.{b}", "\\${a}",
)  # fmt: skip
HOSTILE = (
    "(" * 5000 + "1" + ")" * 5000, "(" * 60 + "1" + ")" * 60, "{" * 1900 + "}" * 1900,
    r"\frac{1}{" * 300 + "2" + "}" * 300, r"\sqrt{" * 100 + "2" + "}" * 100, "[" * 1000,
    "9^{9^{9^9}}", "5^(5^(5^(5^5)))", "x^{x^{x^{x^x}}}", "9**9**9**9", "10^{10^{10}}!",
    "7^{100000000}", "2^{99999}", "(x+1)^{100000}", "(x+y+z)^{400}", "1.000001^{99999}",
    "10000000!", "100000000!/99999999!", "((3!)!)!", "5000!", "x!" * 50, "3" + "!" * 500,
    r"\binom{1000000}{500000}", r"\binom{5000}{2500}", r"\sum_{k=1}^{10^9} k",
    r"\sum_{k=1}^{2000} \sum_{j=1}^{2000} \frac{1}{j+k}", r"\prod_{k=1}^{100000} k",
    "1" * 20_000, "0." + "3" * 3000, "1e999999999", "-" * 3900 + "1", "1" + "+1" * 1900,
    "1" + "-x" * 1900, r"\pm 1 " * 60, "{" + ",".join(map(str, range(900))) + "}",
    "(" + ",".join(["1"] * 900) + ")", "a" * 3900, "x_{" * 500 + "1" + "}" * 500,
    r"\int_0^1 e^{x^{x^x}} dx", r"\int " * 300, r"\int_{0}^{\infty} \frac{\sin x}{x} dx",
    r"\lim_{x \to 0} \frac{\sin x}{x}", r"\lfloor 9^{9^{8}} \rfloor", r"\log_2(2^{10^9})",
    r"\sin(10^{10^{5}})", r"\tan(\tan(\tan(\tan(x))))", r"e^{e^{e^{e^{10}}}}", r"\ln(\ln(\ln(2)))",
    r"\sqrt[99999]{2}", r"\sqrt{" + "9" * 300 + "}", r"\gcd(" + "9" * 300 + ",7)",
    r"\begin{pmatrix}" + r"1 & 2 \\ " * 500 + r"\end{pmatrix}", r"\begin{pmatrix}" * 200,
    r"\text{" * 800, "$" * 3999, "\\" * 3999, r"\left" * 700, r"\boxed{" * 5000, "|" * 2000,
    "1," * 1900, "1:" * 1900, "x<" * 1900, r"x\cup" * 700, "a/" * 1900 + "b", "x^" * 1900 + "2",
    r"\frac" * 700, "_" * 3000, "'" * 3000, "%" * 3000, "^" * 3000, "\x00\x01\x02", "\ud800",
    "٣٤٥", "𝟙𝟚", "__import__('os').system('touch /tmp/grading-was-here')",
    "().__class__.__bases__[0].__subclasses__()", "exec(\"import os; os._exit(0)\")",
    "lambda: 1", "open('/etc/passwd').read()", "os.system('id')", "import os", "{{7*7}}",
    "f'{__import__(\"os\")}'", "x'); print('[\"equal\", \"string\", \"\"]'); ('",
    "Symbol('x').__init__.__globals__", r"\input{/etc/passwd}", r"\write18{id}",
    "a" + "+a^{2}" * 600, "(a+b)(c+d)" * 180, r"\cos(\sin(" * 60 + "x" + "))" * 60,
    "(((x+1)^{40}+1)^{40}+1)^{40}", r"\frac{1}{x+" * 60 + "1" + "}" * 60,
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path)
    parser.add_argument("--pairs", type=int, default=3000)
    options = parser.parse_args()
    answers = list(references(options.data)) if options.data and options.data.is_dir() else []
    if not answers:
        print("No data: the mass check is skipped, and the pairs come from templates.")
    with Grader() as grader:
        grader.grade("x+1", "1+x")
        if answers:
            asyncio.run(mass_check(grader, answers))
    pairs = mix(answers or list(templated()), options.pairs)
    speed(pairs)
    hostile()


def references(folder: Path) -> Iterator[str]:
    for path in sorted(folder.rglob("*.jsonl")):
        with path.open(encoding="utf-8") as lines:
            for line in lines:
                yield json.loads(line)["answer"]


def templated() -> Iterator[str]:
    draw = random.Random(1)
    for _ in range(400):
        for template in TEMPLATES:
            yield template.format(a=draw.randrange(2, 300), b=draw.randrange(2, 99))


# ---- the same answer in other clothes, and answers that are nearly the same ----------------------


def reformatted(answer: str) -> str:
    r"""Other spacing, \dfrac for \frac, in $ signs, with a full stop."""
    text = answer.replace(r"\dfrac", r"\frac").replace(r"\frac", r"\dfrac")
    text = re.sub(r"(?<![\\A-Za-z])([-+=])", r" \1 ", text).strip()
    return f"{text}." if "$" in text else f"${text}$."


def mutants(answer: str) -> Iterator[tuple[str, str]]:
    """(kind, answer that is nearly the same and not equal)."""
    draw = random.Random(answer)
    bare = answer.strip().strip("$") if answer.count("$") == 2 else answer
    words = re.search(r"\\text|\\mbox|[A-Za-z]{3}", re.sub(r"\\[a-z]+", "", bare))
    digits = [m for m in re.finditer(r"\d+", bare) if not re.search(r"_\{?$", bare[: m.start()])]
    if digits and r"\approx" not in bare:
        at = draw.choice(digits)
        plus = str(int(at[0]) + 1).zfill(len(at[0]))
        yield "one more", bare[: at.start()] + plus + bare[at.end() :]
        place = draw.randrange(len(at[0]))
        other = str((int(at[0][place]) + draw.randrange(1, 10)) % 10)
        changed = at[0][:place] + other + at[0][place + 1 :]
        yield "digit", bare[: at.start()] + changed + bare[at.end() :]
    inner = re.search(r"(?<=[\w})] )[-+](?= [\w\\(])", bare)
    if inner and r"\infty" not in bare:
        sign = "-" if inner[0] == "+" else "+"
        yield "inner sign", bare[: inner.start()] + sign + bare[inner.end() :]
    if not words and not re.search(r"[,=<>:\[\]{}]|\\(?:le|ge|in|cup|pm)|^[0.]+$", bare):
        yield "sign", bare[1:] if bare.startswith("-") else f"-({bare})"
        yield "factor", f"2({bare})"
    names = re.findall(r"(?<![A-Za-z\\_.])([a-df-hj-z])(?![A-Za-z(.])", bare)
    if names and not words:
        name = draw.choice(names)
        new = "q" if name != "q" else "p"
        constant = re.search(rf"\({name}\)\s*=", bare) and name not in bare.partition("=")[2]
        if not constant:  # f(x) = 1 is f(q) = 1
            yield "variable", re.sub(rf"(?<![A-Za-z\\]){name}(?![A-Za-z])", new, bare, count=1)
    pair = re.fullmatch(r"(?:\\left)?\s*([\[(])([^,]*),([^,]*?)(?:\\right)?\s*([\])])", bare)
    if pair:
        opening, closing = ("[" if pair[1] == "(" else "("), (")" if pair[4] == "]" else "]")
        if r"\infty" not in bare:
            yield "ends", f"{opening}{pair[2]},{pair[3]}{closing}"
        if pair[2].strip() != pair[3].strip():
            yield "order", f"{pair[1]}{pair[3]},{pair[2]}{pair[4]}"


def mix(answers: list[str], count: int) -> list[Pair]:
    """Reformatted copies and mutants of a sample, half and half, no pair twice."""
    draw = random.Random(0)
    pairs: dict[Pair, None] = {}
    for answer in draw.sample(answers, len(answers)):
        pairs[reformatted(answer), answer] = None
        if near := list(mutants(answer)):
            pairs[draw.choice(near)[1], answer] = None
        if len(pairs) >= count:
            break
    return list(pairs)[:count]


async def mass_check(grader: Grader, answers: list[str]) -> None:
    """Every reference equals itself reformatted, and none of its mutants."""
    distinct = list(dict.fromkeys(answers))
    labelled = [("itself", reformatted(answer), answer) for answer in distinct]
    labelled += [(kind, near, a) for a in distinct for kind, near in mutants(a) if near != a]
    grades = await together(grader, [(mine, gold) for _, mine, gold in labelled])
    counts: Counter[str] = Counter()
    for (kind, mine, gold), found in zip(labelled, grades, strict=True):
        wrong = (kind == "itself") != (found.value is Value.EQUAL)
        group = "itself" if kind == "itself" else "mutants"
        counts[f"{group} {found.value}"] += 1
        if wrong and (kind == "itself" or found.value is Value.EQUAL):
            line = {"exception": kind, "answer": mine, "reference": gold, "value": found.value,
                    "stage": found.stage, "reason": found.reason}  # fmt: skip
            print(json.dumps(line))
    emit("references", len(answers), "1")
    emit("distinct references", len(distinct), "1")
    for name in sorted(counts):
        emit(f"mass check: {name}", counts[name], "1")


async def together(grader: Grader, pairs: list[Pair], at_once: int = AT_ONCE) -> list[Grade]:
    gate = asyncio.Semaphore(at_once)

    async def one(pair: Pair) -> Grade:
        async with gate:
            return await grader.agrade(*pair)

    return await asyncio.gather(*(one(pair) for pair in pairs))


# ---- speed --------------------------------------------------------------------------------------


def speed(pairs: list[Pair]) -> None:
    peer = peer_times(pairs)
    for at_once in (1, AT_ONCE):
        with Grader() as grader:  # a new one: nothing is remembered
            asyncio.run(together(grader, [(f"x+{n}", f"{n}+x") for n in range(AT_ONCE)]))
            started = time.perf_counter()
            grades = asyncio.run(together(grader, pairs, at_once))
            rate = len(pairs) / (time.perf_counter() - started)
        times = sorted(1e3 * grade.duration for grade in grades)
        name = f"at concurrency {at_once}"
        emit(f"verdicts per second {name}", rate, "1/s", len(peer) / sum(peer), higher=True)
        emit(f"p50 {name}", statistics.median(times), "ms", 1e3 * statistics.median(peer))
        emit(f"p99 {name}", times[int(len(times) * 0.99)], "ms",
             1e3 * sorted(peer)[int(len(peer) * 0.99)])  # fmt: skip
    stages = Counter(str(grade.stage) for grade in grades)
    for stage, count in stages.most_common():
        emit(f"share decided by {stage}", count / len(grades), "share")


def peer_times(pairs: list[Pair]) -> list[float]:
    from math_verify import parse, verify

    times = []
    for answer, reference in pairs[: len(pairs) // 3]:
        started = time.perf_counter()
        verify(parse(f"${reference}$"), parse(f"${answer}$"))
        times.append(time.perf_counter() - started)
    return times


# ---- hostile answers ----------------------------------------------------------------------------


def hostile() -> None:
    with Grader() as grader:
        grader.grade("x+1", "1+x")
        found = [(grader.grade(answer, r"x+\sqrt{2}"), answer) for answer in HOSTILE]
        budget = grader.budget
    slowest, answer = max(found, key=lambda pair: pair[0].duration)
    emit("hostile answers", len(found), "1")
    emit("hostile: called equal", sum(f.value is Value.EQUAL for f, _ in found), "1")
    emit("hostile: undecided", sum(f.value is Value.UNDECIDED for f, _ in found), "1")
    emit("hostile: code executed", int(Path("/tmp/grading-was-here").exists()), "1")
    peer = [peer_hostile(text) for text in HOSTILE]
    emit("hostile: slowest", slowest.duration, "s", max(peer))
    emit("hostile: slowest, share of the budget", slowest.duration / budget, "1")
    emit("hostile: all", sum(f.duration for f, _ in found), "s", sum(peer))
    emit("hostile: killed", sum("not decided within" in f.reason for f, _ in found), "1",
         sum(seconds >= PEER_WALL for seconds in peer))  # fmt: skip
    print(json.dumps({"slowest": answer[:60], "stage": slowest.stage, "reason": slowest.reason}))


def peer_hostile(answer: str) -> float:
    """Seconds of math-verify, in a process that is killed after PEER_WALL."""
    worker = multiprocessing.get_context("fork").Process(target=ask_peer, args=(answer,))
    started = time.perf_counter()
    worker.start()
    worker.join(PEER_WALL)
    if worker.is_alive():
        worker.kill()
        worker.join()
    return time.perf_counter() - started


def ask_peer(answer: str) -> None:
    from math_verify import parse, verify

    verify(parse(r"$x+\sqrt{2}$"), parse(f"${answer}$"))


def emit(
    metric: str, value: float, unit: str, peer: float | None = None, *, higher: bool = False
) -> None:
    ratio = None if not peer or not value else value / peer if higher else peer / value
    line = {"bench": "grading", "metric": metric, "value": round(value, 4), "unit": unit,
            "peer": None if peer is None else round(peer, 4),
            "ratio": None if ratio is None else round(ratio, 2)}  # fmt: skip
    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
