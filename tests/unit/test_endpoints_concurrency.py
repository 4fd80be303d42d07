"""Claims of shared/endpoints about permits: the bound holds, and none is ever lost."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from shared.endpoints import Endpoint, EndpointConfig, Sampling, UsageMeter
from tests.fake_endpoint import FakeEndpoint, Reply, chat

ASK = [{"role": "user", "content": "1+1?"}]
GREEDY = Sampling(temperature=0.0, max_tokens=8)


def config(server: FakeEndpoint, concurrency: int) -> EndpointConfig:
    """The limit begins at its bound: these tests are about permits, not about how many."""
    return EndpointConfig(
        base_url=server.base_url,
        model="fake",
        concurrency=concurrency,
        start_concurrency=concurrency,
        max_retries=0,
    )


class Gate:
    """A script that holds every request until the gate is open."""

    def __init__(self) -> None:
        self.open = threading.Event()

    def __call__(self, path: str, body: Any) -> Reply:
        assert self.open.wait(30)
        return chat("two")


def test_the_bound_is_reached_and_never_passed() -> None:
    """40 calls, 4 permits: four arrive together while the gate is shut, and never a fifth."""

    async def main(server: FakeEndpoint, gate: Gate) -> int:
        async with Endpoint(config(server, 4)) as endpoint, asyncio.TaskGroup() as group:
            tasks = [group.create_task(endpoint.chat(ASK, GREEDY)) for _ in range(40)]
            await asyncio.to_thread(server.wait_for, lambda: server.in_flight == 4)
            gate.open.set()
        return sum(task.result().text == "two" for task in tasks)

    gate = Gate()
    with FakeEndpoint(gate) as server:
        assert asyncio.run(main(server, gate)) == 40
    assert server.max_in_flight == 4


def test_the_connection_pool_does_not_bind_below_the_bound() -> None:
    """150 permits are 150 requests at the server at once: more than httpx keeps by default."""

    async def main(server: FakeEndpoint, gate: Gate) -> None:
        async with Endpoint(config(server, 150)) as endpoint, asyncio.TaskGroup() as group:
            for _ in range(150):
                group.create_task(endpoint.chat(ASK, GREEDY))
            await asyncio.to_thread(server.wait_for, lambda: server.in_flight == 150)
            gate.open.set()

    gate = Gate()
    with FakeEndpoint(gate) as server:
        asyncio.run(main(server, gate))


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    st.lists(st.integers(0, 5), min_size=1, max_size=8),
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 12)), max_size=8),
)
def test_cancellation_leaks_no_permit(roles: list[int], cancels: list[tuple[int, int]]) -> None:
    """Calls are cancelled in any order and at any step of theirs, queued or in flight.

    Afterwards the endpoint still brings two requests at once to the server (its bound), the calls
    that were not cancelled succeed, and the meter holds what was sent.
    """

    async def main(server: FakeEndpoint, gate: Gate) -> None:
        meter = UsageMeter()
        async with Endpoint(config(server, 2)) as endpoint:
            tasks = [
                asyncio.create_task(endpoint.chat(ASK, GREEDY, meter=meter[str(role)]))
                for role in roles
            ]
            for which, steps in cancels:
                for _ in range(steps):
                    await asyncio.sleep(0)
                tasks[which % len(tasks)].cancel()
            gate.open.set()
            ended = await asyncio.gather(*tasks, return_exceptions=True)
            kept = [end for end in ended if not isinstance(end, asyncio.CancelledError)]
            assert len(kept) >= len(tasks) - len({which % len(tasks) for which, _ in cancels})
            assert all(not isinstance(end, BaseException) for end in kept)
            total = sum(usage.completion_tokens for usage in meter.values())
            assert total == len(kept)
            assert sum(usage.requests for usage in meter.values()) <= len(tasks)

            # Requests of cancelled calls may still be on their way through the server's threads.
            await asyncio.to_thread(server.wait_for, lambda: server.in_flight == 0)
            gate.open.clear()
            async with asyncio.TaskGroup() as group:
                for _ in range(2):
                    group.create_task(endpoint.chat(ASK, GREEDY))
                await asyncio.to_thread(server.wait_for, lambda: server.in_flight == 2)
                gate.open.set()

    gate = Gate()
    with FakeEndpoint(gate) as server:
        asyncio.run(main(server, gate))
