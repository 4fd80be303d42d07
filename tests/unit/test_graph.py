"""The graph: the splice, the budgets, self-correction, faults, who sees what, seeds.

Models and sandbox are scripted; everything between them is real. Steps begin with a word of their
own (S0, S1, ...); the scripted extractor computes those that say CALC.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.errors import EndpointError, SandboxError
from shared.sandbox.result import Outcome, RunResult
from shared.trajectory import End, Problem, Trajectory, content_hash
from tests.scripted import ASSISTANT, calculator, encode, ran, speech, split
from tests.scripted_graph import BOXED, SUFFIX, Case, case, fails, judged, piece, rambler
from tirgen.agents.verifier import format_ok

# ---- the splice (9.1 no. 13) ------------------------------------------------------------------

SENTENCES = st.lists(st.sampled_from(["so", "CALC", "é", "```", "x = 1", "\n"]), max_size=6)


@settings(max_examples=60, deadline=None)
@given(st.lists(SENTENCES, min_size=1, max_size=5), st.booleans(), st.booleans())
def test_the_splice_replaces_exactly_the_covered_text(
    sentences: list[list[str]], thinking: bool, ends_with_answer: bool
) -> None:
    """Originals joined are what was sampled; pieces joined are the text, and the next prompt."""
    steps = [" ".join([f"S{i}", *words]) for i, words in enumerate(sentences)]
    if ends_with_answer and not thinking:
        steps[-1] += " " + BOXED
    made = case(speech(*steps), reasoner={"thinking": thinking}, budgets={"calls": 3})
    trajectory = made.run()
    opening = "<think>\n" if thinking else ""

    originals = [s.thought if s.original is None else s.original for s in trajectory.steps]
    assert "".join(originals) == "".join(made.server.spoken)
    assert trajectory.text == opening + "".join(map(piece, trajectory.steps))
    assert trajectory.n_tokens == len(encode(trajectory.text))
    committed = [opening]
    for step in trajectory.steps:
        committed.append(committed[-1] + piece(step))
    asked = [before for before, _ in made.server.drafted()]
    assert set(asked) >= set(committed[:-1])
    begun = [
        c + o[:n] for c, o in zip(committed, originals, strict=False) for n in range(len(o) + 1)
    ]
    assert set(asked) <= set(begun), "a blank line in a block is the only other place to ask"


def test_a_computable_step_is_replaced_by_logic_code_and_observation() -> None:
    made = case(speech("S0 three times CALC four", f"S1 so {BOXED}"))
    trajectory = made.run()
    first, second = trajectory.steps
    assert first.thought == "S0 three times four"
    assert first.original == "S0 three times CALC four\n\n"
    assert first.call is not None
    assert first.call.code == "run('S0')"
    assert first.call.observation == "ran run('S0')"
    assert second.call is None
    assert (trajectory.end, trajectory.answer) == (End.ANSWERED, "7")
    assert format_ok(trajectory).passed


def test_a_reasoner_that_had_stopped_goes_on_after_its_step_was_spliced() -> None:
    """Else the computed result would never be used: the original's end is replaced with it."""

    def says(user: str, response: str, seed: int) -> str:
        return f"S1 as computed {BOXED}" if response else f"S0 CALC all of it {BOXED}"

    trajectory = case(says, chat=drops_answer).run()
    assert [s.call is not None for s in trajectory.steps] == [True, False]
    assert trajectory.end is End.ANSWERED


def drops_answer(user: str, seed: int) -> str:
    return calculator(user.replace(BOXED, ""), seed)


def test_a_turn_that_ends_without_an_answer_is_given_up() -> None:
    assert case(speech("S0 dunno")).run().end is End.GAVE_UP
    assert case(speech("S0 dunno")).run().answer is None


def test_reasons_why_steps_were_left_are_counted() -> None:
    made = case(speech("S0 no", "S1 no", f"S2 {BOXED}"))
    assert made.run().meta["left"] == {"not_solvable": 3}


# ---- budgets (9.1 no. 2, 9.2 no. 9-12) ---------------------------------------------------------

CALCS = [f"S{i} CALC" for i in range(6)]


def test_the_call_budget_ends_the_calls_and_not_the_trajectory() -> None:
    made = case(speech(*CALCS, f"S6 {BOXED}"), budgets={"calls": 2})
    trajectory = made.run()
    assert [s.call is not None for s in trajectory.steps] == [True] * 2 + [False] * 5
    assert trajectory.end is End.ANSWERED
    assert len(judged(made)) == 2, "the extractor is not asked about what cannot be run"


def test_with_no_calls_at_all_the_reasoner_is_alone() -> None:
    """What is sampled is what stands: nobody is asked to compute, and nothing is executed."""
    made = case(speech(*CALCS[:2], f"S2 {BOXED}"), budgets={"calls": 0})
    trajectory = made.run()
    assert (trajectory.end, trajectory.n_calls) == (End.ANSWERED, 0)
    assert trajectory.text == "".join(made.server.spoken)
    assert judged(made) == []
    own = case(speech("S0\n```python\nprint(1)\n```\n", BOXED), budgets={"calls": 0}).run()
    assert (own.end, own.n_calls) == (End.OWN_BLOCK, 0)


def test_the_step_budget_ends_the_trajectory() -> None:
    trajectory = case(speech(*CALCS), budgets={"steps": 3}).run()
    assert (trajectory.end, len(trajectory.steps)) == (End.STEP_BUDGET, 3)


def test_the_length_budget_bounds_what_is_asked_for_and_ends_the_trajectory() -> None:
    made = case(speech("S0 " + "word " * 50), budgets={"tokens": 100})
    trajectory = made.run()
    assert (trajectory.end, trajectory.n_tokens) == (End.LENGTH_BUDGET, 100)
    assert made.server.sent("/completions")[0]["max_tokens"] == 100
    room = [b["max_tokens"] + len(split(b["prompt"])[1]) for b in made.server.sent("/completions")]
    assert max(room) == 100


@pytest.mark.parametrize(("tokens", "end"), [(65, End.ANSWERED), (64, End.LENGTH_BUDGET)])
def test_an_answer_beyond_the_length_budget_does_not_count(tokens: int, end: End) -> None:
    """A splice may be longer than what it replaced; nothing answered is ever over its budget."""
    made = case(speech(f"S0 CALC {BOXED}"), budgets={"tokens": tokens})
    trajectory = made.run()
    assert trajectory.n_tokens == 65
    assert trajectory.end is end


def test_correction_takes_a_failed_call_back_and_does_not_cost_a_call() -> None:
    made = case(
        rambler("S0 CALC first", "S1 CALC second", f"S2 {BOXED}"),
        fails("S0", times=1),
        correction=SUFFIX,
        budgets={"calls": 2},
    )
    trajectory = made.run()
    first, second, _ = trajectory.steps
    assert [c.result.outcome for c in first.discarded] == [Outcome.MODEL_ERROR]
    assert first.call is not None
    assert first.call.result.outcome is Outcome.OK
    assert second.call is not None, "the retry was not charged to the call budget"
    assert "NameError" not in trajectory.text
    assert format_ok(trajectory).passed


def test_tries_are_counted_per_step_and_in_total_and_the_last_error_stays() -> None:
    made = case(
        rambler("S0 CALC first", "S1 CALC second", "S2 CALC third", f"S3 {BOXED}"),
        fails("S0", "S1", "S2"),
        correction=SUFFIX,
    )
    trajectory = made.run()
    assert [len(s.discarded) for s in trajectory.steps] == [2, 1, 0, 0]
    assert trajectory.n_calls == trajectory.n_failed_calls == 3
    assert trajectory.text.count("NameError") == 3
    assert trajectory.end is End.ANSWERED
    assert len(made.sandbox.runs) == 6


def test_without_the_strategy_nothing_is_taken_back() -> None:
    made = case(rambler("S0 CALC first", f"S1 {BOXED}"), fails("S0"))
    trajectory = made.run()
    assert trajectory.steps[0].discarded == ()
    assert "NameError" in trajectory.text


def test_backtracking_cuts_in_the_step_only_with_a_fresh_seed_each_time() -> None:
    """9.1 no. 4: header and everything committed stay, L_suf tokens of r^t go."""
    made = case(
        rambler("S0 hello", "S1 CALC number", f"S2 {BOXED}"),
        fails("S1", times=2),
        correction={**SUFFIX, "l_suf": 8},
    )
    made.run()
    prompts = [body["prompt"] for body in made.server.sent("/completions")]
    header = prompts[0]
    assert header[-1] == ASSISTANT
    assert all(p[: len(header)] == header for p in prompts)
    drafted = made.server.drafted()
    assert drafted[2][0] == "S0 hello\n\nS1 CALC number\n\n"[:-8]
    assert drafted[3][0].startswith("S0 hello\n\nS1 CAL")
    assert len({seed for _, seed in drafted}) == len(drafted)
    tool_seeds = {seed for _, seed in made.sandbox.runs}
    assert len(tool_seeds) == 1, "the step's tool seed is that of its verification, at each try"


@pytest.mark.parametrize("l_suf", [30, 1000])
def test_backtracking_never_goes_beyond_the_start_of_the_step(l_suf: int) -> None:
    made = case(
        rambler("S0 hello", "S1 CALC number", f"S2 {BOXED}"),
        fails("S1", times=1),
        correction={**SUFFIX, "l_suf": l_suf},
    )
    trajectory = made.run()
    drafted = made.server.drafted()
    assert drafted[2][0] == drafted[1][0] == "S0 hello\n\n"
    assert drafted[2][1] != drafted[1][1], "the same place is sampled anew"
    assert trajectory.end is End.ANSWERED


def test_a_step_that_backtracking_made_uncomputable_stays_as_text() -> None:
    def reasoner(user: str, response: str, seed: int) -> str:
        return f"S1 {BOXED}" if "words" in response else "words" if "S0" in response else "S0 CALC"

    trajectory = case(reasoner, fails("S0"), correction={**SUFFIX, "l_suf": 5}).run()
    assert trajectory.steps[0].thought == "S0words"
    assert trajectory.steps[0].call is None
    assert len(trajectory.steps[0].discarded) == 1


def test_the_recursion_limit_of_the_graph_is_never_what_ends_a_trajectory() -> None:
    """The worst case: every step fails and is taken back as often as allowed."""
    steps = [f"S{i} CALC of {i}" for i in range(9)]
    made = case(
        rambler(*steps),
        fails(*(f"S{i}" for i in range(9))),
        budgets={"steps": 9, "calls": 9},
        correction={**SUFFIX, "n_corr": 4, "n_corr_total": 36},
    )
    trajectory = made.run()
    assert trajectory.end in (End.STEP_BUDGET, End.GAVE_UP)
    assert sum(len(s.discarded) for s in trajectory.steps) == 36


# ---- failures that are nobody's fault in the model (9.1 no. 5) ---------------------------------


@pytest.mark.parametrize("strategy", ["none", "suffix"])
def test_an_infrastructure_error_is_raised_and_never_shown_to_the_model(strategy: str) -> None:
    made = case(
        speech("S0 CALC", f"S1 {BOXED}"),
        lambda code, seed: ran(Outcome.INFRASTRUCTURE_ERROR, stderr="the zygote died"),
        correction={"strategy": strategy},
    )
    with pytest.raises(SandboxError, match="the zygote died"):
        made.run()
    assert len(made.server.sent("/completions")) == 1


def test_a_model_that_fails_for_good_ends_the_run_with_its_own_error() -> None:
    def reasoner(user: str, response: str, seed: int) -> str:
        raise EndpointError("gone", kind="unreachable", retryable=True)

    with pytest.raises(EndpointError, match="gone"):
        case(reasoner).run()


@pytest.mark.parametrize("outcome", [Outcome.MODEL_ERROR, Outcome.TIMEOUT, Outcome.NO_OUTPUT])
def test_a_failure_of_the_models_code_is_an_observation(outcome: Outcome) -> None:
    made = case(speech("S0 CALC", f"S1 {BOXED}"), lambda code, seed: ran(outcome))
    trajectory = made.run()
    assert trajectory.n_failed_calls == 1
    assert trajectory.steps[0].call is not None
    assert trajectory.steps[0].call.observation


# ---- who sees what, and seeds ------------------------------------------------------------------


@pytest.mark.parametrize("calls", ["one", "three"])
def test_the_extractor_never_sees_question_or_answer(calls: str) -> None:
    """9.1 no. 12, on every request of a whole trajectory."""
    problem = Problem("ZQUESTIONZ how many?", "ZANSWERZ")

    def chat(user: str, seed: int) -> str:
        plain = {"Can": "yes", "Remove": "S0 hm", "Write": "```python\nprint(1)\n```"}
        return plain.get(user.split()[0]) or calculator(user, seed)

    made = case(
        speech("S0 CALC hm", "S1 CALC", f"S2 {BOXED}"),
        fails("S1"),
        chat=chat,
        extractor={
            "endpoint": {"base_url": "http://memory/v1", "model": "scripted"},
            "calls": calls,
        },
        correction=SUFFIX,
    )
    made.run(problem)
    chats = [str(body) for body in made.server.sent("/chat/completions")]
    assert len(chats) >= 3
    assert not [c for c in chats if "ZQUESTIONZ" in c or "ZANSWERZ" in c]
    prompts = [split(body["prompt"])[0] for body in made.server.sent("/completions")]
    assert all("ZQUESTIONZ" in p for p in prompts), "control: the reasoner does see the question"
    assert not [r for r in made.server.requests if "ZANSWERZ" in str(r)], "nobody sees the answer"


def noisy(user: str, response: str, seed: int) -> str:
    """A reasoner whose words depend on its seed: any difference in seeds shows in the text."""
    at = response.count("W")
    if at >= 5:
        return BOXED
    return f"W{seed}S{at} CALC x\n\n" if seed % 3 else f"W{seed} y\n\n"


def flaky(code: str, seed: int) -> RunResult:
    return ran(Outcome.OK if seed % 2 else Outcome.MODEL_ERROR, f"{code} {seed}")


def test_the_same_seed_gives_the_same_requests_whatever_runs_beside_it() -> None:
    """Nothing is shared between trajectories: budgets, seeds, notes or contexts."""
    chance = random.Random(0)

    async def wait() -> None:
        for _ in range(chance.randrange(4)):
            await asyncio.sleep(0)

    problems = [(Problem(f"problem {i % 4}", "7"), i) for i in range(12)]

    def requests(made: Case) -> list[str]:
        return sorted(str(r) for r in made.server.requests)

    def make(wait: Callable[[], Any]) -> Case:
        return case(noisy, flaky, wait, correction=SUFFIX, budgets={"calls": 3})

    alone = make(lambda: asyncio.sleep(0))
    one_by_one = [alone.run(p, seed) for p, seed in problems]
    beside = make(wait)

    async def together() -> list[Trajectory]:
        return list(await asyncio.gather(*(beside.arun(p, seed) for p, seed in problems)))

    at_once = asyncio.run(together())
    assert [content_hash(t.identity()) for t in at_once] == [
        content_hash(t.identity()) for t in one_by_one
    ]
    assert requests(alone) == requests(beside)
    assert len({t.text for t in one_by_one}) == 12, "control: another seed, another trajectory"
    assert any(t.steps[0].discarded for t in one_by_one), "control: corrections took place"


def test_budgets_are_not_shared_between_trajectories() -> None:
    """9.1 no. 2; the release counts rounds over the whole batch."""
    made = case(
        rambler(*CALCS, f"S6 {BOXED}"),
        fails("S0", "S1", "S2"),
        budgets={"calls": 3},
        correction=SUFFIX,
    )

    async def together() -> list[Trajectory]:
        return list(await asyncio.gather(*(made.arun(seed=seed) for seed in range(3))))

    for trajectory in asyncio.run(together()):
        assert trajectory.n_calls == 3
        assert sum(len(s.discarded) for s in trajectory.steps) == 3
