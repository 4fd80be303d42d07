"""Which of a model's servers a request goes to, and the queue of those that have to wait.

What always holds:
- A request goes to its trajectory's home if that admits it now, else to the next server that does:
  the order is by rendezvous hashing, so that all requests of a trajectory find their prefix cached,
  and a server that is gone moves none but its own trajectories.
- Nobody waits while a server admits: a place that becomes free goes to a request whose server is
  down, else to one whose home it is, else to the one at the head of the longest queue.
- A ticket is given back however the request ends; whoever is cancelled in the queue had none.

It belongs to the event loop that uses it; what it learns (the Admissions) may outlive it.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
from collections import deque
from collections.abc import Sequence
from contextvars import ContextVar

from shared.endpoints.admission import Admission, Outcome, Ticket

trajectory: ContextVar[str] = ContextVar("trajectory", default="")
"""What the caller works on: set it at the beginning of a task; requests that share it share a
server, hence a prefix cache. Without it they go where there is most room."""

Place = tuple[int, Ticket]
Waiting = tuple["asyncio.Future[Place]", Sequence[int]]  # and the servers that it may go to


def rendezvous(key: str, servers: Sequence[str]) -> list[int]:
    """The servers' indices in the order of preference of `key` (Thaler and Ravishankar 1998)."""

    def weight(i: int) -> bytes:
        return hashlib.blake2b(f"{key}\n{servers[i]}".encode(), digest_size=8).digest()

    return sorted(range(len(servers)), key=weight)


class Balancer:
    def __init__(self, urls: Sequence[str], admissions: Sequence[Admission]) -> None:
        self._urls, self.admissions = urls, admissions
        self._queues: list[deque[Waiting]] = [deque() for _ in urls]
        self._n_waiting = 0
        self._timer: asyncio.TimerHandle | None = None

    def order(self) -> list[int]:
        """Indices of the servers, the preferred one first."""
        if len(self._urls) == 1:
            return [0]
        key = trajectory.get()
        if key:
            return rendezvous(key, self._urls)
        return sorted(range(len(self._urls)), key=lambda i: self._load(i))

    async def acquire(self, order: Sequence[int], within: float) -> Place:
        """One of the servers in `order`, and the ticket to end with `release`; after a wait, maybe.

        Raises TimeoutError where there is none within so many seconds.
        """
        loop = asyncio.get_running_loop()
        now = loop.time()
        for i in order:
            if not self._queues[i] and self.admissions[i].wait(now) == 0:
                return i, self.admissions[i].start(now)
        up = (i for i in order if self.admissions[i].breaker.state(now) == "closed")
        place: asyncio.Future[Place] = loop.create_future()
        self._queues[next(up, order[0])].append((place, order))
        self._n_waiting += 1
        self._serve()
        try:
            async with asyncio.timeout(within):
                return await place
        except BaseException:
            if place.done() and not place.cancelled():
                self.release(*place.result(), Outcome.ABANDONED)
            raise

    def release(
        self,
        server: int,
        ticket: Ticket,
        outcome: Outcome,
        *,
        tokens: int = 0,
        completion_tokens: int | None = None,
        retry_after: float = 0.0,
    ) -> None:
        """The request is over (`Admission.end`); whoever can go now goes."""
        self.admissions[server].end(
            ticket,
            outcome,
            asyncio.get_running_loop().time(),
            tokens=tokens,
            completion_tokens=completion_tokens,
            retry_after=retry_after,
        )
        if self._n_waiting:
            self._serve()

    def is_down(self) -> bool:
        """Is there no server left that is known to answer?"""
        now = asyncio.get_running_loop().time()
        return all(one.breaker.state(now) != "closed" for one in self.admissions)

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _serve(self) -> None:
        """Let go whoever can, and see to it that the others are looked at again in time."""
        loop = asyncio.get_running_loop()
        now, soonest = loop.time(), math.inf
        for i, admission in enumerate(self.admissions):
            while self._n_waiting:
                wait = admission.wait(now)
                if wait > 0:
                    soonest = min(soonest, wait)
                    break
                place = self._next(i, now)
                if place is None:
                    break
                place.set_result((i, admission.start(now)))
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._n_waiting and soonest < math.inf:
            self._timer = loop.call_later(soonest, self._serve)

    def _next(self, server: int, now: float) -> asyncio.Future[Place] | None:
        """Take the one that goes to `server` next out of its queue, if there is one that may."""
        others = [i for i in range(len(self._queues)) if i != server]
        down = [i for i in others if self.admissions[i].breaker.state(now) == "open"]
        longest = sorted(others, key=lambda i: -len(self._queues[i]))
        for queue in (self._queues[i] for i in (*down, server, *longest)):
            while queue and queue[0][0].done():  # has left already
                queue.popleft()
                self._n_waiting -= 1
            if queue and server in queue[0][1]:
                self._n_waiting -= 1
                return queue.popleft()[0]
        return None

    def _load(self, i: int) -> float:
        admission = self.admissions[i]
        return (admission.in_flight + len(self._queues[i])) / admission.limit
