"""nano's problem world: templated multi-step problems whose arithmetic wants a tool.

Every family is a function of a seeded generator and a size ("small" numbers can be done in the
head, "large" ones cannot). It returns the text and a solution as plain data: the computations,
each with the sentence that says what to compute, Python code that does it, and the true value.
The train and held-out splits share no problem: the split is decided by a hash of the text.

    python -m shared.nano.world --count 600 --split heldout --seed 1 > problems.jsonl
"""

from __future__ import annotations

import hashlib
import math
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from random import Random
from typing import Literal

from shared.trajectory import Problem

SMALL = 0.7  # share of problems that can be done in the head

Size = Literal["small", "large"]
Split = Literal["train", "heldout"]

NAMES = "Ada Ben Cleo Dan Eva Finn Gina Hugo Ida Jon Kim Leo Mia Noa Omar Pia".split()
THINGS = "pens books cards shells stamps coins beads apples marbles stickers".split()


@dataclass(frozen=True, slots=True)
class Calc:
    """One computation: the sentence that asks for it, code that prints it, its true value."""

    thought: str
    code: str
    value: str


@dataclass(frozen=True, slots=True)
class Solved:
    """A problem of the world with its reference solution."""

    family: str
    size: Size
    text: str
    plan: str
    calcs: tuple[Calc, ...]

    @property
    def answer(self) -> str:
        return self.calcs[-1].value

    @property
    def split(self) -> Split:
        first = hashlib.sha256(self.text.encode()).digest()[0]
        return "heldout" if first < 26 else "train"  # about one in ten

    def problem(self) -> Problem:
        return Problem(
            text=self.text, answer=self.answer, source="nano", subject=self.family, level=self.size
        )


Family = Callable[[Random, bool], tuple[str, str, list[Calc]]]


def _lines(*lines: str) -> str:
    return "\n".join(lines)


def tickets(rng: Random, small: bool) -> tuple[str, str, list[Calc]]:
    who, top = rng.choice(NAMES), rng.randint(8, 20) if small else rng.randint(100, 999)
    a, b = rng.sample([2, 3, 5, 7] if small else range(2, 13), 2)
    won = sum(n % a == 0 or n % b == 0 for n in range(1, top + 1))
    text = (
        f"{who} numbers tickets from 1 to {top}. "
        f"A ticket wins if its number is divisible by {a} or by {b}."
    )
    code = rng.choice(
        [
            _lines(
                "count = 0",
                f"for n in range(1, {top} + 1):",
                f"    if n % {a} == 0 or n % {b} == 0:",
                "        count += 1",
                "print(count)",
            ),
            f"print(sum(1 for n in range(1, {top} + 1) if n % {a} == 0 or n % {b} == 0))",
        ]
    )
    calcs = [
        Calc(f"Count the numbers from 1 to {top} that are divisible by {a} or {b}.", code, str(won))
    ]
    if rng.random() < 0.5:
        return f"{text} How many tickets win?", "We count the winning tickets.", calcs
    pay = rng.randint(2, 5) if small else rng.randint(12, 99)
    calcs.append(
        Calc(
            f"Multiply the {won} winning tickets by {pay} dollars.",
            f"print({won} * {pay})",
            str(won * pay),
        )
    )
    return (
        f"{text} Each winning ticket pays {pay} dollars. How many dollars are paid in all?",
        "We count the winning tickets and then multiply by the prize.",
        calcs,
    )


def digit_sum(rng: Random, small: bool) -> tuple[str, str, list[Calc]]:
    top = rng.choice([20, 30, 40, 50]) if small else rng.randint(200, 999)
    target = rng.randint(3, 9) if small else rng.randint(5, 16)
    hits = sum(sum(map(int, str(n))) == target for n in range(1, top + 1))
    code = _lines(
        "count = 0",
        f"for n in range(1, {top} + 1):",
        f"    if sum(int(d) for d in str(n)) == {target}:",
        "        count += 1",
        "print(count)",
    )
    return (
        f"How many whole numbers from 1 to {top} have digits that add up to {target}?",
        "We check every number.",
        [Calc(f"Count the numbers from 1 to {top} with digit sum {target}.", code, str(hits))],
    )


def savings(rng: Random, small: bool) -> tuple[str, str, list[Calc]]:
    who, times = rng.choice(NAMES), rng.randint(2, 3)
    start = rng.randint(2, 9) if small else rng.randint(21, 99)
    spend = rng.randint(1, min(3, start - 1)) if small else rng.randint(5, 20)
    weeks = 2 if small else rng.randint(4, 8)
    money = start
    for _ in range(weeks):
        money = money * times - spend
    word = {2: "doubles", 3: "triples"}[times]
    code = _lines(
        f"money = {start}",
        f"for week in range({weeks}):",
        f"    money = money * {times} - {spend}",
        "print(money)",
    )
    return (
        f"{who} has {start} dollars. Every week the money {word} and then {who} spends {spend} "
        f"dollars. How many dollars does {who} have after {weeks} weeks?",
        "We follow the money week by week.",
        [
            Calc(
                f"Start with {start} and repeat {weeks} times: "
                f"multiply by {times}, then subtract {spend}.",
                code,
                str(money),
            )
        ],
    )


def tiles(rng: Random, small: bool) -> tuple[str, str, list[Calc]]:
    side = rng.randint(2, 6) if small else rng.randint(12, 48)
    m, n = rng.sample(range(2, 8) if small else range(7, 30), 2)
    a, b = side * m, side * n
    g = math.gcd(a, b)
    calcs = [
        Calc(
            f"Find the greatest common divisor of {a} and {b}.",
            _lines("import math", f"print(math.gcd({a}, {b}))"),
            str(g),
        )
    ]
    text = f"A floor of {a} cm by {b} cm is covered with equal square tiles, as large as possible."
    if rng.random() < 0.5:
        return (
            f"{text} How long is the side of a tile in cm?",
            "We need the greatest common divisor.",
            calcs,
        )
    calcs.append(
        Calc(
            f"Multiply {a} // {g} tiles along one side by {b} // {g} along the other.",
            f"print(({a} // {g}) * ({b} // {g}))",
            str((a // g) * (b // g)),
        )
    )
    return f"{text} How many tiles are needed?", "We find the tile and then count.", calcs


def bells(rng: Random, small: bool) -> tuple[str, str, list[Calc]]:
    a, b, c = rng.sample(range(2, 7) if small else range(12, 60), 3)
    code = _lines("import math", f"print(math.lcm({a}, {b}, {c}))")
    return (
        f"Three bells ring every {a}, {b} and {c} minutes. They ring together now. "
        "After how many minutes do they ring together again?",
        "We need the least common multiple.",
        [
            Calc(
                f"Find the least common multiple of {a}, {b} and {c}.",
                code,
                str(math.lcm(a, b, c)),
            )
        ],
    )


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, math.isqrt(n) + 1))


def primes(rng: Random, small: bool) -> tuple[str, str, list[Calc]]:
    low = rng.randint(2, 15) if small else rng.randint(50, 500)
    high = low + (rng.randint(5, 15) if small else rng.randint(60, 400))
    count = sum(map(_is_prime, range(low, high + 1)))
    code = _lines(
        "from sympy import primerange", f"print(len(list(primerange({low}, {high} + 1))))"
    )
    return (
        f"How many prime numbers are there from {low} to {high}?",
        "We list the primes.",
        [Calc(f"Count the primes from {low} to {high}.", code, str(count))],
    )


def divisors(rng: Random, small: bool) -> tuple[str, str, list[Calc]]:
    n = rng.randint(6, 30) if small else rng.randint(100, 5000)
    total = sum(d for d in range(1, n + 1) if n % d == 0)
    code = _lines("from sympy import divisors", f"print(sum(divisors({n})))")
    return (
        f"What is the sum of all positive divisors of {n}?",
        "We list the divisors.",
        [Calc(f"Add up all divisors of {n}.", code, str(total))],
    )


def _term(k: int, power: str) -> str:
    return f" {'-' if k < 0 else '+'} {abs(k)}{power}" if k else ""


def quadratic(rng: Random, small: bool) -> tuple[str, str, list[Calc]]:
    p, q = rng.sample(range(1, 8) if small else range(11, 80), 2)
    if not small and rng.random() < 0.4:
        q = -q
    b, c = -(p + q), p * q
    code = _lines(
        "from sympy import symbols, solve",
        "x = symbols('x')",
        f"print(max(solve(x**2{_term(b, '*x')}{_term(c, '')}, x)))",
    )
    equation = f"x^2{_term(b, 'x')}{_term(c, '')} = 0"
    return (
        f"What is the larger solution of {equation}?",
        "We solve the equation.",
        [Calc(f"Solve {equation} and take the larger solution.", code, str(max(p, q)))],
    )


def slope(rng: Random, small: bool) -> tuple[str, str, list[Calc]]:
    a, b = rng.randint(2, 9), rng.choice([-1, 1]) * rng.randint(2, 9)
    at = rng.randint(1, 2) if small else rng.randint(6, 30)
    code = _lines(
        "from sympy import symbols, diff",
        "x = symbols('x')",
        f"print(diff({a}*x**3{_term(b, '*x**2')}, x).subs(x, {at}))",
    )
    curve = f"{a}x^3{_term(b, 'x^2')}"
    return (
        f"What is the slope of the curve y = {curve} at x = {at}?",
        "We need the derivative.",
        [
            Calc(
                f"Differentiate {curve} and put x = {at}.",
                code,
                str(3 * a * at * at + 2 * b * at),
            )
        ],
    )


def concert(rng: Random, small: bool) -> tuple[str, str, list[Calc]]:
    child = rng.randint(2, 5) if small else rng.randint(4, 19)
    adult = child + rng.randint(1, 9)
    total = rng.randint(3, 6) if small else rng.randint(40, 300)
    adults = rng.randint(1, total - 1)
    money = adults * adult + (total - adults) * child
    code = _lines(
        f"for a in range({total} + 1):",
        f"    if {adult} * a + {child} * ({total} - a) == {money}:",
        "        print(a)",
    )
    return (
        f"A concert sold {total} tickets for {money} dollars. An adult ticket costs {adult} "
        f"dollars and a child ticket costs {child} dollars. How many adult tickets were sold?",
        "We try every number of adult tickets.",
        [
            Calc(
                f"Find how many of {total} tickets cost {adult} and not {child} "
                f"when all cost {money}.",
                code,
                str(adults),
            )
        ],
    )


def committee(rng: Random, small: bool) -> tuple[str, str, list[Calc]]:
    n = rng.randint(4, 7) if small else rng.randint(9, 30)
    k = rng.randint(2, 3) if small else rng.randint(3, 6)
    ways = math.comb(n, k)
    calcs = [
        Calc(
            f"Count the ways to choose {k} of {n} people.",
            _lines("import math", f"print(math.comb({n}, {k}))"),
            str(ways),
        )
    ]
    text = f"A club has {n} members and chooses {k} of them for a committee."
    if rng.random() < 0.6:
        return (
            f"{text} In how many ways can this be done?",
            "We count the possible committees.",
            calcs,
        )
    calcs.append(
        Calc(f"Multiply {ways} committees by {k} leaders.", f"print({ways} * {k})", str(ways * k))
    )
    return (
        f"{text} One member of the committee becomes its leader. "
        "In how many ways can this be done?",
        "We count the committees and then the leaders.",
        calcs,
    )


def tiers(rng: Random, small: bool) -> tuple[str, str, list[Calc]]:
    thing = rng.choice(THINGS)
    limit = rng.randint(2, 4) if small else rng.randint(10, 60)
    low = rng.randint(1, 4) if small else rng.randint(3, 19)
    high = low + rng.randint(1, 4 if small else 9)
    n = limit + (rng.randint(-1, 3) if small else rng.randint(-8, 90))
    cost = limit * high + (n - limit) * low if n > limit else n * high
    code = _lines(
        f"n = {n}",
        f"if n > {limit}:",
        f"    cost = {limit} * {high} + (n - {limit}) * {low}",
        "else:",
        f"    cost = n * {high}",
        "print(cost)",
    )
    return (
        f"The first {limit} {thing} cost {high} dollars each and every further one costs {low} "
        f"dollars. What do {n} {thing} cost?",
        "The price depends on the number.",
        [
            Calc(
                f"Price {n} {thing}: up to {limit} at {high} dollars, the rest at {low} dollars.",
                code,
                str(cost),
            )
        ],
    )


def change(rng: Random, small: bool) -> tuple[str, str, list[Calc]]:
    a, b = rng.sample([2, 3, 5, 7] if small else range(3, 15), 2)
    total = rng.randint(10, 25) if small else rng.randint(80, 400)
    ways = sum((total - a * i) % b == 0 for i in range(total // a + 1))
    code = _lines(
        "ways = 0",
        f"for i in range({total} // {a} + 1):",
        f"    if ({total} - {a} * i) % {b} == 0:",
        "        ways += 1",
        "print(ways)",
    )
    return (
        f"In how many ways can {total} cents be paid with coins of {a} cents and {b} cents?",
        "We try every number of the first coin.",
        [Calc(f"Count the ways to make {total} from {a} and {b}.", code, str(ways))],
    )


def cake(rng: Random, small: bool) -> tuple[str, str, list[Calc]]:
    who, other = rng.sample(NAMES, 2)
    p, q = rng.sample([3, 4, 6, 8] if small else range(7, 40), 2)
    a, b = rng.randint(1, max(1, p // 2 - 1)), rng.randint(1, max(1, q // 2 - 1))
    left = 1 - Fraction(a, p) - Fraction(b, q)
    code = _lines(
        "from fractions import Fraction",
        f"print(1 - Fraction({a}, {p}) - Fraction({b}, {q}))",
    )
    return (
        f"{who} eats {a}/{p} of a cake and {other} eats {b}/{q} of it. "
        "What fraction of the cake is left?",
        "We subtract both parts from the whole.",
        [Calc(f"Subtract {a}/{p} and {b}/{q} from 1.", code, str(left))],
    )


def median(rng: Random, small: bool) -> tuple[str, str, list[Calc]]:
    count = 3 if small else rng.choice([7, 9])
    values = [rng.randint(1, 9) if small else rng.randint(10, 99) for _ in range(count)]
    shown = ", ".join(map(str, values))
    code = _lines("import statistics", f"print(statistics.median([{shown}]))")
    return (
        f"{rng.choice(NAMES)} writes down the numbers {shown}. What is their median?",
        "We look for the middle number.",
        [Calc(f"Find the median of {shown}.", code, str(statistics.median(values)))],
    )


def sequence(rng: Random, small: bool) -> tuple[str, str, list[Calc]]:
    a, b = rng.randint(1, 9), rng.randint(1, 9)
    n = rng.randint(3, 5) if small else rng.randint(9, 25)
    x, y = a, b
    for _ in range(n - 2):
        x, y = y, x + y
    code = _lines(
        f"a, b = {a}, {b}", f"for i in range({n} - 2):", "    a, b = b, a + b", "print(b)"
    )
    return (
        f"A sequence starts with {a}, {b} and every further term is the sum of the two before it. "
        f"What is term number {n}?",
        "We build the sequence term by term.",
        [Calc(f"Start with {a}, {b} and add the last two until term {n}.", code, str(y))],
    )


def shopping(rng: Random, small: bool) -> tuple[str, str, list[Calc]]:
    who, thing = rng.choice(NAMES), rng.choice(THINGS)
    boxes = rng.randint(2, 6) if small else rng.randint(13, 89)
    each = rng.randint(2, 6) if small else rng.randint(13, 89)
    have = boxes * each
    gone = rng.randint(1, 3 if small else have - 1)
    return (
        f"{who} has {boxes} boxes with {each} {thing} each and gives away {gone} {thing}. "
        f"How many {thing} are left?",
        f"We count all {thing} and then subtract.",
        [
            Calc(
                f"Multiply {boxes} boxes by {each} {thing}.", f"print({boxes} * {each})", f"{have}"
            ),
            Calc(
                f"Subtract {gone} from {have} {thing}.",
                f"print({have} - {gone})",
                str(have - gone),
            ),
        ],
    )


def trip(rng: Random, small: bool) -> tuple[str, str, list[Calc]]:
    who = rng.choice(NAMES)
    first, second = (rng.randint(2, 15) if small else rng.randint(120, 980) for _ in range(2))
    back = rng.randint(1, 3) if small else rng.randint(12, 99)
    return (
        f"{who} drives {first} km, then {second} km, and then {back} km back. "
        f"How far is {who} from the start in km?",
        "We add the way out and subtract the way back.",
        [
            Calc(
                f"Add {first} and {second} and subtract {back}.",
                f"print({first} + {second} - {back})",
                str(first + second - back),
            )
        ],
    )


FAMILIES: dict[str, Family] = {
    f.__name__: f
    for f in (
        tickets, digit_sum, savings, tiles, bells, primes, divisors, quadratic, slope, concert,
        committee, tiers, change, cake, median, sequence, shopping, trip,
    )
}  # fmt: skip


def solved(rng: Random, family: str | None = None) -> Solved:
    """Draw one problem; families are equally likely."""
    name = family or rng.choice(list(FAMILIES))
    small = rng.random() < SMALL
    text, plan, calcs = FAMILIES[name](rng, small)
    return Solved(name, "small" if small else "large", text, plan, tuple(calcs))


def stream(seed: int, split: Split) -> Iterator[Solved]:
    """An endless, seeded stream of problems of one split (repeats are possible)."""
    rng = Random(seed)
    while True:
        item = solved(rng)
        if item.split == split:
            yield item


def main() -> None:
    import argparse
    import json
    import sys
    from itertools import islice

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--count", type=int, default=600)
    parser.add_argument("--split", choices=["train", "heldout"], default="heldout")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    unique = {item.text: item for item in islice(stream(args.seed, args.split), args.count * 3)}
    for i, item in enumerate(islice(unique.values(), args.count)):
        problem = item.problem()
        row = {
            "id": f"nano/{args.split}/{i}",
            "problem": problem.text,
            "answer": problem.answer,
            "source": "nano",
            "subject": problem.subject,
            "level": problem.level,
        }
        sys.stdout.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
