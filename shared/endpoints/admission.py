"""When a request may go to a server: how many at once, how many a minute, and not while it is down.

Pure logic: no clock, no event loop; every method is told the time (seconds, from anywhere, never
going back). One Admission per server; its state is what has been learned about that server.

What always holds:
- At most `most` requests are in flight, never fewer than `least` are allowed. Each `start` has one
  `end`, however the request ended.
- In no 60 seconds more than `requests_per_minute` start; tokens are counted when they are known and
  owed until then, so that the average stays within `tokens_per_minute`.
- Admission decides when a request is sent, never what is in it: results do not depend on it.

How the limit finds the knee. A saturated vLLM never says 429: it only gets slow. So throughput is
measured by Little's law, as requests in flight times tokens per second of one request, over the
requests that started under the present limit. The knee is where throughput / in_flight**FLATNESS is
greatest: beyond it, twice the load brings less than 2**FLATNESS = 1.11 times the throughput. Slow
start doubles the limit while that score rises. From then on the limit is held, and now and then
tried one step (its square root) up or down; what is better becomes the limit, and the same
direction is tried again. An explicit sign (429, 503, a timeout) cuts it at once, at most once per
generation of requests.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import Enum

FLATNESS = 0.15
CUT = 0.7  # of the limit is left after a sign of overload
ROUND = 2.0  # times the limit: replies that one measurement takes
ENOUGH = 24  # replies, at least
SECONDS = 0.5  # at least: below, it is the client's own scheduling that is measured
HOLD = 2  # measurements at the limit between two trials
BUSY = 0.8  # of the limit in use, at least, or nothing is learned about it
PATIENCE = 8.0  # times the best pace seen: slower than that, it is only a queue that grows

BREAKS_AFTER = 5  # failures in a row, at least
BREAKS_SHARE = 0.1  # of what is in flight, at least: failures come at once, good replies later
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0  # seconds that the breaker stays open, doubled each time
LONGEST_RETRY_AFTER = 60.0  # what one reply may ask of all requests


class Outcome(Enum):
    """How a request ended, as far as admission is concerned."""

    REPLY = "reply"  # a good one
    ANSWER = "answer"  # any other that shows the server alive: a refusal of this one request
    OVERLOAD = "overload"  # 429: alive, and wants less
    STRAIN = "strain"  # 503, no reply in time: overloaded or down, who knows
    FAILURE = "failure"  # no connection, a broken one, any other 5xx
    ABANDONED = "abandoned"  # by us: it says nothing


_FAILED = frozenset({Outcome.STRAIN, Outcome.FAILURE})


class Breaker:
    """Lets nothing through to a server that fails again and again, and does nothing else.

    Closed: everything passes. Open: nothing does, until the pause is over. Half-open: one request
    at a time is a probe; its success closes the breaker, its failure opens it for twice as long.
    """

    def __init__(self) -> None:
        self.failures = 0  # in a row
        self._until = -math.inf  # open until then; half-open from then on
        self._pause = FIRST_PAUSE
        self._open = False
        self._probing = False

    def state(self, now: float) -> str:
        if not self._open:
            return "closed"
        return "open" if now < self._until else "half-open"

    def wait(self, now: float) -> float:
        """Seconds until a request may pass; inf while a probe is out."""
        if not self._open:
            return 0.0
        return math.inf if self._probing else max(0.0, self._until - now)

    def start(self) -> bool:
        """True if this request is the probe; give that back to `end`."""
        self._probing = self._open
        return self._open

    def end(self, failed: bool | None, probe: bool, in_flight: int, now: float) -> None:
        """`failed` is None where the outcome says nothing. Late ones of before are no probes."""
        if probe:
            self._probing = False
        if failed is None:
            return
        if not failed:
            self._open, self._pause, self.failures = False, FIRST_PAUSE, 0
            return
        self.failures += 1
        if probe:
            self._pause = min(2 * self._pause, LONGEST_PAUSE)
        enough = max(BREAKS_AFTER, BREAKS_SHARE * in_flight)
        if probe or (not self._open and self.failures >= enough):
            self._open, self._until = True, now + self._pause


class Bucket:
    """At most `per_minute` in any minute, spread over it: one second's worth may come at once."""

    def __init__(self, per_minute: int | None, now: float) -> None:
        self.unlimited = per_minute is None
        per_minute = per_minute or 1
        self._burst = max(1.0, per_minute / 60)
        self._rate = max(per_minute - self._burst, per_minute / 2) / 60
        self._level, self._at = self._burst, now

    def wait(self, now: float, amount: float = 1.0) -> float:
        """Seconds until `amount` may be taken; more than a burst is had once the bucket is full."""
        if self.unlimited:
            return 0.0
        self._fill(now)
        return max(0.0, min(amount, self._burst) - self._level) / self._rate

    def take(self, amount: float, now: float) -> None:
        """May leave a debt (or, if negative, give back)."""
        if not self.unlimited:
            self._fill(now)
            self._level = min(self._burst, self._level - amount)

    def _fill(self, now: float) -> None:
        self._level = min(self._burst, self._level + (now - self._at) * self._rate)
        self._at = now


@dataclass(slots=True)
class Epoch:
    """What was measured under one limit: of requests that started after it was set."""

    since: float
    n: int = 0
    work: float = 0.0  # tokens
    seconds: float = 0.0  # of the requests, added up
    in_flight: float = 0.0  # seen at each end, added up


class Knee:
    """The limit on requests in flight, and the search for the knee (the module's docstring)."""

    def __init__(self, least: int, start: int, most: int, now: float) -> None:
        self.least, self.most = least, most
        self.limit = min(max(start, least), most)
        self.slow_start = True
        self.epoch = Epoch(now)
        self._best: tuple[int, float] | None = None  # limit and its score
        self._pace = math.inf  # seconds per token, the best seen
        self._trial = 0  # +1, -1: the limit stands one step from the best; 0: at it
        self._next = 1
        self._held = 0
        self._cut_at = -math.inf

    def end(self, started: float, work: float, seconds: float, in_flight: int, now: float) -> None:
        """A good reply of `work` tokens."""
        epoch = self.epoch
        if started < epoch.since:
            return
        epoch.n += 1
        epoch.work += work
        epoch.seconds += seconds
        epoch.in_flight += in_flight
        if epoch.n >= max(ENOUGH, ROUND * self.limit) and now - epoch.since >= SECONDS:
            self._measured(epoch, now)

    def cut(self, started: float, now: float) -> None:
        """A sign of overload; one of a request that was sent before the last cut is no news."""
        if started <= self._cut_at:
            return
        self._cut_at = now
        self._best, self.slow_start, self._trial, self._held, self._next = None, False, 0, 0, 1
        self._set(int(self.limit * CUT), now)

    def restart(self, now: float) -> None:
        """After an outage: begin low again, as with a server that is not known."""
        self._best, self.slow_start, self._trial, self._held = None, True, 0, 0
        self._set(min(self.limit, max(self.least, 4)), now)

    def _set(self, limit: int, now: float) -> None:
        self.limit = max(self.least, min(limit, self.most))
        self.epoch = Epoch(now)

    def _measured(self, epoch: Epoch, now: float) -> None:
        in_flight, pace = epoch.in_flight / epoch.n, epoch.seconds / max(epoch.work, 1e-9)
        if in_flight < BUSY * self.limit:  # too little is asked: nothing is learned of the limit
            self._set(self.limit, now)
            return
        score = in_flight / max(pace, 1e-9) / in_flight**FLATNESS
        self._pace = min(pace, 1.01 * self._pace)  # forgotten slowly: servers change
        better = self._best is None or score > self._best[1]
        if pace > PATIENCE * self._pace and self.limit > self.least:
            self._best, self.slow_start, self._trial, self._held = None, False, 0, 0
            self._set(int(self.limit * CUT), now)
        elif self.slow_start:
            self._double(better, score, now)
        elif self._trial:
            self._tried(better, score, now)
        else:
            self._hold(score, now)

    def _double(self, better: bool, score: float, now: float) -> None:
        if not better:
            assert self._best is not None
            self.slow_start = False
            self._set(self._best[0], now)
            return
        self._best = (self.limit, score)
        self.slow_start = self.limit < self.most
        self._set(2 * self.limit, now)

    def _tried(self, better: bool, score: float, now: float) -> None:
        assert self._best is not None
        if better:
            self._best = (self.limit, score)
            self._try(self._trial, now)
            return
        self._next, self._trial, self._held = -self._trial, 0, 0
        self._set(self._best[0], now)

    def _hold(self, score: float, now: float) -> None:
        self._best = (self.limit, score)
        self._held += 1
        if self._held >= HOLD:
            self._try(self._next, now)
        else:
            self._set(self.limit, now)

    def _try(self, direction: int, now: float) -> None:
        limit = self.limit + direction * max(1, round(math.sqrt(self.limit)))
        limit = max(self.least, min(limit, self.most))
        if limit == self.limit:  # at a bound: there is only the other side
            self._next, self._trial, self._held = -direction, 0, 0
        else:
            self._trial = direction
        self._set(limit, now)


@dataclass(frozen=True, slots=True)
class Ticket:
    """One request in flight."""

    at: float
    owed: float  # tokens that were set aside for it
    probe: bool


@dataclass(frozen=True, slots=True)
class View:
    """What `tirgen status` shows of a server. Rates are per second, over the last while."""

    limit: int
    in_flight: int
    breaker: str
    requests: float
    tokens: float
    latency: float  # seconds, of good replies


@dataclass
class Admission:
    """One server's. `wait` says when a request may start, `start` and `end` keep the books."""

    least: int
    begin: int
    most: int
    now: float
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    in_flight: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self.knee = Knee(self.least, self.begin, self.most, self.now)
        self.breaker = Breaker()
        self._requests = Bucket(self.requests_per_minute, self.now)
        self._tokens = Bucket(self.tokens_per_minute, self.now)
        self._cost = 0.0  # tokens of one request, lately
        self._paused_until = -math.inf
        self._seen = _Seen(self.now)

    @property
    def limit(self) -> int:
        return self.knee.limit

    def wait(self, now: float) -> float:
        """Seconds until a request may start; inf: not before one has ended."""
        if self.in_flight >= self.knee.limit:
            return math.inf
        waits = self.breaker.wait(now), self._paused_until - now
        return max(0.0, *waits, self._requests.wait(now), self._tokens.wait(now, self._cost))

    def start(self, now: float) -> Ticket:
        """Only where `wait` says 0."""
        self.in_flight += 1
        self._requests.take(1, now)
        self._tokens.take(self._cost, now)
        return Ticket(now, self._cost, self.breaker.start())

    def end(
        self,
        ticket: Ticket,
        outcome: Outcome,
        now: float,
        *,
        tokens: int = 0,
        completion_tokens: int | None = None,
        retry_after: float = 0.0,
    ) -> None:
        """The request of `ticket` is over. `tokens` are all that it was billed for.

        `completion_tokens` is None for what generates nothing (/tokenize): it is quick whatever the
        load, so that its time teaches nothing.
        """
        in_flight, self.in_flight = self.in_flight, self.in_flight - 1
        self._tokens.take(tokens - ticket.owed, now)
        was_down = self.breaker.state(now) != "closed"
        failed = None if outcome is Outcome.ABANDONED else outcome in _FAILED
        self.breaker.end(failed, ticket.probe, in_flight, now)
        if outcome in (Outcome.OVERLOAD, Outcome.STRAIN):
            pause = min(retry_after, LONGEST_RETRY_AFTER)
            self._paused_until = max(self._paused_until, now + pause)
            self.knee.cut(ticket.at, now)
        elif outcome is Outcome.REPLY and completion_tokens is not None:
            self._cost += 0.1 * (tokens - self._cost)
            seconds = now - ticket.at
            self.knee.end(ticket.at, max(completion_tokens, 1), seconds, in_flight, now)
            self._seen.add(now, completion_tokens, seconds)
        if was_down and self.breaker.state(now) == "closed":
            self.knee.restart(now)

    def view(self, now: float) -> View:
        requests, tokens, latency = self._seen.rates(now)
        return View(self.limit, self.in_flight, self.breaker.state(now), requests, tokens, latency)


class _Seen:
    """Counts of good replies in two halves of a window that moves on every WINDOW / 2 seconds."""

    WINDOW = 20.0

    def __init__(self, now: float) -> None:
        self._since = [now, now]  # when the older and the newer half began
        self._counts = [[0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]

    def add(self, now: float, tokens: int, seconds: float) -> None:
        self._turn(now)
        newer = self._counts[1]
        newer[0] += 1
        newer[1] += tokens
        newer[2] += seconds

    def rates(self, now: float) -> tuple[float, float, float]:
        """Replies and tokens per second, and the mean latency."""
        self._turn(now)
        n, tokens, seconds = (sum(pair) for pair in zip(*self._counts, strict=True))
        span = max(now - self._since[0], 1.0)
        return n / span, tokens / span, seconds / n if n else 0.0

    def _turn(self, now: float) -> None:
        late = now - self._since[1]
        if late >= self.WINDOW:
            self._since, self._counts = [now, now], [[0.0] * 3, [0.0] * 3]
        elif late >= self.WINDOW / 2:
            self._since = [self._since[1], now]
            self._counts = [self._counts[1], [0.0] * 3]
