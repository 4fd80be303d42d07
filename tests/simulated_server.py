"""A server of a language model in simulated time: it never refuses, it only gets slow.

    server = SimulatedServer(slots=64, batch=64.0)
    done = simulate(server, [Admission(1, 16, 512, now=0.0)], seconds=240.0, seed=1)
    assert done.rate(120, 240) > ...

As vLLM: up to `slots` sequences decode together, each token taking `token * (1 + n / batch)`
seconds where n of them do; further requests wait in order. `thrash` is what each waiting request
(as a share of `slots`) costs those that decode. Clients always have more to ask than they may.
"""

from __future__ import annotations

import heapq
import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from shared.endpoints.admission import Admission, Outcome, Ticket

Sent = tuple[int, Ticket]


class SimulatedServer:
    def __init__(
        self, slots: int, token: float = 0.02, batch: float = 1e9, thrash: float = 0.0
    ) -> None:
        self.slots, self.token, self.batch, self.thrash = slots, token, batch, thrash
        self.time = 0.0
        self._made = 0.0  # tokens that a sequence would have by now, had it always been decoding
        self._running: list[tuple[float, int, float, Sent]] = []
        self._waiting: deque[tuple[float, Sent]] = deque()
        self._n = 0

    @property
    def speed(self) -> float:
        """Tokens per second of each sequence that decodes."""
        slow = (1 + len(self._running) / self.batch) * (
            1 + self.thrash * len(self._waiting) / self.slots
        )
        return 1 / (self.token * slow)

    def ask(self, now: float, length: float, sent: Sent) -> None:
        self._go_to(now)
        self._waiting.append((length, sent))
        self._fill()

    def next_reply(self) -> float:
        if not self._running:
            return float("inf")
        return self.time + max(0.0, self._running[0][0] - self._made) / self.speed

    def reply(self) -> tuple[float, Sent]:
        """Its length and whose it is."""
        self._go_to(self.next_reply())
        _, _, length, sent = heapq.heappop(self._running)
        self._fill()
        return length, sent

    def _fill(self) -> None:
        while self._waiting and len(self._running) < self.slots:
            length, sent = self._waiting.popleft()
            self._n += 1
            heapq.heappush(self._running, (self._made + length, self._n, length, sent))

    def _go_to(self, now: float) -> None:
        self._made += (now - self.time) * self.speed
        self.time = now


@dataclass
class Done:
    replies: list[tuple[float, float, int]] = field(default_factory=list)
    """(time, tokens, whose)"""
    limits: list[tuple[float, int, int]] = field(default_factory=list)
    """(time, whose, limit)"""

    def rate(self, begin: float, end: float, whose: int | None = None) -> float:
        """Tokens per second."""
        made = (
            tokens for at, tokens, who in self.replies if begin <= at < end and whose in (None, who)
        )
        return sum(made) / (end - begin)

    def limit(self, begin: float, end: float) -> float:
        """On average."""
        seen = [limit for at, _, limit in self.limits if begin <= at < end]
        return sum(seen) / len(seen)


def simulate(
    server: SimulatedServer,
    clients: Sequence[Admission],
    seconds: float,
    seed: int,
    length: Callable[[random.Random], float] = lambda draw: 1 + draw.expovariate(1 / 100),
    events: Sequence[tuple[float, Callable[[], None]]] = (),
) -> Done:
    """`events`: what happens to the server at some time, in order."""
    draw, done, left = random.Random(seed), Done(), deque(events)
    now = 0.0
    while True:
        for who, client in enumerate(clients):
            while client.wait(now) == 0:
                server.ask(now, length(draw), (who, client.start(now)))
        upcoming = server.next_reply()
        if left and left[0][0] <= upcoming:
            now, happens = left.popleft()
            server._go_to(now)
            happens()
            continue
        if upcoming > seconds:
            return done
        now = upcoming
        tokens, (who, ticket) = server.reply()
        clients[who].end(
            ticket, Outcome.REPLY, now, tokens=int(tokens), completion_tokens=int(tokens)
        )
        done.replies.append((now, tokens, who))
        done.limits.append((now, who, clients[who].limit))


def best(make: Callable[[], SimulatedServer], levels: Sequence[int], seed: int = 9) -> float:
    """The most tokens per second that any fixed limit brings."""

    def brings(level: int) -> float:
        fixed = [Admission(level, level, level, now=0.0)]
        return simulate(make(), fixed, 90.0, seed).rate(30.0, 90.0)

    return max(map(brings, levels))
