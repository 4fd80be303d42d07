"""The episode loop: what was sampled is what is kept, and every budget is the episode's own.

The policy, its tokens and the sandbox are scripted, so that each claim is about the loop alone.
Defects of the authors' release (method.md 4.6, 5.1) are reproduced beside it as controls.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared import seeds
from shared.endpoints import Sampling
from shared.episode import (
    CALLS_USED_UP,
    Correction,
    Episode,
    EpisodeSettings,
    StepAttempt,
    run_episode,
    run_step,
)
from shared.errors import ConfigError, EndpointError
from shared.fences import observation
from shared.policy import Generated
from shared.sandbox.result import RunResult
from shared.segments import SAMPLED, Kind, Segment
from shared.trajectory import End, Outcome, Problem
from tests.fuzz import fuzz
from tests.scripted import ScriptedSandbox, ran
from tests.scripted_policy import HEADER, ByteCodec, Script, ScriptedEngine

FREE = EpisodeSettings(tokens=10_000, context=10_000, infrastructure_wait=0.0)
# Tokens that end a fence late, or begin it early, as real vocabularies have them.
WORDS = ("```", "```\n", "\n```", "```python\n", ":\n```", "``", "\n\n")


def act(code: str, rail: str = "```") -> str:
    return f"\n{rail}python\n{code}\n{rail}"


def one_by_one(*turns: str) -> Script:
    """Says turn after turn, each after the observation of the one before it."""

    def script(said: str, seed: int) -> str:
        done = said.count("```output\n")
        begun = said
        if done:
            begun = said[said.rindex("```output\n") :].partition("\n```\n")[2]
        whole = turns[min(done, len(turns) - 1)]
        return whole[len(begun) :] if whole.startswith(begun) else whole

    return script


def run(
    script: Script,
    settings: EpisodeSettings = FREE,
    *,
    codec: ByteCodec | None = None,
    sandbox: ScriptedSandbox | None = None,
    seed: int = 1,
) -> tuple[Episode, ScriptedEngine]:
    codec = codec or ByteCodec(*WORDS)
    engine = ScriptedEngine(codec, script)
    sandbox = sandbox or ScriptedSandbox()
    episode = asyncio.run(run_episode(engine, codec, sandbox, "Q", settings, seed=seed, key="one"))
    assert engine.released == ["one"]
    return episode, engine


def ids_of(segments: Sequence[Segment], kinds: frozenset[Kind] = frozenset(Kind)) -> list[int]:
    return [i for segment in segments if segment.kind in kinds for i in segment.ids]


def kinds(episode: Episode) -> str:
    return " ".join(segment.kind.value[0] for segment in episode.segments)


def fails(*codes: str) -> ScriptedSandbox:
    """These codes fail; every other one prints itself."""
    return ScriptedSandbox(
        lambda code, seed: (
            ran(Outcome.MODEL_ERROR, stderr=f"Error in {code}")
            if code in codes
            else ran(Outcome.OK, f"ran {code}\n")
        )
    )


# ---- the format --------------------------------------------------------------------------------


def test_one_call_is_two_engine_calls_and_the_stop_string_stays_in_the_ids() -> None:
    episode, engine = run(one_by_one("So:" + act("print(1)"), "It is \\boxed{1}."))
    texts = [engine.codec.decode(call.made.ids) for call in engine.calls]
    assert texts == ["So:\n```", "python\nprint(1)\n```", "It is \\boxed{1}.<eos>"]
    assert kinds(episode) == "p t c o t e"
    assert [engine.codec.decode(s.ids) for s in episode.segments[1:4]] == [
        "So", ":\n```python\nprint(1)\n```", observation("ran print(1)"),
    ]  # fmt: skip
    assert (episode.end, episode.answer, episode.void_turns) == (End.ANSWERED, "1", 0)
    assert all(call.sampling.stop == ("```",) for call in engine.calls)
    assert all(call.sampling.include_stop for call in engine.calls)


pieces = st.lists(
    st.one_of(
        st.sampled_from(
            ["So:", "\n", "```latex\nx\n```\n", "# this is python\n", "é", "a `b` c\n", "🙂",
             act("1"), act("# python\n2"), act("s = '''\n'''"), act("x", "````"), act("y", "~~~"),
             "```py\n3\n``` \n", "\\boxed{4}", "```output\n5\n```\n", "```python\nopen"]
        ),
        st.text(alphabet="`~ \npython", max_size=8),
    ),
    max_size=6,
).map("".join)  # fmt: skip


@fuzz
@given(turns=st.lists(pieces, min_size=1, max_size=4), strategy=st.sampled_from(
    ["none", "action", "suffix", "replan"]), l_suf=st.integers(0, 9), data=st.data())  # fmt: skip
def test_the_ids_are_what_was_sampled_and_injected_in_that_order(
    turns: list[str], strategy: str, l_suf: int, data: st.DataObject
) -> None:
    """Token provenance, against the engine's own log. Whatever the policy writes: fences of other
    kinds and lengths, tokens that reach over a fence, half characters, blocks left open."""
    broken = data.draw(st.sets(st.sampled_from(["1", "# python\n2", "x", "y", "3"])))
    settings = replace(
        FREE,
        tokens=data.draw(st.integers(1, 400)),
        calls=data.draw(st.integers(0, 3)),
        correction=Correction(strategy, l_suf=l_suf, n_corr=2, n_corr_total=3),  # type: ignore[arg-type]
    )
    sandbox = fails(*broken)
    episode, engine = run(one_by_one(*turns), settings, sandbox=sandbox)
    codec = engine.codec

    # 1. Every sampled token that stands is in the log with its logprob, in order.
    logged = {}
    for call in engine.calls:
        at = len(call.ids)
        for n, (token, logprob) in enumerate(zip(call.made.ids, call.made.logprobs, strict=True)):
            logged.setdefault(at + n, set()).add((token, logprob))
    place, whole = 0, ids_of(episode.segments)
    for segment in episode.segments:
        for n, token in enumerate(segment.ids):
            if segment.kind in SAMPLED:
                assert (token, segment.logprobs[n]) in logged[place]
            place += 1
        assert (segment.logprobs is not None) == (segment.kind in SAMPLED)
    # 2. Each call of the engine saw exactly what stood then; the last of them what stands now.
    if strategy == "none" and engine.calls:
        for call in engine.calls:
            assert list(call.ids) == whole[: len(call.ids)]
    # 3. What is injected is the observation of the call before it, and nothing else.
    shown = [s for s in episode.segments if s.kind is Kind.OBSERVATION]
    texts = [c.observation for c in episode.calls] + [CALLS_USED_UP]
    assert [s.ids for s in shown] == [codec.observation(t).ids for t in texts][: len(shown)]
    # 4. A CODE segment for each call, its block in its text; and every token is counted.
    codes = [codec.decode(s.ids) for s in episode.segments if s.kind is Kind.CODE]
    assert len(codes) == len(episode.calls) <= settings.calls
    assert all(c.code in text for c, text in zip(episode.calls, codes, strict=True))
    assert episode.n_generated == sum(len(call.made.ids) for call in engine.calls)
    assert episode.n_tokens <= settings.tokens
    assert all(call.sampling.max_tokens >= 1 for call in engine.calls)
    # 5. The texts agree with the ids.
    assert "�" in episode.text or episode.text == codec.decode(
        ids_of(episode.segments[1:], frozenset(Kind) - {Kind.EOS})
    )


def test_the_masks_of_the_release_would_train_on_observations() -> None:
    """method.md B1: the release keeps offsets in the text since the last stop and applies them to
    the whole response. Ours come from the kinds: the sampled tokens, all of them, no others."""
    episode, engine = run(one_by_one("A long thought about it." + act("1"), "So \\boxed{1}."))
    response = ids_of(episode.segments[1:])
    truth = [s.kind in SAMPLED for s in episode.segments[1:] for _ in s.ids]
    assert sum(truth) == sum(len(call.made.ids) for call in engine.calls)
    [shown] = [s for s in episode.segments if s.kind is Kind.OBSERVATION]
    last = len(engine.calls[1].made.ids)  # the segment after the opening fence
    release = [not last <= i < last + len(shown.ids) for i in range(len(response))]
    masked = [i for i, m in zip(response, truth, strict=True) if not m]
    assert masked == list(shown.ids)
    assert [i for i, m in zip(response, release, strict=True) if not m] != list(shown.ids)


@pytest.mark.parametrize(
    ("said", "code"),
    [
        ("a" + act("print(1)"), "print(1)"),
        ("a\n```py\nprint(1)\n```", "print(1)"),
        ("a" + act("# this is python\nx = 1"), "# this is python\nx = 1"),
        ("a" + act("s = '```'"), "s = '```'"),
        ("```latex\nx\n```\nthen" + act("2"), "2"),
        (act("3", "````") + "\nand so on", "3"),
        (act("4", "~~~") + "\nand so on\n```latex\n", "4"),
        ("```\npython\n```\n and ```python inline``` " + act("5"), "5"),
    ],
)
def test_only_a_closed_python_block_is_an_action(said: str, code: str) -> None:
    sandbox = ScriptedSandbox()
    episode, _ = run(one_by_one(said, "\\boxed{0}"), sandbox=sandbox)
    assert [c for c, _ in sandbox.runs] == [code]
    assert episode.calls[0].code == code
    assert episode.end is End.ANSWERED


def test_what_was_sampled_behind_a_late_fence_is_cut_off() -> None:
    """The engine stops at three backticks; a longer fence, or one of tildes, closes unseen."""
    episode, engine = run(one_by_one(act("1", "~~~") + "\nThe output is 7. \\boxed{7}", "End."))
    said = "".join(engine.codec.decode(s.ids) for s in episode.segments if s.kind in SAMPLED)
    assert said == act("1", "~~~") + "End.<eos>"
    assert episode.answer is None
    assert episode.n_generated > len(ids_of(episode.segments, SAMPLED))


@pytest.mark.parametrize(
    ("said", "end", "answer"),
    [
        ("It is \\boxed{1}.", End.ANSWERED, "1"),
        ("\\boxed{1} no, \\boxed{2}.", End.ANSWERED, "2"),
        ("I do not know.", End.GAVE_UP, None),
        ("", End.GAVE_UP, None),
        ("```latex\n\\boxed{3}\n```\n", End.ANSWERED, "3"),
        ("\n```output\n42\n```\nSo \\boxed{42}.", End.OWN_BLOCK, None),
        ("\\boxed{1}\n```python\nprint(1)", End.OWN_BLOCK, "1"),
        ("\n```python\nprint('\\boxed{9}')", End.OWN_BLOCK, None),
    ],
)
def test_how_an_episode_without_a_call_ends(said: str, end: End, answer: str | None) -> None:
    sandbox = ScriptedSandbox()
    episode, _ = run(one_by_one(said), sandbox=sandbox)
    assert (episode.end, episode.answer) == (end, answer)
    assert episode.void_turns == (answer is None)
    assert not sandbox.runs


def test_a_thinking_policy_answers_after_its_thinking() -> None:
    thinking = replace(FREE, thinking=True)
    for header, said in (("", "<think>\nHm"), ("<think>\n", "Hm"), ("<think>", "\nHm")):
        codec = ByteCodec(*WORDS, header=header)
        early, _ = run(one_by_one(said + " \\boxed{1}"), thinking, codec=codec)
        assert (early.end, early.answer, early.void_turns) == (End.GAVE_UP, None, 1)
        turns = (said + act("2"), "</think>\n\\boxed{2}")
        late, _ = run(one_by_one(*turns), thinking, codec=codec)
        assert (late.end, late.answer, late.void_turns) == (End.ANSWERED, "2", 0)
        assert late.text.startswith("<think>\nHm\n```python")
        assert late.steps[0].thought == "Hm"


def test_an_episode_is_a_trajectory_whose_steps_are_its_text() -> None:
    turns = ("First." + act("1"), "Then." + act("2"), "Last \\boxed{2}.")
    settings = replace(FREE, correction=Correction("action", n_corr=1))
    episode, _ = run(one_by_one(*turns), settings, sandbox=fails("2"))
    problem = Problem("Q", "2")
    made = episode.trajectory(problem, False, {"model": "scripted"})
    assert [step.thought for step in made.steps] == ["First.", "Then.", "Last \\boxed{2}."]
    joined = "".join(
        s.thought + (act(s.call.code) + observation(s.call.observation) if s.call else "")
        for s in made.steps
    )
    assert joined == made.text
    assert [len(step.discarded) for step in made.steps] == [0, 1, 0]
    assert (made.n_calls, made.n_failed_calls, made.problem_key) == (2, 1, problem.key)
    assert made.n_tokens == len(ids_of(episode.segments[1:]))
    assert made.meta["model"] == "scripted"
    assert made.meta["n_retries"] == 1


# ---- budgets -----------------------------------------------------------------------------------


def test_a_call_too_many_is_told_once_and_then_refused() -> None:
    turns = ("a" + act("1"), "b" + act("2"), "c" + act("3") + "\n\nd \\boxed{1}")
    sandbox = ScriptedSandbox()
    episode, engine = run(one_by_one(*turns), replace(FREE, calls=1), sandbox=sandbox)
    assert [code for code, _ in sandbox.runs] == ["1"]
    assert kinds(episode) == "p t c o t o t e"
    assert episode.text.count(CALLS_USED_UP) == 1
    assert "".join(engine.codec.decode(s.ids) for s in episode.segments[6:]) == turns[2] + "<eos>"
    assert all(call.sampling.stop for call in engine.calls)
    assert (episode.end, episode.answer) == (End.ANSWERED, "1")
    assert (
        "".join(s.thought for s in episode.steps[1:]) == episode.text.partition("ran 1\n```\n")[2]
    )


def test_as_in_the_release_the_policy_runs_free_and_may_invent_an_output() -> None:
    turns = ("a" + act("1"), "b" + act("2") + "\n```output\n8\n```\nso \\boxed{8}")
    settings = replace(FREE, calls=1, after_calls="free")
    episode, engine = run(one_by_one(*turns), settings)
    assert [bool(call.sampling.stop) for call in engine.calls] == [True, True, False]
    assert kinds(episode) == "p t c o t e"
    assert (episode.end, episode.answer) == (End.OWN_BLOCK, "8")


def test_without_a_tool_the_policy_is_never_stopped() -> None:
    settings = replace(FREE, calls=0, after_calls="free")
    episode, engine = run(one_by_one("a\n```latex\nx\n```\n\\boxed{1}"), settings)
    assert len(engine.calls) == 1
    assert episode.end is End.ANSWERED


def test_calls_are_counted_per_episode() -> None:
    """Episodes out of phase each get all their calls. The control counts as the release does:
    once per engine round in which any of the batch executes (B2)."""
    settings = replace(FREE, calls=3)
    codec = ByteCodec()
    extra = "```latex\nx\n```\n"  # a fence that costs a round: the episodes get out of phase
    scripts = [
        one_by_one(*[extra * n + f"{n}" + act(str(i)) for i in range(3)], "\\boxed{0}")
        for n in range(3)
    ]

    async def all_of_them() -> list[Episode]:
        return await asyncio.gather(*(
            run_episode(ScriptedEngine(codec, s), codec, ScriptedSandbox(), "Q", settings,
                        seed=i, key=str(i))
            for i, s in enumerate(scripts)
        ))  # fmt: skip

    episodes = asyncio.run(all_of_them())
    assert [len(episode.calls) for episode in episodes] == [3, 3, 3]
    rounds = [[i * (2 + 2 * n) + 2 * n + 1 for i in range(3)] for n in range(3)]
    left, got = settings.calls, [0, 0, 0]
    for now in sorted({r for one in rounds for r in one}):
        if left:
            got = [g + (now in one) for g, one in zip(got, rounds, strict=True)]
            left -= 1
    assert sum(got) < 9, "control: with a shared counter someone loses calls"


def test_observations_of_every_length_around_the_budgets() -> None:
    """trainer.md trap 23, test 31: never a call for no tokens, never a row over its budget."""
    turns = ("Go." + act("1"), "\\boxed{1}")
    free, _ = run(one_by_one(*turns))
    for name, extra in (("tokens", 0), ("context", len(free.segments[0].ids))):
        limit = free.n_tokens + extra
        ends, naive = [], []
        for length in range(40):
            sandbox = ScriptedSandbox(lambda code, seed, n=length: ran(Outcome.OK, "x" * n))
            episode, engine = run(
                one_by_one(*turns), replace(FREE, **{name: limit}), sandbox=sandbox
            )
            assert all(call.sampling.max_tokens >= 1 for call in engine.calls)
            assert episode.n_tokens + extra <= limit
            assert len(episode.calls) == 1
            ends.append(episode.end)
            shown = len(engine.codec.observation("x" * length).ids)
            naive.append(limit - extra - len(ids_of(episode.segments[1:3])) - shown)
        assert ends == sorted(ends, key=[End.ANSWERED, End.LENGTH_BUDGET].index)
        assert {End.ANSWERED, End.LENGTH_BUDGET} == set(ends)
        assert min(naive) < 0, "control: without the guard it would have been asked"
        assert 0 in naive


def test_a_prompt_that_fills_the_context_asks_for_nothing() -> None:
    episode, engine = run(one_by_one("a"), replace(FREE, context=2))
    assert not engine.calls
    assert (episode.end, episode.n_turns, episode.n_tokens) == (End.LENGTH_BUDGET, 0, 0)


def test_cut_by_length_the_turn_is_kept_as_it_is() -> None:
    for tokens in range(1, 20):
        episode, _ = run(one_by_one("Go." + act("1")), replace(FREE, tokens=tokens))
        assert episode.n_tokens <= tokens
        if not episode.calls:
            assert (episode.end, episode.n_tokens) == (End.LENGTH_BUDGET, tokens)
            assert kinds(episode) == "p t"


def test_a_setting_below_its_least_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="-1 is less than 0") as caught:
        EpisodeSettings(correction=Correction("suffix", l_suf=-1))
    assert caught.value.where == "correction.l_suf"


# ---- failures ----------------------------------------------------------------------------------


def test_a_failed_call_stands_with_its_error_and_the_episode_goes_on() -> None:
    episode, engine = run(one_by_one("a" + act("1"), "b" + act("2"), "\\boxed{2}"),
                          sandbox=fails("1"))  # fmt: skip
    assert episode.outcomes == (Outcome.MODEL_ERROR, Outcome.OK)
    assert "Error in 1" in engine.codec.decode(engine.calls[2].ids)
    assert episode.end is End.ANSWERED


def test_aborted_at_the_first_failed_call() -> None:
    settings = replace(FREE, abort_at_failure=True)
    episode, engine = run(one_by_one("a" + act("1"), "b"), settings, sandbox=fails("1"))
    assert (episode.end, episode.outcomes) == (End.FAILED_CALL, (Outcome.MODEL_ERROR,))
    assert len(engine.calls) == 2


@pytest.mark.parametrize("down", [1, 2, 3, 9])
def test_a_sandbox_that_fails_is_asked_again_and_never_held_against_the_policy(down: int) -> None:
    left = [down]

    def script(code: str, seed: int) -> RunResult:
        left[0] -= 1
        return ran(Outcome.INFRASTRUCTURE_ERROR) if left[0] >= 0 else ran(Outcome.OK, "fine")

    sandbox = ScriptedSandbox(script)
    settings = replace(FREE, correction=Correction("replan"))
    episode, _ = run(one_by_one("a" + act("1"), "\\boxed{1}"), settings, sandbox=sandbox)
    assert len({seed for _, seed in sandbox.runs}) == 1, "every try is the same run"
    assert not episode.discarded
    if down < 3:
        assert (episode.end, episode.outcomes) == (End.ANSWERED, (Outcome.OK,))
    else:
        assert episode.end is End.INFRASTRUCTURE
        assert episode.outcomes == (Outcome.INFRASTRUCTURE_ERROR,)
        assert kinds(episode) == "p t c"
        assert episode.trajectory(Problem("Q", "1"), False).n_failed_calls == 0


def test_an_engine_that_samples_nothing_or_too_much_is_an_error() -> None:
    class Wrong(ScriptedEngine):
        async def generate(
            self, ids: Sequence[int], sampling: Sampling, *, seed: int, key: str
        ) -> Generated:
            return Generated((1,) * count, (0.0,) * count, "stop", 0)

    codec = ByteCodec()
    for count in (0, 11):
        engine = Wrong(codec, one_by_one("a"))
        with pytest.raises(EndpointError, match=f"sampled {count} tokens"):
            asyncio.run(
                run_episode(engine, codec, ScriptedSandbox(), "Q", replace(FREE, tokens=10),
                            seed=1, key="k")
            )  # fmt: skip
        assert engine.released == ["k"]


# ---- self-correction ---------------------------------------------------------------------------


class Coder:
    """Thinks "Step k: we compute.", writes the next of its codes, and answers after the last."""

    def __init__(self, *codes: str) -> None:
        self.left = list(codes)

    def __call__(self, said: str, seed: int) -> str:
        last = said.rsplit("\n```\n", 1)[-1]
        if last.endswith("```"):
            return f"python\n{self.left.pop(0)}\n```"
        thought = f"Step {said.count('ran ')}: we compute."
        assert thought.startswith(last)
        return thought[len(last) :] + "\n```" if self.left else "\\boxed{1}"


THOUGHT = "Step 1: we compute."
HEAD = "Q<assistant>"
FIRST = "Step 0: we compute." + act("good") + observation("ran good")


def corrected(
    *codes: str, header: str = "", settings: EpisodeSettings = FREE, **correction: object
) -> tuple[Episode, list[str], ScriptedEngine]:
    """The episode, and for every turn that began (not at an opened fence) what the engine saw."""
    settings = replace(settings, correction=Correction(**correction))  # type: ignore[arg-type]
    codec = ByteCodec(header=header)
    sandbox = fails("bad 1", "bad 2", "bad 3", "bad 4")
    episode, engine = run(Coder("good", *codes), settings, codec=codec, sandbox=sandbox)
    texts = [codec.decode(call.ids) for call in engine.calls]
    return episode, [text for text in texts if not text.endswith("```")], engine


@pytest.mark.parametrize(
    ("strategy", "l_suf", "kept"),
    [
        ("action", 5, THOUGHT),
        ("suffix", 5, THOUGHT[:-5]),
        ("suffix", 0, THOUGHT),
        ("suffix", 19, ""),
        ("suffix", 100, ""),  # clamped to r^t
        ("replan", 5, ""),
    ],
)
def test_a_try_begins_where_the_strategy_says(strategy: str, l_suf: int, kept: str) -> None:
    episode, asked, engine = corrected("bad 1", "good 2", strategy=strategy, l_suf=l_suf)
    assert asked == [
        HEAD, HEAD + FIRST, HEAD + FIRST + kept,
        HEAD + FIRST + THOUGHT + act("good 2") + observation("ran good 2"),
    ]  # fmt: skip
    assert episode.outcomes == (Outcome.OK, Outcome.OK)
    [gone] = episode.discarded
    assert (gone.step, gone.call.code) == (1, "bad 1")
    dropped = engine.codec.decode(ids_of(gone.segments))
    assert dropped == THOUGHT[len(kept) :] + act("bad 1")
    assert all(s.logprobs is not None for s in gone.segments)


def test_the_release_eats_into_the_observation_and_loses_the_header() -> None:
    """B5 and method.md 5.1: it drops L_suf tokens of the whole response, however short r^t is, and
    joins the prompt again without the assistant's mark. Ours, on the same trace, does neither."""
    header = "<|im_start|>assistant\n"
    _, asked, engine = corrected("bad 1", "good 2", header=header, strategy="suffix", l_suf=30)
    codec = engine.codec
    prompt = codec.prompt("Q").ids
    assert all(call.ids[: len(prompt)] == prompt for call in engine.calls)
    assert asked[2] == HEAD + header + FIRST
    committed = FIRST + THOUGHT + "\n```"
    release = (HEAD + header + committed[:-30]).replace(header, "")
    assert not release.startswith(asked[0])
    assert FIRST not in release


def test_tries_per_step_then_the_last_error_stays() -> None:
    """N_corr is per step (9.2 no. 9), tries are no calls (no. 10), and each has its own seed."""
    settings = replace(FREE, calls=2)
    episode, asked, engine = corrected(
        "bad 1", "bad 2", "bad 3", strategy="action", n_corr=2, settings=settings
    )
    assert [c.code for c in episode.calls] == ["good", "bad 3"]
    assert [d.call.code for d in episode.discarded] == ["bad 1", "bad 2"]
    assert episode.n_retries == 2
    assert "Error in bad 3" in asked[-1]
    assert "bad 1" not in asked[-1] + asked[-2]
    assert episode.end is End.ANSWERED
    drawn = [call.seed for call in engine.calls]
    assert len(set(drawn)) == len(drawn)
    release = settings.calls + 2  # the release charges tries to the rounds
    assert release > settings.calls, "control: there the second call would not have been run"


def test_tries_of_an_episode_are_bounded_over_all_its_steps() -> None:
    episode, _, _ = corrected(
        "bad 1", "bad 2", "good 2", "bad 3", "bad 4", strategy="replan", n_corr=4, n_corr_total=3
    )
    assert [d.call.code for d in episode.discarded] == ["bad 1", "bad 2", "bad 3"]
    assert [d.step for d in episode.discarded] == [1, 1, 2]
    assert [c.code for c in episode.calls] == ["good", "good 2", "bad 4"]
    assert [len(step.discarded) for step in episode.steps] == [0, 2, 1, 0]


@pytest.mark.parametrize("strategy", ["action", "suffix", "replan"])
def test_feedback_is_seen_by_the_try_and_no_part_of_the_episode(strategy: str) -> None:
    told, seen, _ = corrected("bad 1", "good 2", strategy=strategy, l_suf=5, feedback=True)
    plain, asked, _ = corrected("bad 1", "good 2", strategy=strategy, l_suf=5)
    failed = THOUGHT + act("bad 1") + observation("Error in bad 1")
    assert seen[2] == HEAD + FIRST + failed + asked[2].removeprefix(HEAD + FIRST)
    assert seen[3] == asked[3]
    assert ids_of(told.segments) == ids_of(plain.segments)
    needed = len(seen[2]) - len("<assistant>") + 1  # ids, without room for a further one
    for context, expected in ((needed, asked[2]), (needed + 1, seen[2])):
        tight = replace(FREE, context=context)
        _, again, _ = corrected(
            "bad 1", "good 2", strategy=strategy, l_suf=5, feedback=True, settings=tight
        )
        assert again[2] == expected, "without room it tries without"


def test_a_try_may_give_the_action_up() -> None:
    """What it writes instead stands; the failed call is told as taken back."""
    episode, _, _ = corrected("bad 1", strategy="suffix", n_corr=1)
    assert episode.end is End.ANSWERED
    assert [c.code for c in episode.calls] == ["good"]
    assert [len(step.discarded) for step in episode.steps] == [0, 1]
    assert episode.text.endswith("\n```\n\\boxed{1}")


def test_every_sampled_token_is_counted_whether_it_stands_or_not() -> None:
    episode, _, engine = corrected("bad 1", "bad 2", "good 2", strategy="suffix", l_suf=3)
    standing = len(ids_of(episode.segments, SAMPLED))
    gone = sum(len(ids_of(d.segments)) for d in episode.discarded)
    assert standing + gone == episode.n_generated
    assert episode.n_generated == sum(len(call.made.ids) for call in engine.calls)


# ---- determinism -------------------------------------------------------------------------------


def noisy(said: str, seed: int) -> str:
    """A policy that depends on every seed: a number, then code or an answer."""
    draw = Random(f"{said}|{seed}")
    if said.endswith("```"):
        return f"python\n{draw.randrange(10**6)}\n```"
    end = "\n```" if draw.random() < 0.7 else f" \\boxed{{{draw.random()}}}"
    return "ab"[: draw.randrange(3)] + str(draw.random()) + end


def test_episodes_do_not_depend_on_latency_or_company() -> None:
    """Twelve episodes at once, engine and sandbox yielding at random, in three orders; members of
    one group differ. (Control: with the order of arrival as the seed they change.)"""
    settings = replace(FREE, tokens=400, correction=Correction("suffix", l_suf=3, n_corr=2))

    def sandboxed(order: Random) -> ScriptedSandbox:
        class Slow(ScriptedSandbox):
            async def arun(self, code: str, *, seed: int, timeout: float) -> RunResult:
                for _ in range(order.randrange(20)):
                    await asyncio.sleep(0)
                self.runs.append((code, seed))
                odd = (int(code) + seed) % 2
                return ran(Outcome.OK, f"{seed}") if odd else ran(Outcome.MODEL_ERROR, "", "no")

        return Slow()

    async def together(order: Random, *, by_arrival: bool = False) -> list[Episode]:
        codec, sandbox, arrivals = ByteCodec(*WORDS), sandboxed(order), iter(range(1000))

        async def yields() -> None:
            for _ in range(order.randrange(20)):
                await asyncio.sleep(0)

        engine = ScriptedEngine(codec, noisy, wait=yields)

        async def one(number: int) -> tuple[int, Episode]:
            await yields()
            seed = next(arrivals) if by_arrival else seeds.derive(7, number % 3, number)
            return number, await run_episode(
                engine, codec, sandbox, f"Q{number % 3}", settings, seed=seed, key=str(number)
            )

        numbers = list(range(12))
        order.shuffle(numbers)
        return [episode for _, episode in sorted(
            await asyncio.gather(*map(one, numbers)), key=lambda pair: pair[0]
        )]  # fmt: skip

    first, second, third = (asyncio.run(together(Random(i))) for i in range(3))
    assert first == second == third
    assert len({ids.segments[1:] for ids in first}) == 12
    assert any(episode.discarded for episode in first)
    arrived = [asyncio.run(together(Random(i), by_arrival=True)) for i in range(2)]
    assert arrived[0] != arrived[1]


# ---- one step ----------------------------------------------------------------------------------


def step(
    script: Script, prefix: str, settings: EpisodeSettings = FREE, begun: int = 0,
    sandbox: ScriptedSandbox | None = None,
) -> tuple[StepAttempt, ScriptedEngine]:  # fmt: skip
    codec = ByteCodec("\n```", "``")
    engine = ScriptedEngine(codec, script)
    ids = (*codec.encode("Q"), HEADER, *codec.encode(prefix))
    attempt = asyncio.run(
        run_step(engine, codec, sandbox or fails("bad"), Segment(Kind.PROMPT, ids), settings,
                 seed=5, key="s", begun=begun)
    )  # fmt: skip
    assert engine.released == ["s"]
    return attempt, engine


def test_a_step_is_exactly_one_action_and_ends_with_its_fence() -> None:
    """No EOS: a step that was not the policy's end must not teach it to end there (B4)."""
    for code, outcome in (("good", Outcome.OK), ("bad", Outcome.MODEL_ERROR)):
        whole = "We go on." + act(code) + " and on \\boxed{1}"
        attempt, engine = step(lambda said, seed, w=whole: w[len(said) - 3 :], "We ")
        assert attempt.outcome is outcome
        assert attempt.call is not None
        assert attempt.call.code == code
        assert [s.kind for s in attempt.segments] == [Kind.THOUGHT, Kind.CODE]
        assert engine.codec.decode(ids_of(attempt.segments)).endswith(code + "\n```")
        assert ids_of(attempt.segments) == [i for c in engine.calls for i in c.made.ids]
        assert [p for s in attempt.segments for p in s.logprobs or ()] == [
            p for c in engine.calls for p in c.made.logprobs or ()
        ]
        assert len(engine.calls) == 2
        release = [*ids_of(attempt.segments), engine.codec.eos]  # pads with EOS, and counts one
        assert release != ids_of(attempt.segments)


@pytest.mark.parametrize(
    "said", ["\\boxed{1}", "note ``` then ```", "```latex\nx\n```", "\n```output\n1\n```"]
)
def test_a_step_that_runs_nothing_has_no_outcome(said: str) -> None:
    """B3: the release rewards it, because "```" stands near the end of its text."""
    attempt, engine = step(lambda text, seed: said[len(text) :], "")
    assert (attempt.outcome, attempt.call) == (None, None)
    assert not any(s.kind in (Kind.EOS, Kind.CODE) for s in attempt.segments)
    if said.count("`") > 3:
        assert "```" in engine.codec.decode(ids_of(attempt.segments))[-200:], "control"


def test_a_step_from_inside_a_line_or_block_is_read_with_what_it_continues() -> None:
    """`begun` ids of the prefix are r_t. Without them a fence in mid-line would look like one."""
    for prefix, said, runs in (
        ("As in ", "```python\ngood\n```", []),
        ("```latex\nx = ", "y\n```\nThen" + act("good"), ["good"]),
    ):
        sandbox = ScriptedSandbox()
        script: Script = lambda text, seed, p=prefix, s=said: (p + s)[len(text) :]  # noqa: E731
        begun = len(ByteCodec("\n```", "``").encode(prefix))
        attempt, engine = step(script, prefix, begun=begun, sandbox=sandbox)
        assert [code for code, _ in sandbox.runs] == runs
        made = [i for c in engine.calls for i in c.made.ids if i != engine.codec.eos]
        assert ids_of(attempt.segments) == made
        control = ScriptedSandbox()
        step(script, prefix, sandbox=control)
        assert [code for code, _ in control.runs] != runs


def test_a_step_has_the_room_that_the_context_leaves() -> None:
    attempt, engine = step(lambda text, seed: "x" * 50, "We ", replace(FREE, context=20))
    assert len(ids_of(attempt.segments)) == 20 - 5
    attempt, engine = step(lambda text, seed: "x" * 50, "We ", replace(FREE, tokens=7))
    assert len(ids_of(attempt.segments)) == 7
    attempt, engine = step(lambda text, seed: "x" * 50, "We ", replace(FREE, context=5))
    assert (attempt.segments, attempt.outcome, engine.calls) == ((), None, [])
