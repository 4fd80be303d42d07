"""Claims of shared/endpoints about several servers of one model: affinity, failing over, outages.

Real connections to scripted servers on loopback; a dead server is a port that nobody listens on.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from tenacity import wait_none

from shared.endpoints import (
    Endpoint,
    EndpointConfig,
    Learned,
    Sampling,
    Usage,
    admission,
    balancer,
    client,
)
from shared.endpoints.balancer import rendezvous
from shared.errors import ConfigError, EndpointError
from tests.fake_endpoint import FakeEndpoint, Reply, chat, error, models, ok, sequence

ASK = [{"role": "user", "content": "1+1?"}]
GREEDY = Sampling(temperature=0.0, max_tokens=8)


@pytest.fixture(autouse=True)
def _no_backoff(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "BACKOFF", wait_none())


def config(*urls: str, **fields: Any) -> EndpointConfig:
    few: dict[str, Any] = {"timeout": 5.0, "deadline": 20.0, "max_retries": 1}
    return EndpointConfig(base_url=",".join(urls), model="fake", **few | fields)


def dead_url() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}/v1"


async def ask(endpoint: Endpoint, trajectory: str = "", meter: Usage | None = None) -> str:
    balancer.trajectory.set(trajectory)
    return (await endpoint.chat(ASK, GREEDY, meter=meter)).text


def together(
    settings: EndpointConfig, n: int, each: Callable[[Endpoint, int], Awaitable[str]]
) -> list[str]:
    """`each(endpoint, i)` for n tasks at once, each with a context of its own."""

    async def main() -> list[str]:
        async with Endpoint(settings) as endpoint:
            return await asyncio.gather(*(each(endpoint, i) for i in range(n)))

    return asyncio.run(main())


# -- where a request goes --------------------------------------------------------------------------


def test_rendezvous_is_even_and_a_server_that_goes_moves_only_its_own() -> None:
    """3 000 trajectories on three servers: a third each; without one of them, those of the two
    others stay, and its own are shared out. The control, hashing by modulo, moves two thirds."""
    servers = ["http://a/v1", "http://b/v1", "http://c/v1"]
    keys = [str(i) for i in range(3000)]
    homes = {key: servers[rendezvous(key, servers)[0]] for key in keys}
    assert all(900 < n < 1100 for n in Counter(homes.values()).values())
    left = servers[:2]
    moved = {key: left[rendezvous(key, left)[0]] for key in keys}
    assert all(moved[key] == home for key, home in homes.items() if home in left)
    taken_over = Counter(moved[key] for key, home in homes.items() if home not in left)
    assert all(400 < n < 600 for n in taken_over.values())

    def modulo(key: str, n: int) -> int:
        return int(hashlib.sha256(key.encode()).hexdigest(), 16) % n

    assert sum(modulo(key, 3) != modulo(key, 2) for key in keys) > 1800


def test_all_requests_of_a_trajectory_go_to_its_home() -> None:
    """20 trajectories of 5 requests each on two servers: each is seen by one of them only."""

    async def each(endpoint: Endpoint, i: int) -> str:
        balancer.trajectory.set(str(i))
        for _ in range(5):
            await endpoint.chat([{"role": "user", "content": str(i)}], GREEDY)
        return ""

    script = sequence(chat("two"))
    with FakeEndpoint(script) as one, FakeEndpoint(script) as other:
        together(config(one.base_url, other.base_url), 20, each)
        seen = [{r.json["messages"][0]["content"] for r in s.requests} for s in (one, other)]
    assert not seen[0] & seen[1]
    assert len(seen[0] | seen[1]) == 20
    assert min(map(len, seen)) >= 3


def test_a_request_does_not_wait_at_home_while_the_other_server_has_room() -> None:
    """All are at home at one server, which takes two at a time and holds them: the rest overflows
    to the other, and is done while those two still wait."""
    gate = threading.Event()

    def held(path: str, body: Any) -> Reply:
        assert gate.wait(30)
        return chat("held")

    async def main(full: FakeEndpoint, free: FakeEndpoint) -> Counter[str]:
        urls = (full.base_url, free.base_url)
        home = next(str(i) for i in range(99) if rendezvous(str(i), urls)[0] == 0)
        async with Endpoint(config(*urls, concurrency=2)) as endpoint:
            tasks = {asyncio.create_task(ask(endpoint, home)) for _ in range(10)}
            while len(tasks) > 2:
                _, tasks = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            gate.set()
            return Counter(await asyncio.gather(*tasks))

    with FakeEndpoint(held) as full, FakeEndpoint(sequence(chat("free"))) as free:
        assert asyncio.run(main(full, free)) == {"held": 2}
        assert (len(full.requests), len(free.requests)) == (2, 8)


# -- outages ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_retries", [0, 1])
def test_one_dead_server_of_two_costs_no_call(max_retries: int) -> None:
    """100 calls, half of them at home on a port that nobody listens on: every one succeeds, and the
    breaker keeps all but a few requests from it. The control: alone, the dead one fails them."""
    meter, n_dead = Usage(), 0

    async def each(endpoint: Endpoint, i: int) -> str:
        return await ask(endpoint, str(i), meter)

    dead = dead_url()
    with FakeEndpoint(sequence(chat("two"))) as server:
        settings = config(dead, server.base_url, max_retries=max_retries, concurrency=8)
        assert together(settings, 100, each) == ["two"] * 100
        assert len(server.requests) == 100
    n_dead = meter.requests - 100
    assert 0 < n_dead < 30
    assert meter.failures == 0
    with pytest.raises(EndpointError) as caught:
        together(config(dead, max_retries=max_retries), 1, each)
    assert caught.value.kind == "unreachable"


def test_a_server_that_answers_500_is_failed_over_at_once() -> None:
    """No backoff between servers: it is the first one that needs a rest."""
    with FakeEndpoint(sequence(error(500))) as ill, FakeEndpoint(sequence(chat("two"))) as well:
        said = together(config(ill.base_url, well.base_url), 20, lambda e, i: ask(e, str(i)))
    assert said == ["two"] * 20


@pytest.mark.parametrize("breaks_after", [5, 10**9])
def test_a_server_that_comes_back_is_used_again(
    monkeypatch: pytest.MonkeyPatch, breaks_after: int
) -> None:
    """The only server is ill for two seconds, 20 calls may retry three times. They wait for it
    behind the breaker, and only the probes lose a try. The control: without a breaker their tries
    are used up long before."""
    monkeypatch.setattr(admission, "FIRST_PAUSE", 0.2)
    monkeypatch.setattr(admission, "BREAKS_AFTER", breaks_after)
    well_at = time.monotonic() + 2.0

    def script(path: str, body: Any) -> Reply:
        return error(500) if time.monotonic() < well_at else chat("two")

    async def each(endpoint: Endpoint, i: int) -> str:
        try:
            return await ask(endpoint)
        except EndpointError as failure:
            return failure.kind

    with FakeEndpoint(script) as server:
        said = Counter(together(config(server.base_url, max_retries=3), 20, each))
    assert (said["two"] == 20) is (breaks_after == 5), said


def test_what_was_learned_outlives_the_endpoint() -> None:
    """The next slice of a worker begins with the limit that the last one found; a config that is
    another begins anew."""
    learned: Learned = {}

    async def main(settings: EndpointConfig) -> int:
        async with Endpoint(settings, learned) as endpoint:
            with pytest.raises(EndpointError):
                await ask(endpoint)
            (view,) = endpoint.view().values()
            return view.limit

    with FakeEndpoint(sequence(error(429))) as server:
        settings = config(server.base_url, max_retries=0, start_concurrency=100)
        assert [asyncio.run(main(settings)) for _ in range(3)] == [70, 49, 34]
        other = config(server.base_url, max_retries=0, start_concurrency=50)
        assert asyncio.run(main(other)) == 35


# -- what admission must not change ----------------------------------------------------------------


def test_replies_do_not_depend_on_admission() -> None:
    """The server's reply is a function of the request. Whether one at a time, many at once, through
    refusals or over two servers of which one dies: the same requests get the same replies."""

    def answer(path: str, body: Any) -> Reply:
        return chat(hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest())

    draw, lock = random.Random(5), threading.Lock()

    def moody(path: str, body: Any) -> Reply:
        with lock:
            chance = draw.random()
        return error(429, headers={"Retry-After": "0"}) if chance < 0.3 else answer(path, body)

    async def each(endpoint: Endpoint, i: int) -> str:
        balancer.trajectory.set(str(i))
        said = ""
        for step in range(3):
            messages = [{"role": "user", "content": f"{i} {step} {said}"}]
            said = (await endpoint.chat(messages, GREEDY, seed=i * 10 + step)).text
        return said

    with FakeEndpoint(answer) as calm, FakeEndpoint(moody) as other:
        plain = together(config(calm.base_url, concurrency=1), 30, each)
        urls = calm.base_url, other.base_url, dead_url()
        assert together(config(*urls, max_retries=30), 30, each) == plain
    assert len(set(plain)) == 30


# -- preflight and config --------------------------------------------------------------------------


def test_check_passes_while_one_server_answers_and_refuses_a_wrong_model_anywhere() -> None:
    script = sequence(chat("no"))

    def check(*urls: str) -> Any:
        async def main() -> tuple[str, ...]:
            async with Endpoint(config(*urls)) as endpoint:
                return await endpoint.check()

        return asyncio.run(main())

    with (
        FakeEndpoint(script, models=models("fake", "a")) as good,
        FakeEndpoint(script, models=models("b", "fake")) as too,
        FakeEndpoint(script, models=models("other")) as wrong,
    ):
        assert check(good.base_url, too.base_url) == ("fake",)
        assert check(dead_url(), good.base_url) == ("fake", "a")
        with pytest.raises(EndpointError, match="does not have the model"):
            check(good.base_url, wrong.base_url)
        with pytest.raises(EndpointError, match="cannot be reached"):
            check(dead_url(), dead_url())


def test_several_servers_are_a_list_or_a_string_with_commas() -> None:
    listed = EndpointConfig(base_url=["http://a/v1/", "http://b/v1"], model="m")  # type: ignore[arg-type]
    assert listed.base_url == "http://a/v1,http://b/v1"
    assert listed == EndpointConfig(base_url="http://a/v1, http://b/v1", model="m")
    assert listed.base_urls == ("http://a/v1", "http://b/v1")
    assert EndpointConfig.model_validate(json.loads(listed.model_dump_json())) == listed
    for bad in ("http://a/v1,http://a/v1/", "http://a/v1,", "http://a/v1,ftp://b", []):
        with pytest.raises(ValueError, match="base_url"):
            EndpointConfig(base_url=bad, model="m")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="several servers"):
        _ = listed.root_url


def test_tokenize_of_several_servers_goes_to_their_roots() -> None:
    script = sequence(ok({"tokens": [1]}))
    with FakeEndpoint(script) as one, FakeEndpoint(script) as other:

        async def main() -> None:
            async with Endpoint(config(one.base_url, other.base_url)) as endpoint:
                for i in range(20):
                    balancer.trajectory.set(str(i))
                    assert await endpoint.tokenize("x") == [1]

        asyncio.run(main())
    for server in (one, other):
        assert {r.path for r in server.requests} == {"/tokenize"}
