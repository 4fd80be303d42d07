"""One policy behind three doors: run here, served by token ids, served by texts.

nano's server keeps its promise of determinism, so what the episodes come to can be compared.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rl.evaluation import benchmarks
from rl.evaluation.config import EvaluationConfig
from rl.evaluation.engines import open_policy
from rl.evaluation.plan import Asked, plan
from shared import seeds
from shared.endpoints import Sampling
from shared.episode import Episode, run_episode
from shared.errors import EndpointError, InputError
from shared.nano.launch import start_server, stop_server
from shared.sandbox import Sandbox
from shared.segments import Kind

WEIGHTS = Path(__file__).parents[2] / "shared" / "nano" / "weights"
N = 6


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    server = start_server(WEIGHTS, log=tmp_path_factory.mktemp("nano") / "log")
    yield server.url
    stop_server(server.pid)


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    with Sandbox(zygotes=1) as opened:
        yield opened


def asked(url: str, **more: Any) -> EvaluationConfig:
    settings = ("correction.strategy=suffix", "policy.temperature=1.0")
    given = Asked(base_url=url, served_model="nano", tokenizer="nano", settings=settings, **more)
    [planned] = plan("e", given, [benchmarks.find("nano")], limit=N)
    return planned.config


def episodes(config: EvaluationConfig, sandbox: Sandbox) -> list[Episode]:
    problems = benchmarks.load(benchmarks.find("nano"), N).problems

    async def all_of_them() -> list[Episode]:
        async with open_policy(config) as (engine, codec):
            return await asyncio.gather(
                *(
                    run_episode(engine, codec, sandbox, p.text, config.episode(),
                                seed=seeds.derive(0, p.key), key=p.key)
                    for p in problems
                )
            )  # fmt: skip

    return asyncio.run(all_of_them())


def test_by_ids_and_by_texts_the_policy_solves_alike(url: str, sandbox: Sandbox) -> None:
    """Different draws (a text is continued in one go), the same kind of episodes: the right format,
    calls that run, ids that are their text. By ids, twice the same."""
    by_ids, again = (episodes(asked(url), sandbox) for _ in range(2))
    assert [e.segments for e in by_ids] == [e.segments for e in again]
    by_text = episodes(asked(url, text=True), sandbox)
    for made in (by_ids, by_text):
        assert sum(e.answer is not None for e in made) >= N - 1
        assert sum(bool(e.calls) for e in made) >= N - 1
        for episode in made:
            kinds = [segment.kind for segment in episode.segments]
            assert kinds[0] is Kind.PROMPT
            assert kinds.count(Kind.CODE) == len(episode.calls)


def test_a_text_is_asked_for_once_and_cut_at_every_fence(url: str) -> None:
    """The second reply is what the first one went on with: no request of its own, and what the
    policy would have said after its code is not waited for."""
    config = asked(url, text=True)

    async def two_replies() -> tuple[str, str, int]:
        async with open_policy(config) as (engine, codec):
            requests = []
            ask = engine._ask  # type: ignore[attr-defined]

            async def counted(*arguments: Any) -> Any:
                requests.append(arguments)
                return await ask(*arguments)

            engine._ask = counted  # type: ignore[attr-defined]
            prompt = codec.prompt("What is 12 times 34 plus 5?").ids
            sampling = Sampling(temperature=0, max_tokens=200, stop=("```",), include_stop=True)
            first = await engine.generate(prompt, sampling, seed=1, key="a")
            ids = [*prompt, *first.ids]
            second = await engine.generate(ids, sampling, seed=2, key="a")
            assert (first.finish, second.finish) == ("stop", "stop")
            await engine.generate([*ids, *prompt[:3]], sampling, seed=3, key="a")  # another context
            return codec.decode(first.ids), codec.decode(second.ids), len(requests)

    first, second, n = asyncio.run(two_replies())
    assert first.endswith("```")
    assert first.count("```") == 1
    assert second.startswith("python\n")
    assert second.endswith("```")
    assert n == 2, "one for both replies, one for the other context"


def test_weights_stay_for_the_next_slice_and_go_for_others() -> None:
    """A worker evaluates one policy after the other for weeks."""

    async def opened(slots: int) -> Any:
        settings = (f"policy.slots={slots}",)
        [planned] = plan(
            "e", Asked(model="nano", settings=settings), [benchmarks.find("nano")], limit=1
        )
        async with open_policy(planned.config) as (engine, _):
            return engine

    first, again, other = (asyncio.run(opened(slots)) for slots in (2, 2, 3))
    assert again is first
    assert other is not first
    assert not first._thread.is_alive()
    assert other._thread.is_alive()


def test_a_server_or_tokenizer_that_is_not_there(url: str) -> None:
    async def opened(config: EvaluationConfig) -> None:
        async with open_policy(config):
            pass

    with pytest.raises(EndpointError):
        asyncio.run(opened(asked("http://127.0.0.1:9/v1")))
    missing = Asked(base_url=url, served_model="nano", tokenizer="nobody/nothing")
    [planned] = plan("e", missing, [benchmarks.find("nano")], limit=1)
    with pytest.raises(InputError, match="Cannot load the tokenizer"):
        asyncio.run(opened(planned.config))
