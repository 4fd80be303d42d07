"""A job that was killed goes on as if it had not been (trainer.md 4.3 H, 32 and 33).

Claim. 2k steps == k steps + kill -9 in mid-step + resume + k steps: parameters, optimizer, rate,
position in the data and metrics, bit for bit, with two ranks under ZeRO-2. On another number of
ranks the same rows are trained on, and sums are added in another order.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests import ranks
from tirgen.stack import WEIGHTS

STEPS, EVERY = 6, 2
SFT = [
    "sft", "--preset", "sft-nano", "--model", str(WEIGHTS),
    "--set", f"max_steps={STEPS}", "--set", f"checkpoint.every={EVERY}",
    "--set", "checkpoint.keep=9", "--set", "batch_rows=6", "--set", "engine.zero=2",
    "--set", "engine.token_budget=400",
]  # fmt: skip

Folder = Callable[[str], Path]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    base = tmp_path_factory.mktemp("resume")
    return lambda name: base / name


def run(folder: Folder, name: str, world: int = 2, resume: bool = False) -> Path:
    out = folder(name)
    arguments = [*SFT, "--out", str(out), *(["--resume"] if resume else [])]
    ranks.run("rl.cli", arguments, world, {"TIRGEN_HOME": str(folder("home"))})
    return out


@pytest.fixture(scope="module")
def whole(folder: Folder) -> Path:
    return run(folder, "whole")


@pytest.fixture(scope="module")
def killed(folder: Folder) -> Path:
    """Killed, all ranks, as soon as it has logged a step after its second checkpoint."""
    out = folder("killed")
    processes = ranks.start(
        "rl.cli", [*SFT, "--out", str(out)], 2, {"TIRGEN_HOME": str(folder("home"))}
    )
    wait_for(lambda: len(steps(out)) > 2 * EVERY, processes)
    for process in processes:
        os.kill(process.pid, signal.SIGKILL)
    for process in processes:
        process.wait()
    return out


def wait_for(done: Callable[[], bool], processes: list[ranks.Rank]) -> None:
    ends = time.monotonic() + ranks.PATIENCE
    while not done():
        assert time.monotonic() < ends, "it does not get there"
        assert all(process.poll() is None for process in processes), "it ended by itself"
        time.sleep(0.005)


def steps(out: Path) -> list[dict[str, float]]:
    file = out / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def computed(out: Path) -> list[dict[str, float]]:
    """The metrics without what a clock says."""
    return [
        {k: v for k, v in step.items() if not k.startswith(("time", "speed", "memory"))}
        for step in steps(out)
    ]


def state(out: Path, step: int = STEPS) -> dict[str, Any]:
    """Everything of a checkpoint: tensors of the optimizer, of the model, random state, place."""
    at = out / "checkpoints" / f"step-{step:06d}"
    files = sorted(p for p in at.rglob("*.pt"))
    assert len(files) >= 4, "two ranks' optimizers, a model and two random states"
    found = {str(p.relative_to(at)): torch.load(p, weights_only=False) for p in files}
    return found | {"state": json.loads((at / "state.json").read_text())}


def same(a: Any, b: Any, at: str = "") -> None:
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), at
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), at
        for key in a:
            same(a[key], b[key], f"{at}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), at
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            same(x, y, f"{at}[{i}]")
    elif not callable(a) and type(a).__module__ in ("builtins", "numpy"):
        assert a is b or bool((a == b) if not hasattr(a, "all") else (a == b).all()), at


def test_a_whole_job_has_its_checkpoints_and_its_model(whole: Path) -> None:
    assert [step["step"] for step in steps(whole)] == list(range(1, STEPS + 1))
    assert (whole / "checkpoints" / "latest").read_text() == f"step-{STEPS:06d}"
    assert {p.name for p in (whole / "checkpoints").glob("step-*")} == {
        f"step-{n:06d}" for n in (2, 4, 6)
    }
    assert not list((whole / "checkpoints").glob(".*"))
    assert (whole / "model" / "model.safetensors").exists()


def test_a_killed_job_goes_on_bit_for_bit(folder: Folder, whole: Path, killed: Path) -> None:
    """Control: where it was killed, it was not yet where the whole one ended."""
    assert (killed / "checkpoints" / "latest").read_text() == f"step-{2 * EVERY:06d}"
    assert 2 * EVERY < len(steps(killed)) < STEPS or len(steps(killed)) == STEPS - 1
    run(folder, "killed", resume=True)
    same(state(whole), state(killed))
    assert computed(killed) == computed(whole)
    a, b = (load_file(out / "model" / "model.safetensors") for out in (whole, killed))
    same(a, b)
    with pytest.raises(AssertionError):
        same(state(whole), state(whole, step=4))


def test_a_checkpoint_of_two_ranks_is_gone_on_from_by_one(folder: Folder, whole: Path) -> None:
    """From step 4, by a world of one: the optimizer's moments arrive, so the rest is the same to
    rounding. Control: with moments of zero the first step would be as large as the rate allows."""
    out = folder("other")
    out.mkdir()
    (out / "checkpoints").mkdir()
    at = "step-000004"
    subprocess.run(["cp", "-r", whole / "checkpoints" / at, out / "checkpoints"], check=True)
    (out / "checkpoints" / "latest").write_text(at)
    run(folder, "other", world=1, resume=True)
    a, b = (load_file(o / "model" / "model.safetensors") for o in (whole, out))
    before = load_file(WEIGHTS / "model.safetensors")
    moved = max(float((a[name] - before[name]).abs().max()) for name in a)
    apart = max(float((a[name] - b[name]).abs().max()) for name in a)
    assert apart < 1e-3 * moved
    assert [step["loss"] for step in steps(out)] == pytest.approx(
        [step["loss"] for step in steps(whole)[4:]], rel=1e-4
    )


def test_another_configuration_is_refused(folder: Folder, whole: Path) -> None:
    arguments = [*SFT, "--set", "optimizer.lr=1e-5", "--out", str(whole), "--resume"]
    (process,) = ranks.start("rl.cli", arguments, 1, {"TIRGEN_HOME": str(folder("home"))})
    assert process.wait() == 2
    said = process.said()
    assert "made from something else" in said
    assert "fingerprint" in said
