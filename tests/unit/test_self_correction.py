"""Self-correction, traced: what the policy is shown at each try (method.md 5.1, 9.1 no. 4).

A scripted policy speaks nano's tokens through nano's chat template, and a real sandbox runs its
code. Each of the release's four defects is asserted to be absent from `shared.episode` and, on the
same script, to be present in the release's own loop (tests/released_correction.py): a test that
could not see the defect would fail there.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from rl.render import Renderer
from shared.endpoints import Sampling
from shared.episode import Correction, Episode, EpisodeSettings, run_episode
from shared.policy import Finish, Generated
from shared.sandbox import Sandbox
from shared.sandbox.observation import observe
from shared.segments import SAMPLED, Kind
from shared.trajectory import End, Outcome
from tests.released_correction import Released

WEIGHTS = Path(__file__).parents[2] / "shared" / "nano" / "weights"
HEADER = "<|im_start|>assistant\n<think>\n\n</think>\n\n"
PROBLEM = "What is 17 * 23?"


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    with Sandbox(zygotes=1) as opened:
        yield opened


@lru_cache
def renderer() -> Renderer:
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(WEIGHTS)
    return Renderer(tokenizer, "compact")


def encode(text: str) -> list[int]:
    ids: list[int] = renderer().tokenizer.encode(text, add_special_tokens=False)
    return ids


def decode(ids: Sequence[int]) -> str:
    return renderer().decode(ids)


def act(code: str) -> str:
    return f"\n```python\n{code}\n```"


class Policy:
    """Writes its turns one after the other; of each, the next try where it is asked again.

    What is asked for is read off the observations in the context, so any loop can ask.
    """

    def __init__(self, *turns: tuple[str, ...]) -> None:
        self.turns, self.asked = turns, [0 for _ in turns]

    def __call__(self, response: str) -> str:
        """From `response` to the next fence, or to the end of the turn."""
        done = min(response.count("```output\n"), len(self.turns) - 1)
        begun = response.rsplit("\n```\n", 1)[-1] if "```output\n" in response else response
        tries = self.turns[done]
        whole = tries[min(self.asked[done], len(tries) - 1)]
        rest = whole[len(begun) :] if whole.startswith(begun) else whole
        head, fence, _ = rest.partition("```")
        if rest.startswith("python\n"):
            self.asked[done] += 1
        return head + fence


@dataclass
class Engine:
    """The policy behind token ids; remembers what it was shown."""

    policy: Policy
    contexts: list[tuple[int, ...]] = field(default_factory=list)
    seeds: list[int] = field(default_factory=list)
    version: int = 0

    async def generate(
        self, ids: Sequence[int], sampling: Sampling, *, seed: int, key: str
    ) -> Generated:
        self.contexts.append(tuple(ids))
        self.seeds.append(seed)
        prompt = len(renderer().prompt(PROBLEM).ids)
        said = self.policy(decode(ids[prompt:]))
        made = encode(said)
        finish: Finish = "stop" if said.endswith("```") else "eos"
        made += [renderer().eos] if finish == "eos" else []
        return Generated(tuple(made), tuple(-0.5 for _ in made), finish, 0)

    async def release(self, key: str) -> None:
        pass


def ours(
    sandbox: Sandbox, policy: Policy, correction: Correction, calls: int = 5
) -> tuple[Episode, Engine]:
    engine = Engine(policy)
    settings = EpisodeSettings(
        tokens=600, context=900, calls=calls, correction=correction, tool_timeout=5
    )
    episode = asyncio.run(
        run_episode(engine, renderer(), sandbox, PROBLEM, settings, seed=3, key="k")
    )
    return episode, engine


def theirs(sandbox: Sandbox, policy: Policy, *, l_suf: int, rounds: int = 10) -> Released:
    prompt = decode(renderer().prompt(PROBLEM).ids)
    assert prompt.endswith(HEADER)

    def say(context: str) -> str:
        # What stands before the response may have lost the header; the policy answers what follows.
        return policy(context.removeprefix(prompt).removeprefix(prompt.removesuffix(HEADER)))

    def run(code: str) -> tuple[bool, str]:
        result = sandbox.run(code, seed=1, timeout=5)
        return result.outcome is Outcome.OK, observe(result)

    released = Released(prompt, HEADER, say, run, encode, decode, l_suf=l_suf, rounds=rounds)
    released.solve()
    return released


FIRST = "Multiply." + act("print(17 * 23)")
BROKEN, FIXED = "Check it." + act("print(391 // zero)"), "Check it." + act("print(391 // 23)")
ANSWER = "So \\boxed{391}."


def script() -> Policy:
    """A call that succeeds, one that fails once, the answer."""
    return Policy((FIRST,), (BROKEN, FIXED), (ANSWER,))


@pytest.mark.parametrize("strategy", ["action", "suffix", "replan"])
@pytest.mark.parametrize("l_suf", [3, 500])
def test_the_prompt_with_its_header_is_shown_at_every_try(
    sandbox: Sandbox, strategy: str, l_suf: int
) -> None:
    """Defect 1: after the first backtrack the release goes on without `<|im_start|>assistant`."""
    correction = Correction(strategy, l_suf=l_suf)  # type: ignore[arg-type]
    episode, engine = ours(sandbox, script(), correction)
    prompt = renderer().prompt(PROBLEM).ids
    assert episode.n_retries == 1
    assert episode.answer == "391"
    assert all(context[: len(prompt)] == prompt for context in engine.contexts)
    assert decode(prompt).endswith(HEADER)

    released = theirs(sandbox, script(), l_suf=3)
    assert released.contexts[0].endswith(HEADER)
    assert HEADER not in released.contexts[-1]


def test_the_cut_stays_inside_the_thought(sandbox: Sandbox) -> None:
    """Defect 2: "Check it." has fewer tokens than L_suf; the release drops what it takes from the
    observation before it, and more."""
    l_suf = len(encode("Check it.")) + 6
    episode, engine = ours(sandbox, script(), Correction("suffix", l_suf=l_suf))
    before = [s.ids for s in episode.segments[: kinds(episode).index("o") + 1]]
    committed = tuple(i for ids in before for i in ids)
    retried = [c for c in engine.contexts if c == committed]
    assert len(retried) == 2, "the thought is begun twice, right after the whole observation"
    [gone] = episode.discarded
    assert decode([i for s in gone.segments for i in s.ids]) == BROKEN
    assert "```output\n391\n```\n" in episode.text

    released = theirs(sandbox, script(), l_suf=l_suf)
    observed = FIRST + "\n```output\n391\n```\n"
    assert any(observed in context for context in released.contexts)
    assert observed not in released.contexts[-1], "control: the observation was cut"


def kinds(episode: Episode) -> str:
    return "".join(segment.kind.value[0] for segment in episode.segments)


def test_what_is_masked_is_what_was_injected(sandbox: Sandbox) -> None:
    """Defect 3: the release notes where an observation stands and then drops tokens before it.

    Ours: the tokens that carry loss, joined, are what the policy wrote; the rest is not.
    """
    wrote = FIRST + FIXED + ANSWER
    episode, _ = ours(sandbox, script(), Correction("suffix", l_suf=200))
    sampled = [i for s in episode.segments if s.kind in SAMPLED for i in s.ids]
    assert decode(sampled) == wrote + "<|im_end|>"
    injected = [i for s in episode.segments if s.kind is Kind.OBSERVATION for i in s.ids]
    assert decode(injected) == "\n```output\n391\n```\n\n```output\n17\n```\n"

    released = theirs(sandbox, script(), l_suf=12)
    ids = encode(released.response)
    masked = [i for n, i in enumerate(ids) if any(a <= n < b for a, b in released.masked)]
    assert decode(masked) != "\n```output\n391\n```\n"
    assert "Check it." in decode(masked), "control: text of the policy is taken for an observation"


def test_tries_are_no_rounds(sandbox: Sandbox) -> None:
    """Defect 4: with two rounds, the release spends both on one call and never answers.

    Ours: two calls may stand, however many tries they took, and both are counted apart.
    """

    def stubborn() -> Policy:
        return Policy(
            ("A." + act("nope"), "A." + act("nope()"), "A." + act("print(1)")),
            ("B." + act("nope"), "B." + act("print(2)")),
            (ANSWER,),
        )

    episode, _ = ours(sandbox, stubborn(), Correction("action", n_corr=4), calls=2)
    assert [call.code for call in episode.calls] == ["print(1)", "print(2)"]
    assert episode.n_retries == 3
    assert [len(step.discarded) for step in episode.steps] == [2, 1, 0]
    assert episode.end is End.ANSWERED

    released = theirs(sandbox, stubborn(), l_suf=1, rounds=2)
    assert released.executed == ["nope", "nope()"]
    assert "boxed" not in released.response


def test_every_try_is_drawn_anew(sandbox: Sandbox) -> None:
    """9.1 no. 4: a fresh seed for each; with the seed of the first try a deterministic engine would
    only repeat it."""
    policy = Policy(("A." + act("nope"),) * 4 + ("A." + act("print(1)"),), (ANSWER,))
    episode, engine = ours(sandbox, policy, Correction("action", n_corr=4))
    assert episode.n_retries == 4
    assert len(set(engine.seeds)) == len(engine.seeds)
    again = ours(
        sandbox,
        Policy(("A." + act("nope"),) * 4 + ("A." + act("print(1)"),), (ANSWER,)),
        Correction("action", n_corr=4),
    )
    assert again[1].seeds == engine.seeds


def test_the_last_error_stays_in_context_and_the_policy_goes_on(sandbox: Sandbox) -> None:
    """9.2 no. 9. What was taken back is not in the text, and is stored beside its step."""
    policy = Policy(("A." + act("first"), "A." + act("second"), "A." + act("third")), (ANSWER,))
    episode, engine = ours(sandbox, policy, Correction("suffix", l_suf=1, n_corr=2))
    assert [call.code for call in episode.calls] == ["third"]
    assert [call.code for call in episode.steps[0].discarded] == ["first", "second"]
    assert "NameError: name 'third' is not defined" in decode(engine.contexts[-1])
    assert "first" not in decode(engine.contexts[-1])
    assert episode.end is End.ANSWERED


def test_tokens_are_those_of_the_policy_not_characters(sandbox: Sandbox) -> None:
    """L_suf counts ids: the kept part of the thought is a prefix of the ids that were sampled."""
    thought = encode("Check it.")
    assert 1 < len(thought) < len("Check it.")
    _, engine = ours(sandbox, script(), Correction("suffix", l_suf=1))
    shown = [c for c in engine.contexts if decode(c).endswith(decode(thought[:-1]))]
    assert shown
    assert list(shown[0][-len(thought) + 1 :]) == thought[:-1]
