"""A policy that knows texts only, through the same loop of an episode."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from shared.endpoints import Endpoint, EndpointConfig, Sampling
from shared.episode import Correction, Episode, EpisodeSettings, run_episode
from shared.policy import Generated
from shared.segments import Kind
from shared.text_policy import EOS, TextCodec, TextEngine
from shared.trajectory import End, Outcome
from tests.fake_endpoint import FakeEndpoint, Reply, completion
from tests.scripted import ScriptedSandbox, ran

CODEC = TextCodec("compact")
ACTION = "We compute é:\n```python\nprint(6 * 7)\n```"


def speaks(*turns: str) -> Any:
    """A server that goes on with the text it is sent; it knows no stop strings."""

    def script(path: str, body: Any) -> Reply:
        assert "stop" not in body
        assert "include_stop_str_in_output" not in body
        said = body["prompt"].partition("Q?\n")[2]
        done = said.count("```output\n")
        begun = said[said.rindex("```output\n") :].partition("\n```\n")[2] if done else said
        whole = turns[min(done, len(turns) - 1)]
        return completion(whole[len(begun) :] if whole.startswith(begun) else whole)

    return script


def run(script: Any, settings: EpisodeSettings, sandbox: ScriptedSandbox) -> Episode:
    async def one(url: str) -> Episode:
        async with Endpoint(EndpointConfig(base_url=url, model="fake")) as endpoint:
            engine = TextEngine(endpoint)
            return await run_episode(engine, CODEC, sandbox, "Q?", settings, seed=1, key="k")

    with FakeEndpoint(script) as fake:
        return asyncio.run(one(fake.base_url))


def test_what_the_server_says_beyond_a_fence_is_cut_off() -> None:
    """It invents an output, as servers without stop strings do; ours is the real one."""
    invented = ACTION + "\n```output\n41\n```\nSo \\boxed{41}."
    settings = EpisodeSettings(tokens=5000, context=9000)
    sandbox = ScriptedSandbox(lambda code, seed: ran(Outcome.OK, "42\n"))
    done = run(speaks(invented, "So \\boxed{42}."), settings, sandbox)
    assert (done.end, done.answer) == (End.ANSWERED, "42")
    assert done.text == ACTION + "\n```output\n42\n```\nSo \\boxed{42}."
    assert "41" not in done.text
    assert [s.kind for s in done.segments][-1] is Kind.EOS
    assert done.calls[0].code == "print(6 * 7)"


def test_a_failed_call_is_taken_back_by_characters() -> None:
    settings = EpisodeSettings(
        tokens=5000, context=9000, correction=Correction("suffix", l_suf=4, n_corr=1)
    )
    sandbox = ScriptedSandbox(lambda code, seed: ran(Outcome.MODEL_ERROR, "", "no"))
    done = run(speaks(ACTION, "So \\boxed{42}."), settings, sandbox)
    assert done.n_retries == 1
    assert done.n_generated > len(ACTION)


@pytest.mark.parametrize(
    ("said", "finish", "limit", "expected"),
    [
        ("abc", "stop", 99, ("abc", "eos")),
        ("abc", "length", 99, ("abc", "length")),
        ("abcdef", "stop", 4, ("abcd", "length")),
        ("a```b", "stop", 99, ("a```", "stop")),
        ("", "stop", 99, ("", "eos")),
        ("", "length", 99, ("", "eos")),
    ],
)
def test_how_a_reply_ended(said: str, finish: str, limit: int, expected: tuple[str, str]) -> None:
    async def one(url: str) -> Generated:
        async with Endpoint(EndpointConfig(base_url=url, model="fake")) as endpoint:
            sampling = Sampling(max_tokens=limit, stop=("```",), include_stop=True)
            return await TextEngine(endpoint).generate((65,), sampling, seed=0, key="k")

    with FakeEndpoint(lambda path, body: completion(said, finish_reason=finish)) as fake:
        made = asyncio.run(one(fake.base_url))
    assert (CODEC.decode(made.ids), made.finish) == expected
    assert (EOS in made.ids) is (made.finish == "eos")
    assert made.logprobs is None
