"""Metrics: every step once in the file whatever happens; trackers by name; curves; the cost of
training in floating-point operations."""

from __future__ import annotations

import json
import logging
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from transformers import LlamaConfig, Qwen2Config, Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig

from rl import curves, flops
from rl.metrics import FILE, open_metrics
from shared.errors import ConfigError

ROOT = Path(__file__).parents[2]


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / FILE).read_text().splitlines()]


def steps(out: Path) -> list[int]:
    return [line["step"] for line in lines(out)]


def log(out: Path, *numbers: int, value: float = 1.0) -> None:
    metrics = open_metrics([], out, None, config={})
    for step in numbers:
        metrics.log(step, {"loss": value})
    metrics.close()


# The file


def test_a_step_is_a_line_of_plain_numbers(tmp_path: Path) -> None:
    metrics = open_metrics([], tmp_path, None, config={})
    metrics.log(3, {"loss": 0.25, "reward/episode": 1, "kl": math.nan, "x": -math.inf})
    (line,) = lines(tmp_path)  # before `close`
    assert line.pop("time") > 1e9
    assert line == {
        "step": 3, "loss": 0.25, "reward/episode": 1.0, "kl": "NaN", "x": "-Infinity",
    }  # fmt: skip
    metrics.close()


@pytest.mark.parametrize(("step", "values"), [(5, {}), (4, {}), (6, {"time": 1.0})])
def test_a_step_is_logged_once_and_in_order(
    tmp_path: Path, step: int, values: dict[str, float]
) -> None:
    metrics = open_metrics([], tmp_path, None, config={})
    metrics.log(5, {"loss": 1.0})
    with pytest.raises(ValueError, match=r"step|not a name"):
        metrics.log(step, values)
    assert steps(tmp_path) == [5]


def test_a_resumed_job_makes_its_steps_anew(tmp_path: Path) -> None:
    """Checkpoint at step 3, killed after 5: steps 4 and 5 are those of the second start alone."""
    log(tmp_path, 1, 2, 3, 4, 5, value=1.0)
    log(tmp_path, 4, 5, 6, value=2.0)
    assert steps(tmp_path) == [1, 2, 3, 4, 5, 6]
    assert [line["loss"] for line in lines(tmp_path)] == [1, 1, 1, 2, 2, 2]


def test_a_job_that_begins_anew_leaves_nothing_of_the_old_one(tmp_path: Path) -> None:
    log(tmp_path, 1, 2, 3, value=1.0)
    log(tmp_path, 1, value=2.0)
    assert [line["loss"] for line in lines(tmp_path)] == [2]


@pytest.mark.parametrize("torn", ['{"step": 4, "time', '{"step": 4', "[]", "null", "\0\0"])
def test_a_torn_last_line_is_dropped(tmp_path: Path, torn: str) -> None:
    log(tmp_path, 1, 2, 3)
    with (tmp_path / FILE).open("a") as file:
        file.write(torn)
    log(tmp_path, 4)
    assert steps(tmp_path) == [1, 2, 3, 4]


KILLED = """
import os, signal, sys
from pathlib import Path
from rl.metrics import open_metrics
metrics = open_metrics([], Path(sys.argv[1]), None, config={})
for step in range(1, 8):
    metrics.log(step, {"loss": 1.0})
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_kill_9_loses_no_step(tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLED, str(tmp_path)]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False)
    assert done.returncode == -signal.SIGKILL
    assert steps(tmp_path) == [1, 2, 3, 4, 5, 6, 7]


# Trackers, which are not installed here: modules that note how they are called


class Noted(SimpleNamespace):
    """Whatever is called on it, it notes by name."""

    def __init__(self, calls: list[tuple[Any, ...]]) -> None:
        super().__init__()
        self.calls = calls

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            self.calls.append((name, arguments, keywords))
            return self

        return call


def fake(monkeypatch: pytest.MonkeyPatch, name: str, **contents: Any) -> None:
    module = ModuleType(name)
    vars(module).update(contents)
    monkeypatch.setitem(sys.modules, name, module)


def test_wandb_gets_one_run_per_folder_with_the_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[Any, ...]] = []
    noted = Noted(calls)
    fake(monkeypatch, "wandb", init=noted.init)
    for first in (1, 2):
        metrics = open_metrics(["wandb"], tmp_path, None, config={"lr": 1}, project="p")
        metrics.log(first, {"loss": 0.5})
        metrics.close()
    (name, _, begun), (_, logged, at), (ended, _, _), (_, _, again), *_ = calls
    assert (name, ended) == ("init", "finish")
    assert begun["project"] == "p"
    assert (begun["name"], begun["config"], begun["resume"]) == (tmp_path.name, {"lr": 1}, "allow")
    assert (logged, at) == (({"loss": 0.5},), {"step": 1})
    assert again["id"] == begun["id"], "a resumed job goes on in the same run"


def test_trackio_speaks_as_wandb_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, ...]] = []
    noted = Noted(calls)
    fake(monkeypatch, "trackio", init=noted.init, log=noted.log, finish=noted.finish)
    metrics = open_metrics(["trackio"], tmp_path, None, config={"lr": 1})
    metrics.log(7, {"loss": 0.5})
    metrics.close()
    assert [call[0] for call in calls] == ["init", "log", "finish"]
    assert calls[0][2]["resume"] == "allow"
    assert calls[1][1:] == (({"loss": 0.5},), {"step": 7})


def test_tensorboard_purges_the_steps_that_are_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[Any, ...]] = []
    fake(monkeypatch, "tensorboard")
    fake(monkeypatch, "torch.utils.tensorboard", SummaryWriter=Noted(calls).open)
    metrics = open_metrics(["tensorboard"], tmp_path, None, config={})
    metrics.log(4, {"loss": 0.5, "kl": 0.25})
    metrics.close()
    assert calls[0] == ("open", (), {"log_dir": str(tmp_path / "tensorboard"), "purge_step": 4})
    assert [c[1] for c in calls if c[0] == "add_scalar"] == [("loss", 0.5, 4), ("kl", 0.25, 4)]


@pytest.mark.parametrize("name", ["wandb", "trackio", "tensorboard"])
def test_a_tracker_that_is_not_installed_is_named_with_its_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match=name) as caught:
        open_metrics([name], tmp_path, None, config={})
    assert caught.value.remedy == f"pip install '{name}'"


def test_an_unknown_tracker_is_answered_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        open_metrics(["wanbd"], tmp_path, None, config={})
    assert caught.value.remedy == "did you mean 'wandb'?"


def test_a_tracker_that_fails_ends_nothing_and_is_told_of_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise ConnectionError("the network is gone")

    run = SimpleNamespace(log=fails, finish=fails)
    fake(monkeypatch, "wandb", init=lambda **_: run)
    metrics = open_metrics(["wandb"], tmp_path, None, config={})
    with caplog.at_level(logging.WARNING):
        for step in (1, 2, 3):
            metrics.log(step, {"loss": 1.0})
        metrics.close()
    assert steps(tmp_path) == [1, 2, 3]
    assert [r.message for r in caplog.records] == [
        "wandb does not take metrics: ConnectionError: the network is gone"
    ]


# Curves


def test_a_sparkline_rises_with_its_values_and_has_gaps() -> None:
    assert curves.sparkline([0, 1, 2, 3, 4, 5, 6, 7], 8) == "▁▂▃▄▅▆▇█"
    assert curves.sparkline([1, math.nan, 0, math.inf, 1], 9) == "█ ▁ █"
    assert curves.sparkline([2, 2], 9) == "▅▅"
    assert curves.sparkline([], 9) == ""
    assert curves.sparkline([math.nan], 9) == " "


def test_many_values_share_a_character() -> None:
    """Each of four characters is the mean of 250 values; no value is left out."""
    ramp = [float(i) for i in range(1000)]
    assert curves.binned(ramp, 4) == [124.5, 374.5, 624.5, 874.5]
    assert curves.binned([1.0, 2.0, 3.0], 2) == [1.0, 2.5]


def test_a_plot_of_lines_is_the_same_curve_drawn_larger() -> None:
    drawn = curves.plot_lines([0.0, 1.0, 2.0, math.nan], 4, 2)
    assert drawn == [" ▁█ ", "▁██ "]
    flat = curves.plot_lines([float(i) for i in range(16)], 16, 1)
    assert flat[0] == "▁▁▂▂▃▃▄▄▅▅▆▆▇▇██"


def test_curves_come_by_name_with_the_steps_they_have() -> None:
    logged = [(1, {"b": 1, "a": "NaN"}), (2, {"b": 2}), (5, {"b": "Infinity"})]
    a, b = curves.curves(logged)
    assert (a.name, a.steps, a.finite) == ("a", (1,), [])
    assert (b.steps, b.finite) == ((1, 2, 5), [1.0, 2.0])


def test_the_picture_is_a_png_of_every_curve(tmp_path: Path) -> None:
    drawn = [curves.Curve(f"m$_{i}", (1, 2), (0.0, math.nan if i else 1.0)) for i in range(4)]
    curves.picture(drawn, "job $x$", tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ConfigError, match="cannot be written"):
        curves.picture(drawn, "t", tmp_path / "no" / "p.png")
    with pytest.raises(ConfigError, match="no metrics"):
        curves.picture([], "t", tmp_path / "p.png")


# Floating-point operations


def tiny(**changes: Any) -> Qwen3Config:
    return Qwen3Config(
        **{
            "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 3,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6, "vocab_size": 32,
            "tie_word_embeddings": False, **changes,
        }
    )  # fmt: skip


def test_flops_by_hand() -> None:
    """q and o: 8 x 24 each; k and v: 8 x 12 each; three of 8 x 16; head 8 x 32; h d = 24.

    A row of 2 tokens. Weights: 3 (2 192 + 2 96 + 3 128) + 256 = 3136, times 6 each token.
    Attention, each layer, 12 24 per key: full 2 x 2 keys, causal 1 + 2.
    """
    shape = flops.shape(tiny())
    assert (shape.weights, shape.layers, shape.width) == (3136, 3, 24)
    assert flops.training_flops(shape, [2], causal=False) == 2 * 6 * 3136 + 3 * 288 * 4
    assert flops.training_flops(shape, [2], causal=True) == 2 * 6 * 3136 + 3 * 288 * 3
    assert flops.training_flops(shape, [2], causal=True, frozen=True) == (
        2 * 4 * 3136 + 3 * 288 * 3
    )


def test_weights_are_the_models_own_matrices() -> None:
    """Against the model itself: all its matrices but the embedding, which is looked up."""
    model = Qwen3ForCausalLM(tiny())
    counted = sum(
        p.numel()
        for name, p in model.named_parameters()
        if p.dim() == 2 and "embed_tokens" not in name
    )
    assert flops.shape(model.config).weights == counted


def test_packed_rows_cost_what_they_cost_alone() -> None:
    """Two conventions: the same for one token, twice the keys for long rows."""
    shape = flops.shape(tiny())
    for causal in (False, True):
        together = flops.training_flops(shape, [5, 9], causal=causal)
        alone = [flops.training_flops(shape, [n], causal=causal) for n in (5, 9)]
        assert together == sum(alone)
    one = [flops.training_flops(shape, [1], causal=causal) for causal in (False, True)]
    assert one[0] == one[1]
    linear = 6 * shape.weights * 100_000
    full = flops.training_flops(shape, [100_000], causal=False) - linear
    causal = flops.training_flops(shape, [100_000], causal=True) - linear
    assert full / causal == pytest.approx(2, rel=1e-4)


def test_other_architectures_and_their_defaults() -> None:
    """Llama without grouped heads; Qwen2, whose head size is not written down. No experts."""
    llama = LlamaConfig(
        hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        vocab_size=32,
    )  # fmt: skip
    assert flops.shape(llama).weights == 4 * 64 + 3 * 128 + 256
    qwen = Qwen2Config(
        hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=1, vocab_size=32,
    )  # fmt: skip
    assert flops.shape(qwen).weights == 8 * 2 * (8 + 2) + 3 * 128 + 256
    with pytest.raises(ConfigError, match="experts"):
        flops.shape(Qwen3MoeConfig(num_experts=4))


def test_mfu_is_a_share_of_the_peak() -> None:
    assert flops.peak("NVIDIA H100 80GB HBM3") == 989e12
    assert flops.peak("NVIDIA H100 PCIe") == 756e12
    assert flops.peak("cpu") is None
    assert flops.mfu(989e12, 2.0, 989e12, devices=1) == 0.5
    assert flops.mfu(989e12, 2.0, 989e12, devices=2) == 0.25


def test_a_picture_is_of_what_one_looks_at_first() -> None:
    """Not of all seventy; where a program logs none of these, of all it logs."""
    logged = {"zebra": 1.0, "loss": 2.0, "heldout/calls/first_try": 0.5, "calls/first_try": 1.0}
    names = [curve.name for curve in curves.headlines(curves.curves([(1, logged)]))]
    assert names == ["calls/first_try", "heldout/calls/first_try", "loss"]
    others = curves.headlines(curves.curves([(1, {"zebra": 1.0})]))
    assert [curve.name for curve in others] == ["zebra"]
