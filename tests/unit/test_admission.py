"""Claims of shared/endpoints/admission.py: bounds, budgets, the breaker, and the knee.

Time is simulated, so every claim is about the rules and none about this machine.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.endpoints.admission import (
    BREAKS_AFTER,
    CUT,
    FIRST_PAUSE,
    LONGEST_PAUSE,
    PATIENCE,
    Admission,
    Outcome,
    Ticket,
)
from tests.simulated_server import SimulatedServer, best, simulate

LEVELS = (4, 16, 32, 64, 96, 128, 256, 512)
OUTCOMES = st.sampled_from(Outcome)


def started(admission: Admission, now: float) -> list[Ticket]:
    """All that may start now."""
    tickets = []
    while admission.wait(now) == 0:
        tickets.append(admission.start(now))
    return tickets


# -- what holds whatever happens -------------------------------------------------------------------


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    st.tuples(st.integers(1, 8), st.integers(1, 40), st.integers(8, 40)),
    st.lists(st.tuples(st.floats(0, 3), st.integers(0, 50), OUTCOMES), max_size=200),
)
def test_the_limit_stays_in_its_bounds_and_the_books_are_right(
    bounds: tuple[int, int, int], events: list[tuple[float, int, Outcome]]
) -> None:
    """Whatever ends how and when: least <= limit <= most, and what is in flight is counted."""
    least, begin, most = bounds
    admission, out, now = Admission(least, begin, most, now=0.0), [], 0.0
    for pause, which, outcome in events:
        now += pause
        out += started(admission, now)
        assert len(out) <= most
        if out:
            ticket = out.pop(which % len(out))
            admission.end(ticket, outcome, now, tokens=which, completion_tokens=which)
        assert admission.in_flight == len(out)
        assert least <= admission.limit <= most
    for ticket in out:
        admission.end(ticket, Outcome.ABANDONED, now)
    later = now + LONGEST_PAUSE
    assert admission.wait(later) == 0, "whatever went before, requests go out again"


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(1, 600), st.lists(st.floats(0.001, 30), min_size=5, max_size=60))
def test_in_no_minute_more_requests_start_than_are_allowed(
    per_minute: int, pauses: list[float]
) -> None:
    """Greedy clients with pauses in between; every window of 60 s is looked at."""
    admission, now = Admission(1, 4096, 4096, now=0.0, requests_per_minute=per_minute), 0.0
    starts: list[float] = []
    for pause in pauses:
        for ticket in started(admission, now):
            starts.append(now)
            admission.end(ticket, Outcome.ANSWER, now)
        now += pause
    for i, at in enumerate(starts):
        assert sum(at <= other < at + 60 for other in starts[i:]) <= per_minute


def test_the_requests_that_are_allowed_do_start() -> None:
    """The control of the test above: a bucket that let nothing through would pass it."""
    admission, now, n = Admission(1, 4096, 4096, now=0.0, requests_per_minute=600), 0.0, 0
    while now < 600:
        for ticket in started(admission, now):
            n += 1
            admission.end(ticket, Outcome.ANSWER, now)
        wait = admission.wait(now)
        assert 0 < wait < math.inf
        now += wait + 1e-6
    assert n >= 0.95 * 6000


def test_tokens_per_minute_hold_on_average_though_they_are_known_only_afterwards() -> None:
    """Replies cost 1 to 2 000 tokens and take 5 s: the average is the budget, not above it."""
    server = SimulatedServer(slots=64, token=0.005)
    limited = Admission(1, 16, 64, now=0.0, tokens_per_minute=60_000)
    free = Admission(1, 16, 64, now=0.0)
    spent = simulate_waiting(server, limited, 600.0)
    assert 0.9 * 1000 <= spent / 600 <= 1.05 * 1000
    assert simulate_waiting(SimulatedServer(slots=64, token=0.005), free, 60.0) / 60 > 5000


def simulate_waiting(server: SimulatedServer, admission: Admission, seconds: float) -> float:
    """Tokens spent; as `simulate`, for one client that may have to wait for the clock."""
    now, spent, n = 0.0, 0.0, 0
    while now < seconds:
        while admission.wait(now) == 0:
            n += 1
            server.ask(now, 1 + n * 7919 % 2000, (0, admission.start(now)))
        wait, reply = admission.wait(now), server.next_reply()
        if now + wait < reply:
            now += wait + 1e-6
            continue
        now = reply
        tokens, (_, ticket) = server.reply()
        spent += tokens
        admission.end(ticket, Outcome.REPLY, now, tokens=int(tokens), completion_tokens=int(tokens))
    return spent


# -- explicit signs --------------------------------------------------------------------------------


@pytest.mark.parametrize("outcome", [Outcome.OVERLOAD, Outcome.STRAIN])
def test_a_burst_of_refusals_cuts_once_and_the_next_generation_again(outcome: Outcome) -> None:
    """30 requests that were out together and are refused together are one sign, not thirty."""
    admission = Admission(1, 100, 100, now=0.0)
    for now in (1.0, 3.0):
        before = admission.limit
        out = [admission.start(now) for _ in range(3)]
        for ticket in out:
            admission.end(ticket, outcome, now + 1, retry_after=0.0)
        assert admission.limit == int(CUT * before)


def test_a_refusal_of_one_request_is_no_sign_of_overload() -> None:
    """A context that is too long, a bad key: the limit stands."""
    admission = Admission(1, 100, 100, now=0.0)
    for outcome in (Outcome.ANSWER, Outcome.FAILURE, Outcome.ABANDONED):
        admission.end(admission.start(1.0), outcome, 2.0)
        assert admission.limit == 100


def test_retry_after_holds_back_every_request_but_not_for_ever() -> None:
    admission = Admission(1, 100, 100, now=0.0)
    admission.end(admission.start(0.0), Outcome.OVERLOAD, 1.0, retry_after=7.0)
    assert admission.wait(1.0) == pytest.approx(7.0)
    assert admission.wait(8.0) == 0
    admission.end(admission.start(8.0), Outcome.OVERLOAD, 9.0, retry_after=86_400.0)
    assert admission.wait(9.0) == pytest.approx(60.0)


def test_a_server_that_refuses_above_a_rate_is_used_up_to_it() -> None:
    """AIMD: 429 for every request beyond 40 in flight; between 60 % and all of the 40 are used."""
    admission, now, used = Admission(1, 16, 512, now=0.0), 0.0, []
    out: list[tuple[float, Ticket]] = []
    while now < 600:
        while admission.wait(now) == 0:
            ticket = admission.start(now)
            refused = len(out) >= 40
            if refused:
                admission.end(ticket, Outcome.OVERLOAD, now + 0.001)
                now += 0.001
            else:
                out.append((now + 2.0, ticket))
        now, ticket = out.pop(0)
        admission.end(ticket, Outcome.REPLY, now, tokens=50, completion_tokens=50)
        used.append((now, len(out)))
    late = [n for at, n in used if at > 120]
    assert 0.6 * 40 <= sum(late) / len(late) <= 40


# -- the breaker -----------------------------------------------------------------------------------


def failed(admission: Admission, now: float, n: int = BREAKS_AFTER) -> None:
    for ticket in [admission.start(now) for _ in range(n)]:
        admission.end(ticket, Outcome.FAILURE, now)


def test_the_breaker_opens_probes_one_at_a_time_and_closes() -> None:
    admission = Admission(1, 16, 16, now=0.0)
    failed(admission, 0.0)
    assert admission.breaker.state(0.0) == "open"
    assert admission.wait(0.0) == pytest.approx(FIRST_PAUSE)
    now = FIRST_PAUSE
    assert admission.breaker.state(now) == "half-open"
    probe = admission.start(now)
    assert admission.wait(now) == math.inf, "no second one while the probe is out"
    admission.end(probe, Outcome.REPLY, now + 1, tokens=1, completion_tokens=1)
    assert admission.breaker.state(now + 1) == "closed"
    assert 1 <= len(started(admission, now + 1)) <= 4, "it begins low again: no stampede"


def test_each_probe_that_fails_doubles_the_pause_up_to_a_minute() -> None:
    admission, now, pauses = Admission(1, 16, 16, now=0.0), 0.0, []
    failed(admission, now)
    for _ in range(9):
        pauses.append(admission.wait(now))
        now += pauses[-1]
        admission.end(admission.start(now), Outcome.FAILURE, now)
    assert pauses == pytest.approx([1, 2, 4, 8, 16, 32, 60, 60, 60])


def test_a_probe_that_is_abandoned_makes_room_for_the_next() -> None:
    """Else a cancelled call would lock a server out for good."""
    admission = Admission(1, 16, 16, now=0.0)
    failed(admission, 0.0)
    admission.end(admission.start(5.0), Outcome.ABANDONED, 6.0)
    assert admission.wait(6.0) == 0


@pytest.mark.parametrize(("n", "state"), [(12, "closed"), (40, "open")])
def test_a_few_failures_out_of_many_sent_at_once_are_no_outage(n: int, state: str) -> None:
    """They are answered before any good reply can be; 40 of 256 are too many for chance."""
    admission = Admission(1, 256, 256, now=0.0)
    tickets = started(admission, 0.0)
    assert len(tickets) == 256
    for ticket in tickets[:n]:
        admission.end(ticket, Outcome.FAILURE, 0.01)
    assert admission.breaker.state(0.02) == state
    for ticket in tickets[n:]:
        admission.end(ticket, Outcome.REPLY, 1.0, tokens=9, completion_tokens=9)
    assert admission.breaker.state(1.0) == "closed"
    assert (admission.limit == 256) == (state == "closed"), "after an outage it begins low"


def test_a_success_in_between_keeps_the_breaker_closed() -> None:
    """A server that fails often but not always is used: the retries see to the rest."""
    admission = Admission(1, 16, 16, now=0.0)
    for now in range(20):
        failed(admission, float(now), BREAKS_AFTER - 1)
        admission.end(admission.start(float(now)), Outcome.ANSWER, float(now))
    assert admission.breaker.state(20.0) == "closed"


def test_late_failures_of_before_do_not_lengthen_the_pause() -> None:
    """Fifty requests were out when the server died: the pause is that of one outage."""
    admission = Admission(1, 50, 50, now=0.0)
    for ticket in [admission.start(0.0) for _ in range(50)]:
        admission.end(ticket, Outcome.FAILURE, 1.0)
    assert admission.wait(1.0) == pytest.approx(FIRST_PAUSE)


# -- the knee --------------------------------------------------------------------------------------

SERVERS: dict[str, Callable[[], SimulatedServer]] = {
    "16 at once, then a queue": lambda: SimulatedServer(16),
    "64 at once, then a queue": lambda: SimulatedServer(64),
    "64, slower with every one": lambda: SimulatedServer(64, batch=64.0),
    "256, slower with every one": lambda: SimulatedServer(256, token=0.01, batch=128.0),
    "64, and a queue that hurts": lambda: SimulatedServer(64, batch=64.0, thrash=0.5),
    "no edge at all": lambda: SimulatedServer(4096, token=0.01, batch=32.0),
}


@pytest.mark.parametrize("name", SERVERS)
def test_the_knee_is_found_within_two_minutes_and_held(name: str) -> None:
    """Never a 429, only slowness: at least 90 % of what the best fixed limit brings, in the third
    minute and in every later one."""
    bar = 0.9 * best(SERVERS[name], LEVELS)
    done = simulate(SERVERS[name](), [Admission(1, 16, 512, now=0.0)], 360.0, seed=1)
    assert min(done.rate(t, t + 60) for t in (120, 180, 240, 300)) >= bar


def test_it_is_the_knee_that_is_found_not_the_upper_bound() -> None:
    """64 are served at once and 2 000 are allowed: throughput alone would not tell them apart."""
    done = simulate(SimulatedServer(64), [Admission(1, 16, 2000, now=0.0)], 360.0, seed=2)
    assert 0.8 * 64 <= done.limit(120, 360) <= 1.6 * 64


def test_controls_a_limit_that_is_fixed_fails_the_bar() -> None:
    """Too low, and on a server whose queue hurts too high: both are far from 90 %."""
    make = SERVERS["64, and a queue that hurts"]
    top = best(make, LEVELS)
    for level in (16, 512):
        fixed = [Admission(level, level, level, now=0.0)]
        assert simulate(make(), fixed, 180.0, seed=1).rate(120, 180) < 0.8 * top


def test_a_server_that_shrinks_and_grows_is_followed() -> None:
    """Its slots go from 128 to 32 and back; two minutes after each change 90 % are held. What is
    too much for the 32 only waits in the server's queue; PATIENCE bounds that."""
    server = SimulatedServer(128)

    def slots(n: int) -> Callable[[], None]:
        return lambda: setattr(server, "slots", n)

    events = [(240.0, slots(32)), (480.0, slots(128))]
    done = simulate(server, [Admission(1, 16, 1000, now=0.0)], 720.0, seed=3, events=events)
    full, quarter = 128 / 0.02, 32 / 0.02  # tokens per second
    assert done.rate(120, 240) >= 0.9 * full
    assert done.rate(360, 480) >= 0.9 * quarter
    assert done.limit(360, 480) <= PATIENCE * 32
    assert done.rate(600, 720) >= 0.9 * full


def test_processes_that_share_a_server_use_it_fully_and_their_queue_is_bounded() -> None:
    """Four clients that know nothing of each other: together 90 % of the best. Each sees its own
    share grow with its own limit, so they queue more than one alone would, and their shares may be
    far from equal (docs/endpoints.md); PATIENCE bounds the queue, and nobody stands still."""
    server = SimulatedServer(64)
    clients = [Admission(1, 16, 512, now=0.0) for _ in range(4)]
    done = simulate(server, clients, 360.0, seed=4)
    assert done.rate(120, 360) >= 0.9 * 64 / 0.02
    assert sum(client.limit for client in clients) <= 10 * 64
    assert min(done.rate(240, 360, who) for who in range(4)) > 0


def test_too_little_to_do_teaches_nothing() -> None:
    """Eight requests in flight and a limit of 16: it is not raised, as nothing was tried."""
    admission, now = Admission(1, 16, 512, now=0.0), 0.0
    out = [admission.start(now) for _ in range(8)]
    for _ in range(2000):
        now += 0.25
        admission.end(out.pop(0), Outcome.REPLY, now, tokens=10, completion_tokens=10)
        out.append(admission.start(now))
    assert admission.limit == 16


def test_requests_that_generate_nothing_do_not_mislead() -> None:
    """/tokenize answers in a millisecond whatever the load; the limit does not move by it."""
    admission, now = Admission(1, 16, 512, now=0.0), 0.0
    for _ in range(2000):
        tickets = started(admission, now)
        now += 0.001
        for ticket in tickets:
            admission.end(ticket, Outcome.REPLY, now)
    assert admission.limit == 16
