"""Sampling, stop rules and scheduling of the nano engine, without HTTP."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shared.nano.engine import Engine, EngineBusyError, EngineDeadError, Update
from shared.nano.model import NanoModel
from shared.nano.sampling import SamplingParams, generator, logprobs_of, sample
from shared.nano.text import GrowingText, TextCodec, find_stop
from tests.nano_random import make_model

VOCAB, SLOTS = 512, 32


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("nano"), vocab=VOCAB)


@pytest.fixture(scope="module")
def codec(folder: Path) -> TextCodec:
    return TextCodec(folder)


@pytest.fixture(scope="module")
def engine(folder: Path, codec: TextCodec) -> Iterator[Engine]:
    engine = Engine(NanoModel(folder, slots=SLOTS), codec, eos_ids=(2, 0), max_waiting=500)
    yield engine
    engine.close()


def finish(engine: Engine, *jobs: tuple[list[int], SamplingParams]) -> list[Update]:
    """Submit all at once; the final (only) update of each, in order."""
    queues: list[queue.Queue[Update]] = [queue.Queue() for _ in jobs]
    for (prompt, params), replies in zip(jobs, queues, strict=True):
        engine.submit(prompt, params, replies.put)
    return [replies.get(timeout=30) for replies in queues]


params_strategy = st.builds(
    SamplingParams,
    max_tokens=st.integers(1, 24),
    temperature=st.sampled_from([0.0, 0.3, 1.0, 2.0]),
    top_p=st.sampled_from([1.0, 0.9, 0.2]),
    top_k=st.sampled_from([0, 1, 20]),
    seed=st.integers(0, 2**40),
    logprobs=st.sampled_from([None, 0, 3]),
    stop=st.sampled_from([(), ("e",), ("apple", "\n")]),
)
prompt_strategy = st.lists(st.integers(5, 400), min_size=1, max_size=150)
job_strategy = st.tuples(prompt_strategy, params_strategy)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(job=job_strategy, others=st.lists(job_strategy, min_size=31, max_size=31), at=st.data())
def test_a_request_gives_the_same_bits_alone_and_among_31_others(
    engine: Engine, job: tuple[list[int], SamplingParams], others: list[Any], at: st.DataObject
) -> None:
    """Token ids, text, log-probabilities (all 64 bits) and reasons, at any place in the queue."""
    job = (job[0], replace(job[1], logprobs=2))
    [alone] = finish(engine, job)
    place = at.draw(st.integers(0, 31))
    crowd = [*others[:place], job, *others[place:]]
    assert finish(engine, *crowd)[place] == alone


def test_samples_of_one_prompt_differ_by_seed_only_and_share_the_prompt(engine: Engine) -> None:
    prompt = list(range(10, 90))
    jobs = [(prompt, SamplingParams(12, seed=seed, ignore_eos=True)) for seed in range(32)]
    together = finish(engine, *jobs)
    assert [finish(engine, job)[0] for job in jobs] == together
    assert len({update.token_ids for update in together}) == 32


def test_without_a_seed_samples_differ(engine: Engine) -> None:
    job = (list(range(10, 40)), SamplingParams(16, ignore_eos=True))
    first, second = finish(engine, job, job)
    assert first.token_ids != second.token_ids


@settings(max_examples=200, deadline=None)
@given(
    row=st.lists(st.floats(-30, 30), min_size=2, max_size=40),
    temperature=st.sampled_from([1e-3, 0.5, 1.0, 5.0]),
    top_k=st.integers(0, 50),
    top_p=st.floats(0.01, 1.0),
    seed=st.integers(0, 2**64),
)
def test_sampling_stays_inside_top_k_top_p_and_the_vocabulary(
    row: list[float], temperature: float, top_k: int, top_p: float, seed: int
) -> None:
    logits = np.array([*row, -np.inf, -np.inf])
    params = SamplingParams(1, temperature, top_p, top_k)
    token = sample(logits, params, generator(seed, 0))
    assert np.isfinite(logits[token])
    weight = np.exp((logits - logits.max()) / temperature)
    better = weight[weight > weight[token]]
    if top_k:
        assert len(better) < top_k
    above = better.sum() / weight.sum()
    assert above <= top_p + 1e-9


def test_sampling_follows_the_softmax() -> None:
    """Chi-square of 20,000 draws; the control shows that another temperature would be seen."""
    logits = np.array([0.0, 1.0, 2.0, -1.0, -np.inf])
    rng = generator(7, 0)
    drawn = [sample(logits, SamplingParams(1, temperature=0.7), rng) for _ in range(20_000)]
    counts = np.bincount(drawn, minlength=5)[:4]

    def chi_square(temperature: float) -> float:
        weight = np.exp(logits[:4] / temperature)
        expected = weight / weight.sum() * len(drawn)
        return float(((counts - expected) ** 2 / expected).sum())

    assert counts.sum() == len(drawn)
    assert chi_square(0.7) < 16.3  # 0.1 % point at 3 degrees of freedom
    assert chi_square(0.8) > 100


def test_greedy_takes_the_maximum_and_logprobs_sum_to_one() -> None:
    row = np.random.default_rng(0).normal(size=50)
    assert sample(row, SamplingParams(1, temperature=0), generator(0, 0)) == row.argmax()
    entry = logprobs_of(row, 3, 50)
    assert sum(np.exp(logprob) for _, logprob in entry.top) == pytest.approx(1)
    assert entry.top[0][0] == row.argmax()
    assert dict(entry.top)[3] == entry.logprob


def test_vocabulary_padding_is_never_sampled(engine: Engine, codec: TextCodec) -> None:
    absent = set(range(VOCAB)) - codec.ids
    assert absent, "the fixture must have padding rows"
    hot = SamplingParams(100, temperature=50.0, ignore_eos=True, seed=1, logprobs=VOCAB)
    for update in finish(engine, *[([9, i + 5], replace(hot, seed=i)) for i in range(20)]):
        assert not absent & set(update.token_ids)
        assert len(update.logprobs[0].top) == len(codec.ids)


def test_growing_text_equals_whole_decoding_and_never_splits_a_character(codec: TextCodec) -> None:
    text = "naïve 数学 🙂🙂 \\boxed{45} Größe\n"
    ids = codec.encode(text, add_special_tokens=False)
    growing = GrowingText(codec, codec.encode("Tom 🙂", add_special_tokens=False),
                          skip_special_tokens=True)  # fmt: skip
    pieces = [growing.add(token) for token in ids]
    assert "".join(pieces) == text
    assert "" in pieces, "the sample must have a character of several tokens"
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


@settings(max_examples=300, deadline=None)
@given(pieces=st.lists(st.text("ab\n", max_size=3), max_size=12), stop=st.text("ab\n", min_size=1))
def test_a_stop_string_is_found_when_completed_wherever_pieces_are_cut(
    pieces: list[str], stop: str
) -> None:
    text = ""
    for piece in pieces:
        text += piece
        found = find_stop(text, len(piece), (stop,)) if piece else None
        assert (found is not None) == (stop in text)
        if found:
            assert found == (stop, text.index(stop))
            return


@pytest.mark.parametrize("include", [False, True])
def test_stop_strings_across_tokens_cut_the_text_and_keep_the_ids(
    engine: Engine, codec: TextCodec, include: bool
) -> None:
    base = SamplingParams(60, temperature=1.0, seed=5, ignore_eos=True)
    prompt = list(range(20, 60))
    [free] = finish(engine, (prompt, base))
    stop = free.text[9:14]
    [cut] = finish(engine, (prompt, replace(base, stop=("never seen", stop), include_stop=include)))
    at = free.text.index(stop)
    assert cut.text == free.text[: at + len(stop) * include]
    assert (cut.finish_reason, cut.stop_reason) == ("stop", stop)
    assert cut.token_ids == free.token_ids[: len(cut.token_ids)]
    assert stop in codec.decode(list(cut.token_ids), skip_special_tokens=True)


def test_stop_tokens_end_a_request_and_eos_has_no_stop_reason(engine: Engine) -> None:
    base = SamplingParams(40, seed=11, ignore_eos=True)
    prompt = list(range(30, 70))
    [free] = finish(engine, (prompt, base))
    token = free.token_ids[6]
    first = free.token_ids.index(token)
    [stopped] = finish(engine, (prompt, replace(base, stop_token_ids=frozenset([token]))))
    assert stopped.token_ids == free.token_ids[: first + 1]
    assert (stopped.finish_reason, stopped.stop_reason) == ("stop", token)
    assert (free.finish_reason, free.stop_reason) == ("length", None)


def test_streamed_pieces_join_to_the_whole_and_hold_back_a_possible_stop(engine: Engine) -> None:
    base = SamplingParams(60, seed=5, ignore_eos=True, logprobs=1)
    prompt = list(range(20, 60))
    [free] = finish(engine, (prompt, base))
    params = replace(base, stop=(free.text[20:26],))
    [whole] = finish(engine, (prompt, params))
    updates: queue.Queue[Update] = queue.Queue()
    engine.submit(prompt, params, updates.put, streams=True)
    parts = [updates.get(timeout=30)]
    while parts[-1].finish_reason is None:
        parts.append(updates.get(timeout=30))
    assert len(parts) > 3
    assert "".join(part.text for part in parts) == whole.text
    assert sum((part.token_ids for part in parts), ()) == whole.token_ids
    assert sum((part.logprobs for part in parts), ()) == whole.logprobs


def test_cancel_frees_the_slot_and_a_full_queue_refuses(folder: Path, codec: TextCodec) -> None:
    """One slot, two places in the queue. The held callback keeps the engine inside a round."""
    engine = Engine(NanoModel(folder, slots=1), codec, eos_ids=(), max_waiting=2)
    inside, release = threading.Event(), threading.Event()
    ends: queue.Queue[str] = queue.Queue()

    def hold(update: Update) -> None:
        inside.set()
        assert release.wait(30)
        if update.finish_reason:
            ends.put(f"first {update.finish_reason} {len(update.token_ids) > 1}")

    def other(name: str) -> Any:
        return lambda update: ends.put(f"{name} {update.finish_reason}")

    first = engine.submit([5, 6], SamplingParams(200), hold, streams=True)
    assert inside.wait(30)
    second = engine.submit([7], SamplingParams(3), other("second"))
    engine.submit([8], SamplingParams(3), other("third"))
    with pytest.raises(EngineBusyError):
        engine.submit([9], SamplingParams(3), other("fourth"))
    engine.cancel(first)
    engine.cancel(second)
    release.set()
    got = [ends.get(timeout=30) for _ in range(3)]
    engine.close()
    assert got == ["first abort False", "second abort", "third length"]


def test_an_engine_that_dies_says_so_to_everyone_and_refuses_more(
    folder: Path, codec: TextCodec, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = NanoModel(folder, slots=2)
    engine = Engine(model, codec, eos_ids=(), max_waiting=10)

    def broken(_: object) -> None:
        raise RuntimeError("simulated fault")

    monkeypatch.setattr(model, "decode", broken)
    ends: queue.Queue[Update] = queue.Queue()
    for _ in range(3):
        try:
            engine.submit([5], SamplingParams(10), ends.put)
        except EngineDeadError:
            break
        assert ends.get(timeout=30).finish_reason == "error"
    assert not engine.alive
    with pytest.raises(EngineDeadError):
        engine.submit([5], SamplingParams(10), ends.put)
    engine.close()
