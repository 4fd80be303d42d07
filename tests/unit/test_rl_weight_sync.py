"""Weights into an engine: every bit of them, under their version, with nothing cached before them.

Claim (trainer.md 4.3 I 36). After a sync the engine samples as one that was made from the new
weights, bit for bit; checksums of every tensor agree on both sides, for plain models, ZeRO 0 to 3
(spread over two ranks, a bucket whole at a time) and merged LoRA; tied weights are one; what is
changed, missing or foreign on the way is an error. Not shown here: several GPUs, NCCL.
"""

from __future__ import annotations

import asyncio
import copy
import threading
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoTokenizer

from rl.config import EngineConfig, OptimizerConfig
from rl.engine import Engine
from rl.model import Policy
from rl.render import Renderer
from rl.rollout import LocalEngine
from rl.weight_sync import SyncError, Target, checksum, sync, weights
from rl.world import World, join
from shared.endpoints import Sampling
from shared.errors import EndpointError, InputError
from shared.policy import Generated
from tests import ranks
from tests.fuzz import fuzz
from tests.rl_programs.gathered import BUCKET
from tests.rl_programs.partition import model
from tests.unit.test_rl_local_engine import nano
from tirgen.stack import WEIGHTS

IDS = list(range(5, 30))
LONG = Sampling(max_tokens=30)


def trained(seed: int = 1) -> Any:
    """Nano after some training, for all that an engine can tell."""
    lm = nano()
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in lm.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=draw) * 0.02)
    return lm


def engine_of(lm: Any, version: int = 0, dtype: torch.dtype = torch.float32) -> LocalEngine:
    codec = Renderer(AutoTokenizer.from_pretrained(WEIGHTS), "compact")
    return LocalEngine(
        copy.deepcopy(lm).to(dtype), codec.tokenizer, eos={codec.eos}, slots=8, max_len=128,
        version=version,
    )  # fmt: skip


def say(engine: LocalEngine, key: str = "k") -> Generated:
    return asyncio.run(engine.generate(IDS, LONG, seed=4, key=key))


@pytest.fixture
def engine() -> Iterator[LocalEngine]:
    engine = engine_of(nano())
    yield engine
    engine.close()


# ---- into the local engine ---------------------------------------------------------------------


def test_it_then_samples_as_an_engine_made_of_the_new_weights(engine: LocalEngine) -> None:
    new = trained()
    fresh = engine_of(new, version=7)
    before = say(engine)
    report = sync(weights(new), engine, 7)
    after = say(engine)  # the same key: what was cached of it must not be used
    assert after == say(fresh)
    assert (before.version, after.version, engine.version) == (0, 7, 7)
    assert before.logprobs != after.logprobs
    named = dict(new.named_parameters())
    assert (report.version, report.tensors) == (7, len(named))
    assert report.bytes == sum(p.nbytes for p in named.values())
    fresh.close()


def test_nothing_of_the_old_weights_stays_cached(engine: LocalEngine) -> None:
    """Control: with what was cached put back, the reply is neither old nor new."""
    say(engine)
    assert engine.cached_tokens > 0
    kept = [(list(s.held), s.first, s.after) for s in engine._slots]
    new = trained()
    sync(weights(new), engine, 1)
    assert engine.cached_tokens == 0
    right = say(engine)
    sync(weights(new), engine, 2)
    for slot, (held, first, after) in zip(engine._slots, kept, strict=True):
        slot.held, slot.first, slot.after = held, first, after
    assert say(engine).logprobs != right.logprobs


def test_calls_under_way_end_with_the_weights_they_began_with(engine: LocalEngine) -> None:
    """A call that is in the middle when the update begins is waited for; one that comes while it
    goes on waits. So every reply is of one version."""
    new, honest = trained(), engine._memory.step
    in_the_middle, go_on = threading.Event(), threading.Event()

    def step(rows: Any) -> Any:
        in_the_middle.set()
        assert go_on.wait(30)
        return honest(rows)

    engine._memory.step = step  # type: ignore[method-assign]

    def during() -> Iterator[tuple[str, Tensor]]:
        assert engine.version == 0
        assert not engine._running
        yield from weights(new)

    async def run() -> tuple[Generated, Generated]:
        first = asyncio.create_task(engine.generate(IDS, LONG, seed=4, key="first"))
        await asyncio.to_thread(in_the_middle.wait, 30)
        update = asyncio.create_task(asyncio.to_thread(sync, during(), engine, 1))
        while not engine._paused:  # noqa: ASYNC110  another thread sets it
            await asyncio.sleep(0)
        second = asyncio.create_task(engine.generate(IDS, LONG, seed=4, key="second"))
        await asyncio.sleep(0)
        go_on.set()
        await update
        return await first, await second

    old, fresh = engine_of(nano()), engine_of(new, version=1)
    assert asyncio.run(run()) == (say(old), say(fresh))
    old.close()
    fresh.close()


def test_in_half_precision_it_is_what_was_sent_rounded() -> None:
    engine, new = engine_of(nano(), dtype=torch.bfloat16), trained()
    report = sync(weights(new), engine, 1)
    fresh = engine_of(new, version=1, dtype=torch.bfloat16)
    assert say(engine) == say(fresh)
    assert report.bytes == sum(p.numel() * 2 for p in new.parameters())
    engine.close()
    fresh.close()


# ---- what goes wrong ---------------------------------------------------------------------------


def without(lm: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    return ((n, t) for n, t in weights(lm) if n != name)


def test_tensors_that_are_missing_foreign_or_of_another_shape_are_named() -> None:
    """And the engine, which has neither weights now, samples no more."""
    name = "model.layers.2.mlp.up_proj.weight"
    new = trained()
    for parts, why in (
        (without(new, name), "1 of 47 tensors were not sent"),
        ([*weights(new), ("model.extra.weight", torch.ones(2))], "no such tensor"),
        ([(n, t[:, :-1] if n == name else t) for n, t in weights(new)], r"shape \(512, 192\)"),
    ):
        engine = engine_of(nano())
        with pytest.raises(InputError, match=why):
            sync(parts, engine, 1)
        assert engine.version == 0
        with pytest.raises(EndpointError, match="an update of the weights failed"):
            say(engine)
        engine.close()


@pytest.mark.parametrize("bit", [0, 13, 31])
def test_one_bit_that_changes_on_the_way_is_noticed(
    engine: LocalEngine, bit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = Target.take

    def take(self: Target, name: str, tensor: Tensor) -> None:
        honest(self, name, tensor)
        if name == "model.layers.1.self_attn.k_proj.weight":
            flat = self.tensors[name].view(torch.int32)
            flat[3, 5] ^= torch.tensor(-(2**31) if bit == 31 else 1 << bit, dtype=torch.int32)

    monkeypatch.setattr(Target, "take", take)
    with pytest.raises(SyncError, match="1 of 46 tensors") as caught:
        sync(weights(trained()), engine, 1)
    assert caught.value.where == "model.layers.1.self_attn.k_proj.weight"
    with pytest.raises(EndpointError, match="an update of the weights failed"):
        say(engine)


@fuzz
@given(n=st.integers(1, 40), at=st.data(), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_a_checksum_sees_every_change_of_value_place_shape_and_type(
    n: int, at: st.DataObject, dtype: torch.dtype
) -> None:
    one = torch.arange(1, n + 1).to(dtype)
    i = at.draw(st.integers(0, n - 1))
    changed = one.clone()
    changed[i] = -changed[i]
    others = [changed, one.view(1, -1), one.double(), one.half(), torch.cat((one, one[:1] * 0))]
    if n > 1:
        j = at.draw(st.integers(0, n - 1).filter(lambda j: j != i))
        swapped = one.clone()
        swapped[[i, j]] = one[[j, i]]
        others.append(swapped)
    assert checksum(one) == checksum(one.clone()) == checksum(torch.stack((one, one))[:, ::1][1])
    assert all(checksum(other) != checksum(one) for other in others)


# ---- from every kind of model ------------------------------------------------------------------


def test_tied_weights_are_sent_once_and_are_one_in_the_engine(engine: LocalEngine) -> None:
    new = trained()
    assert new.config.tie_word_embeddings
    names = [name for name, _ in weights(new)]
    assert "model.embed_tokens.weight" in names
    assert "lm_head.weight" not in names
    sync(weights(new), engine, 1)
    found = engine.checksums()
    assert found["lm_head.weight"] == found["model.embed_tokens.weight"]
    assert found["lm_head.weight"] == checksum(new.lm_head.weight)


@pytest.fixture(scope="module")
def world() -> World:
    torch.set_num_threads(1)
    return join(timedelta(minutes=1))


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_of_every_zero_stage(world: World, zero: int) -> None:
    lm = model()
    truth = {name: checksum(tensor) for name, tensor in lm.state_dict().items()}
    settings = EngineConfig(zero=zero, dtype="fp32", max_grad_norm=None)
    engine = Engine(Policy(lm), settings, OptimizerConfig(lr=0.1), world, total_steps=1)
    sent = {name: checksum(tensor) for name, tensor in engine.weights()}
    assert sent == {name: truth[name] for name in sent}
    assert len(sent) == len(truth) - 1, "all but the tied head"


def test_of_parameters_spread_over_two_ranks_one_bucket_at_a_time(tmp_path: Path) -> None:
    out = tmp_path / "out.pt"
    ranks.run("tests.rl_programs.gathered", [str(out)], 2)
    found = torch.load(out, weights_only=False)
    assert all(torch.equal(found["after"][name], t) for name, t in found["before"].items())
    assert (found["version"], found["report"].version) == (3, 3)
    assert found["whole"] <= BUCKET
    assert found["all"] > 2 * BUCKET
    assert found["left"] == 0, "nothing stays gathered"


def test_adapters_are_merged_into_a_copy(engine: LocalEngine) -> None:
    """The engine then computes what the adapted model does; the base stays as it was."""
    base = nano()
    settings = LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], modules_to_save=["norm"]
    )
    adapted: Any = get_peft_model(base, settings).eval()
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.add_(torch.randn(parameter.shape, generator=draw) * 0.05)
        kept = {n: p.clone() for n, p in adapted.named_parameters() if "base_layer" in n}
        wanted = adapted(torch.tensor([IDS])).logits[0, -1].log_softmax(-1)
    assert {name for name, _ in weights(adapted)} == {n for n, _ in nano().named_parameters()}
    sync(weights(adapted), engine, 1)
    made = asyncio.run(engine.generate(IDS, Sampling(max_tokens=1), seed=4, key="k"))
    assert made.logprobs is not None
    assert made.logprobs[0] == pytest.approx(float(wanted[made.ids[0]]), abs=1e-4)
    plain = asyncio.run(engine_of(nano()).generate(IDS, Sampling(max_tokens=1), seed=4, key="k"))
    assert plain.logprobs is not None
    assert abs(plain.logprobs[0] - float(wanted[plain.ids[0]])) > 1e-3, "control: it matters"
    named = dict(adapted.named_parameters())
    assert all(torch.equal(named[name], tensor) for name, tensor in kept.items())


def test_a_rank_without_an_engine_goes_through_all_of_them() -> None:
    seen = []
    sync(((name, seen.append(name) or t) for name, t in weights(nano())), None, 1)
    assert len(seen) == len(list(nano().named_parameters()))
