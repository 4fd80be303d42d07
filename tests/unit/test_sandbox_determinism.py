"""The same code and seed print the same bytes: in any order, on any zygote, among any number."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator

import pytest

from shared.sandbox import Outcome, Sandbox, Tier, pool

# Every line is a source that a program could take chance or time from.
SOURCES = """
import datetime, os, random, secrets, tempfile, time, uuid
import numpy
print(random.random(), random.Random().random(), random.SystemRandom().random())
random.seed(); print(random.random())
print(numpy.random.rand(), numpy.random.default_rng().random(), numpy.random.RandomState().rand())
print(os.urandom(8), os.getrandom(4), secrets.token_hex(4), uuid.uuid4(), uuid.uuid1())
print({'a', 'b', 'c', 'd', 'e'}, hash('text'), hash(('x', 1.5)))
print(time.time(), time.time_ns(), time.perf_counter(), time.process_time(), time.ctime())
print(time.strftime('%c'), time.asctime(), time.localtime().tm_year, time.gmtime())
print(datetime.datetime.now(), datetime.datetime.utcnow(), datetime.date.today())
print(datetime.datetime.now(datetime.UTC), repr(datetime.datetime.today()))
print(os.getcwd(), sorted(os.environ.items()))
started = time.time()
while time.time() < started + 0.001: pass
print(time.time() - started)
"""


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    with Sandbox(zygotes=2, preload=("numpy",), warmup="") as opened:
        yield opened


def test_no_source_of_chance_or_time_makes_two_runs_differ(sandbox: Sandbox) -> None:
    first = sandbox.run(SOURCES, seed=1)
    assert first.outcome is Outcome.OK, first
    for other in (1, 1, 1):
        assert sandbox.run(SOURCES, seed=other).stdout == first.stdout
    different = sandbox.run(SOURCES, seed=2).stdout.splitlines()
    same = first.stdout.splitlines()
    assert [a == b for a, b in zip(different, same, strict=True)] == [False] * 4 + [True] * 7


@pytest.mark.parametrize("tier", [Tier.B, Tier.C])
def test_nor_at_other_tiers_which_differ_in_their_directory_only(
    sandbox: Sandbox, tier: Tier, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = sandbox.run(SOURCES, seed=1).stdout.replace("/tmp/sandbox/run ", "/ ", 1)
    monkeypatch.setattr(pool, "TIERS", (tier,))
    with Sandbox(zygotes=1, preload=("numpy",), warmup="", minimum_tier=tier) as other:
        assert other.run(SOURCES, seed=1).stdout == first


def test_nor_do_order_zygote_and_company(sandbox: Sandbox) -> None:
    """32 runs one after the other, then shuffled and 32 at once among runs that disturb, on other
    zygotes as well."""
    programs = [(SOURCES + f"print({n})", n % 7) for n in range(32)]
    alone = [sandbox.run(code, seed=seed).stdout for code, seed in programs]
    order = list(range(32))
    random.Random(1).shuffle(order)

    async def shuffled(where: Sandbox) -> list[str]:
        gate = asyncio.Semaphore(32)

        async def one(n: int) -> str:
            async with gate:
                return (await where.arun(programs[n][0], seed=programs[n][1])).stdout

        async def disturb() -> None:
            async with gate:
                await where.arun("x = [object() for _ in range(10**5)]; 1 / 0")

        found = await asyncio.gather(*map(one, order), *(disturb() for _ in range(12)))
        return [text for text in found if text is not None]

    assert asyncio.run(shuffled(sandbox)) == [alone[n] for n in order]
    with Sandbox(zygotes=2, preload=("numpy",), warmup="") as other:
        assert asyncio.run(shuffled(other)) == [alone[n] for n in order]


def test_a_session_draws_on_from_cell_to_cell_and_is_the_same_every_time(sandbox: Sandbox) -> None:
    def drawn() -> list[str]:
        with sandbox.session(seed=4) as cells:
            return [cells.run(SOURCES).stdout for _ in range(2)]

    first, second = drawn()
    assert first != second
    assert drawn() == [first, second]


def test_the_clock_begins_anew_moves_at_every_look_and_waits_end(sandbox: Sandbox) -> None:
    looks = "import time\nprint(time.time_ns(), time.time(), time.perf_counter_ns())"
    for _ in range(2):
        shown = sandbox.run(looks).stdout.split()
        assert (shown[0], shown[2]) == ("1735689600000001000", "1735689600000003000")
    slept = "import time\nt = time.time(); time.sleep(.01); print(time.time() - t > .01)"
    assert sandbox.run(slept).stdout == "True\n"


def test_dates_remain_what_they_are(sandbox: Sandbox) -> None:
    code = """
import copy, datetime as d, pickle
now = d.datetime.now()
true = type(now).__mro__[1](2025, 1, 1)
print(isinstance(now, d.datetime), isinstance(now, d.date), isinstance(true, d.datetime))
print(issubclass(d.datetime, d.date), isinstance(1, d.datetime), isinstance(now.date(), d.date))
print(pickle.loads(pickle.dumps(now)) == now, copy.deepcopy(now) == now, type(now + d.timedelta(1)))
mine = d.datetime(2025, 1, 1)
print(repr(d.date(2024, 2, 29)), mine == true, hash(true) == hash(mine))
print(d.datetime.strptime('2024-05-06', '%Y-%m-%d'), (d.date(2024, 3, 1) - d.date(2024, 2, 1)).days)
class Mine(d.datetime): pass
print(isinstance(now, Mine), isinstance(Mine(2025, 1, 1), d.datetime), Mine.now().year)
"""
    result = sandbox.run(code)
    assert result.stdout.splitlines() == [
        "True True True",
        "True False True",
        "True True <class 'datetime.datetime'>",
        "datetime.date(2024, 2, 29) True True",
        "2024-05-06 00:00:00 29",
        "False True 2025",
    ], result
