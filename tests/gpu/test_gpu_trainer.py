"""The trainer on a GPU: what the CPU's tests cannot say. `make gpu`; not part of `make test`.

Claims. The kernels of packed rows are as near to exact attention as sdpa is, and fused layers as
plain ones; a step on the GPU is the step of one plain graph on the CPU, for every ZeRO stage; the
local engine and the trainer agree on what was sampled, in fp32 and bf16; SFT learns, and
hierarchical RL runs. Not shown here: several GPUs, NCCL between them.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import rl.attention
from rl.attention import ROWS, boundaries, bounded
from rl.model import Policy, arguments
from rl.packing import TrainRow, collate
from rl.render import Renderer
from rl.rollout.local import LocalEngine
from shared.endpoints import Sampling
from shared.policy import Generated
from shared.store import Database
from tests import nano_frozen
from tests.integration.test_rl_partition import EXACT, TOLERANCE, distance, reference
from tests.rl_programs.partition import Case
from tests.unit.test_rl_attention import CONFIGS, LENGTHS, model, rows, trained
from tirgen.stack import WEIGHTS

CUDA = torch.device("cuda")
ROOT = Path(__file__).parents[2]


def program(module: str, *arguments: str, env: dict[str, str] | None = None) -> str:
    """`python -m`, on the GPU, in a world of one. Raises AssertionError with its output."""
    ran = subprocess.run(
        [sys.executable, "-m", module, *arguments], cwd=ROOT, env={**os.environ, **(env or {})},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, (ran.stdout + ran.stderr)[-6000:]
    return ran.stdout


# ---- attention ---------------------------------------------------------------------------------


def error(found: tuple[Tensor, Tensor], exact: tuple[Tensor, Tensor]) -> list[float]:
    """Relative, of log-probabilities and of gradients."""
    return [
        float((a.cpu().double() - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True)
    ]


def on_gpu(kind: str, attention: str, *, fuse: bool = False) -> tuple[Tensor, Tensor]:
    lm = model(kind, attention).to(CUDA, torch.bfloat16)
    batch = collate(rows(), 0)
    policy = Policy(lm, chunk=16)
    if fuse:
        policy.fuse()
    logp, _ = policy(*arguments(batch, CUDA))
    (logp * torch.linspace(-1, 1, len(logp), device=CUDA)).sum().backward()
    return logp.detach(), torch.cat([p.grad.flatten() for p in lm.parameters()])


@pytest.mark.parametrize("kind", CONFIGS)
def test_packed_rows_in_bf16_are_as_exact_as_with_a_dense_mask(kind: str) -> None:
    exact = tuple(t.double() for t in trained(model(kind, "eager")))
    ours, theirs = error(on_gpu(kind, ROWS), exact), error(on_gpu(kind, "sdpa"), exact)  # type: ignore[arg-type]
    for mine, dense in zip(ours, theirs, strict=True):
        assert mine < 1.25 * dense + 1e-3, (ours, theirs)


@pytest.mark.parametrize("long", [1, 6, 14])
def test_long_rows_by_cudnn_are_as_exact(long: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """All rows are long, some, one; filled up to 8, which no position may see."""
    monkeypatch.setattr(rl.attention, "LONG", long)
    monkeypatch.setattr(rl.attention, "GRAIN", 8)
    seen: list[int] = []
    inner = rl.attention._long_row
    monkeypatch.setattr(
        rl.attention, "_long_row", lambda q, *rest: seen.append(q.shape[2]) or inner(q, *rest)
    )
    exact = tuple(t.double() for t in trained(model("qwen3", "eager")))
    ours, theirs = error(on_gpu("qwen3", ROWS), exact), error(on_gpu("qwen3", "sdpa"), exact)  # type: ignore[arg-type]
    for mine, dense in zip(ours, theirs, strict=True):
        assert mine < 1.25 * dense + 1e-3, (ours, theirs)
    assert seen == [n for n in LENGTHS if n >= long] * 2, "layers"


@pytest.mark.parametrize("kind", CONFIGS)
def test_fused_kernels_are_as_exact_as_the_plain_ones(kind: str) -> None:
    exact = tuple(t.double() for t in trained(model(kind, "eager")))
    fused, plain = error(on_gpu(kind, ROWS, fuse=True), exact), error(on_gpu(kind, ROWS), exact)  # type: ignore[arg-type]
    for mine, other in zip(fused, plain, strict=True):
        assert mine < 1.25 * other + 1e-3, (fused, plain)


def test_micro_batches_of_other_lengths_are_not_compiled_again() -> None:
    lm = model("qwen3", ROWS).to(CUDA, torch.bfloat16)
    policy = Policy(lm, chunk=16)
    policy.fuse()
    torch._dynamo.reset()  # what other tests have compiled does not count
    torch._dynamo.utils.counters.clear()
    graphs = []
    for n in (5, 4, 3, 3, 5):  # all of more loss tokens than a chunk
        some = collate([row for row in rows()[:n] for _ in range(n)], 0)
        policy(*arguments(some, CUDA))[0].sum().backward()
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[-1] == graphs[1]
    assert graphs[0] > 0, "control: they are counted"


def test_control_joined_rows_are_seen_in_bf16() -> None:
    lm, batch = model("qwen3", ROWS).to(CUDA, torch.bfloat16), collate(rows(), 0)
    ids, positions = batch.ids_BT.to(CUDA), batch.positions_BT.to(CUDA)
    told = boundaries(positions)
    one = bounded([0, sum(LENGTHS)], CUDA)
    apart, joined = (
        lm(input_ids=ids, position_ids=positions, use_cache=False, **bounds).logits[0]
        for bounds in (told, one)
    )
    differs = (apart - joined).abs().amax(-1)
    assert differs[: LENGTHS[0]].max() < 1e-2 < 3e-2 < differs[LENGTHS[0] :].max()


# ---- the step ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stepped(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for stages in ("01", "23"):
        out = tmp_path_factory.mktemp("partition") / f"{stages}.pt"
        program("tests.rl_programs.partition", str(out), stages)
        found |= torch.load(out)
    return found


@pytest.mark.parametrize("case", EXACT, ids=lambda c: c.name)
def test_a_step_is_that_of_one_plain_graph_on_the_cpu(case: Case, stepped: dict[str, Any]) -> None:
    expected, loss, norm = reference(case)
    found = stepped[case.name]
    assert distance(found["change"], expected) < 5 * TOLERANCE  # sums in another order
    assert found["reported"][0]["loss"] == pytest.approx(loss, rel=1e-5)
    assert found["reported"][0]["grad_norm"] == pytest.approx(norm, rel=1e-4)


@pytest.mark.parametrize("zero", range(4))
def test_a_step_in_bf16_is_that_in_its_precision(zero: int, stepped: dict[str, Any]) -> None:
    case = Case(zero=zero, budget=31, dtype="bf16")
    _, loss, norm = reference(case)
    reported = stepped[case.name]["reported"][0]
    assert reported["loss"] == pytest.approx(loss, rel=0.01)
    assert reported["grad_norm"] == pytest.approx(norm, rel=0.03)


# ---- sampler and trainer -----------------------------------------------------------------------


def loaded(dtype: torch.dtype, attention: str = "sdpa") -> Any:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    lm = AutoModelForCausalLM.from_pretrained(WEIGHTS, dtype=dtype, attn_implementation=attention)
    return lm.to(CUDA), AutoTokenizer.from_pretrained(WEIGHTS)


def sampled(dtype: torch.dtype, n: int, at_once: int) -> list[tuple[tuple[int, ...], Generated]]:
    lm, tokenizer = loaded(dtype)
    codec = Renderer(tokenizer, "compact")
    prompts = [codec.prompt(p.text).ids for p, _ in nano_frozen.solved(n)]
    engine = LocalEngine(lm, tokenizer, eos={codec.eos}, slots=at_once, max_len=512)

    async def one(i: int) -> Generated:
        sampling = Sampling(temperature=1.0, max_tokens=128)
        try:
            return await engine.generate(prompts[i], sampling, seed=i, key=str(i))
        finally:
            await engine.release(str(i))

    async def all_of_them() -> list[Generated]:
        return await asyncio.gather(*(one(i) for i in range(n)))

    try:
        return list(zip(map(tuple, prompts), asyncio.run(all_of_them()), strict=True))
    finally:
        engine.close()


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-3), (torch.bfloat16, 0.02)])
def test_the_engine_and_the_trainer_agree_on_what_was_sampled(
    dtype: torch.dtype, limit: float
) -> None:
    """Mean |log pi_trainer - log pi_engine| (trainer.md 4.3, 11)."""
    pairs = sampled(dtype, 32, 16)
    made = [
        TrainRow(
            (*prompt, *reply.ids),
            (False,) * len(prompt) + (True,) * len(reply.ids),
            (0.0,) * len(prompt) + tuple(reply.logprobs or ()),
        )
        for prompt, reply in pairs
    ]
    batch = collate(made, 0)
    with torch.no_grad():
        logp, _ = Policy(loaded(dtype, ROWS)[0])(*arguments(batch, CUDA))
    off = (logp.cpu() - batch.sampler_N).abs()
    print(f"{dtype}: mean {off.mean():.2e}, largest {off.max():.2e}, {len(off)} tokens")
    assert len(off) > 500
    assert off.mean() < limit


def test_a_reply_has_the_same_tokens_in_any_company() -> None:
    alone, together = sampled(torch.bfloat16, 12, 1), sampled(torch.bfloat16, 12, 12)
    assert [r.ids for _, r in alone] == [r.ids for _, r in together]


# ---- jobs --------------------------------------------------------------------------------------


def logged(out: Path) -> list[dict[str, float]]:
    text = (out / "metrics.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def test_sft_in_bf16_learns(tmp_path: Path) -> None:
    settings = ("max_steps=30", "optimizer.warmup=5", "engine.dtype=bf16", "engine.zero=1",
                "model.fresh=true", "engine.token_budget=8192")  # fmt: skip
    sets = [part for one in settings for part in ("--set", one)]
    out = tmp_path / "sft"
    command = ["sft", "--preset", "sft-nano", "--model", str(WEIGHTS), "--out", str(out), *sets]
    program("rl.cli", *command, env={"TIRGEN_HOME": str(tmp_path)})
    losses = [line["loss"] for line in logged(out)]
    assert losses[0] > 6, "control: fresh weights know nothing"
    assert losses[-1] < 0.6 * losses[0]
    assert logged(out)[-1]["memory/peak_bytes"] > 1e6
    assert (out / "model" / "model.safetensors").exists()


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_hierarchical_rl(
    dtype: str, new_database: Callable[[], AbstractContextManager[str]], tmp_path: Path
) -> None:
    out = tmp_path / "rl"
    settings = ("schedule.rollouts=2", "schedule.prompts=8", "data.split=train",
                f"engine.dtype={dtype}", f"engine.zero={int(dtype == 'bf16')}",
                "engine.token_budget=8192")  # fmt: skip
    sets = [part for one in settings for part in ("--set", one)]
    with new_database() as url:
        db = Database(url)
        nano_frozen.freeze(db, "rl", 40, kind="problems")
        db.close()
        command = ["train", "--preset", "rl-nano", "--model", str(WEIGHTS), "--snapshot", "rl"]
        program("rl.cli", *command, "--out", str(out), *sets, env={"TIRGEN_DATABASE_URL": url})
    rounds = [line for line in logged(out) if line.get("rows")]
    assert rounds
    for line in rounds:
        assert line["ratio/mean"] == pytest.approx(1.0, abs=1e-6)
        assert line["mismatch/abs"] < {"fp32": 1e-3, "bf16": 0.02}[dtype]
        assert line["calls/first_try"] > 0.5
