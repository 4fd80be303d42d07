"""Configurations of the trainer: layers, presets, and what is refused before any work starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from rl.config import (
    PRESETS,
    Common,
    EngineConfig,
    SftConfig,
    TrainConfig,
    batch_arithmetic,
    load,
)
from rl.engine import compiles, deepspeed_config, learning_rate
from shared.errors import ConfigError

EVERY = [(kind, name) for kind, names in PRESETS.items() for name in names]


def rl(*settings: str, **named: Any) -> TrainConfig:
    given = {"preset": "rl-nano", "model": "m", "snapshot": "s"} | named
    return load(TrainConfig, settings=settings, **given)


@pytest.mark.parametrize(("kind", "name"), EVERY)
def test_presets_need_a_model_and_a_snapshot_and_nothing_else(
    kind: type[Common], name: str
) -> None:
    assert load(kind, name, model="m", snapshot="s").model.path == "m"
    with pytest.raises(ConfigError, match=r"model\.path"):
        load(kind, name, snapshot="s")


def test_the_papers_numbers_are_in_its_presets() -> None:
    """method.md 4.2 and 9.2, read off the table there."""
    paper = rl(preset="rl-paper")
    assert (paper.schedule.group, paper.schedule.step_group) == (16, 16)
    assert (paper.loss.eps_low, paper.loss.eps_high, paper.loss.nll_weight) == (0.2, 0.28, 0.01)
    assert (paper.optimizer.lr, paper.rollout.calls, paper.step.l_suf) == (1e-6, 5, 100)
    assert rl(preset="rl-paper-thinking").step.l_suf == 500
    code = rl(preset="rl-authors-code")
    assert (code.schedule.prompts, code.schedule.updates) == (5120, 40)
    assert (code.loss.aggregation, code.loss.levels) == ("token-mean", "mixed")
    assert (code.step.failed, code.rollout.abort_at_failure) == ("first", True)
    assert code.rollout.tokens == 3200
    sft = load(SftConfig, "sft-paper", model="m", snapshot="s")
    assert (sft.epochs, sft.batch_rows, sft.optimizer.lr) == (1, 256, 2e-6)
    assert sft.learn_observations
    assert not load(SftConfig, model="m", snapshot="s").learn_observations
    released = load(SftConfig, "sft-authors-code", model="m", snapshot="s")
    assert (released.epochs, released.batch_rows, released.data.max_length) == (3, 128, 20000)


@pytest.mark.parametrize("suffix", ["toml", "yaml"])
def test_each_layer_covers_the_one_before(suffix: str, tmp_path: Path) -> None:
    file = tmp_path / f"recipe.{suffix}"
    file.write_text(
        'preset = "rl-nano"\n[schedule]\ngroup = 4\nprompts = 6\n'
        if suffix == "toml"
        else "preset: rl-nano\nschedule:\n  group: 4\n  prompts: 6\n"
    )
    chosen = rl("schedule.prompts=7", preset=None, file=file)
    assert (chosen.schedule.group, chosen.schedule.prompts) == (4, 7)
    assert chosen.schedule.step_group == rl().schedule.step_group, "the preset's"


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("schedul.group=4", "did you mean 'schedule'"),
        ("loss.nll_wieght=1", "did you mean 'nll_weight'"),
        ("rollout.tool.timout=1", "did you mean 'timeout'"),
        ("schedule.group=1", "schedule.group"),
        ("levels=[]", "at least one"),
        ("rollout.engine='http'", "base_url"),
        ("rollout={engine='http', base_url='u', save_to='s', temperature=0.6}", "temperature 1"),
        ("rollout.top_p=0.9", "ratios"),
        ("engine.offload_parameters=true", "zero = 3"),
        ("engine.zero=4", "engine.zero"),
        ("credit.std='median'", "credit.std"),
        ("group", "key=value"),
    ],
)
def test_what_is_wrong_is_named(setting: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        rl(setting)


def test_a_file_that_is_none_is_named(tmp_path: Path) -> None:
    for name, text, said in (
        ("a.toml", "x = ", "Not valid TOML"),
        ("b.yaml", "a: [", "Not valid YAML"),
        ("c.yaml", "- a", "mapping"),
        ("d.toml", 'preset = "rl-nanno"', "rl-nano"),
    ):
        file = tmp_path / name
        file.write_text(text)
        with pytest.raises(ConfigError) as error:
            rl(preset=None, file=file)
        assert said in str(error.value)
    with pytest.raises(ConfigError, match="Cannot read"):
        rl(preset=None, file=tmp_path / "none.toml")


def test_the_fingerprint_is_of_what_is_computed() -> None:
    one = rl()
    assert rl("log.project='x'", "checkpoint.every=3").fingerprint == one.fingerprint
    assert rl("seed=1").fingerprint != one.fingerprint
    assert rl("loss.nll_weight=0.02").fingerprint != one.fingerprint


def test_the_batch_arithmetic_adds_up() -> None:
    lines = dict(batch_arithmetic(rl("schedule.updates=4"), 2))
    assert lines["trajectories per rollout"] == "16 x 8 = 128"
    assert lines["prompts per optimizer step"] == "4"
    assert lines["optimizer steps in all"] == "100"
    assert lines["ranks"] == "2"


def test_deepspeed_is_told_what_it_would_get_wrong_by_itself() -> None:
    """trainer.md 5.2: boundary, clipping, its own micro-batches; a user's table comes over it."""
    told = deepspeed_config(rl("engine.max_grad_norm=0.5").engine)
    assert told["managed_gradient_accumulation"] is False
    assert told["gradient_clipping"] == 0.5
    assert told["gradient_accumulation_steps"] == 1
    more = rl('engine.deepspeed={communication_data_type="fp32"}').engine
    assert deepspeed_config(more)["communication_data_type"] == "fp32"


def test_kernels_are_fused_where_that_is_sound(monkeypatch: pytest.MonkeyPatch) -> None:
    """By itself on a GPU in bf16 with whole weights and a C compiler; on demand anywhere else."""
    monkeypatch.setenv("CC", "cc")
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    assert compiles(EngineConfig(), gpu)
    assert not compiles(EngineConfig(), cpu)
    assert not compiles(EngineConfig(zero=3), gpu)
    assert not compiles(EngineConfig(dtype="fp32"), gpu)
    assert compiles(EngineConfig(compile=True), cpu)
    assert not compiles(EngineConfig(compile=False), gpu)
    monkeypatch.delenv("CC")
    monkeypatch.setenv("PATH", "")
    assert not compiles(EngineConfig(), gpu)
    with pytest.raises(ValueError, match="compile needs"):
        EngineConfig(compile=True, zero=3)


def test_the_rate_counts_optimizer_steps() -> None:
    def rates(*settings: str) -> list[float]:
        chosen = rl("optimizer.lr=1.0", *settings).optimizer
        return [round(learning_rate(step, 10, chosen), 4) for step in range(10)]

    assert rates("optimizer.warmup=0", "optimizer.schedule='constant'") == [1.0] * 10
    assert rates("optimizer.warmup=4")[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates("optimizer.warmup=0.4")[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    linear = rates("optimizer.warmup=0", "optimizer.schedule='linear'", "optimizer.least=0.1")
    assert linear[0] == 1.0
    assert linear[5] == pytest.approx(0.55)
    cosine = rates("optimizer.warmup=0", "optimizer.schedule='cosine'")
    assert cosine[5] == pytest.approx(0.5)
    assert cosine == sorted(cosine, reverse=True)
