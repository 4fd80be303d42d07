"""Hierarchical RL on nano, stage by stage: held-out accuracy, and calls that succeed at first try.

    python bench/hierarchical.py [--work DIR] [--seeds 3] [--problems 600]

From a snapshot that `tirgen` makes: 1,500 problems of the train split, generated, frozen; then
`tirgen-rl train` from the packaged weights with both levels and with the episode level alone, and
`tirgen-rl eval` of every policy on the packaged held-out problems at temperature 1, as in rollouts.
What is in DIR already is not made again. Prints JSON lines: for each seed with a 95 % bootstrap
interval by question, and the mean over seeds with the least and the greatest of them.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import fmean
from typing import Any

ROOT = Path(__file__).parent.parent
WEIGHTS = ROOT / "shared/nano/weights"
VARIANTS = {"full": (), "episode": ("--set", 'levels=["episode"]')}
STAGES = {
    "start": "the packaged policy",
    "episode": "after RL, episode level alone",
    "full": "after hierarchical RL, both levels",
}


class Work:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.env = os.environ | {"TIRGEN_HOME": str(folder), "OMP_NUM_THREADS": "1"}

    def run(self, module: str, *arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", module, *arguments],
            env=self.env, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True,
        )  # fmt: skip
        return done.stdout

    def snapshot(self) -> None:
        problems = self.folder / "train.jsonl"
        if problems.exists():
            return
        world = self.run("shared.nano.world", "--split", "train", "--count", "1500", "--seed", "21")
        self.run("tirgen", "db", "upgrade")
        part = problems.with_suffix(".part")
        part.write_text(world, encoding="utf-8")
        self.run("tirgen", "generate", str(part), "--run", "nano-train")
        self.run(
            "tirgen", "snapshot", "create", "nano-rl", "--kind", "problems", "--seed", "1",
            "--where", 'run == "nano-train"', "--split", "train=0.85,valid=0.15",
        )  # fmt: skip
        part.rename(problems)

    def train(self, variant: str, seed: int) -> Path:
        out = self.folder / f"{variant}-{seed}"
        if not (out / "model").exists():
            self.run(
                "rl.cli", "train", "--preset", "rl-nano", "--snapshot", "nano-rl",
                "--model", str(WEIGHTS), "--set", "data.split=train", "--set", f"seed={seed}",
                "--set", 'heldout={split="valid",limit=96,every=5}', "--out", str(out),
                *VARIANTS[variant],
            )  # fmt: skip
        return out / "model"

    def figures(self, name: str, model: Path, problems: int, seed: int) -> dict[str, Any]:
        """Figures of one policy by name. The same command goes on with what was stopped."""
        said = self.run(
            "rl.cli", "eval", "--model", str(model), "--benchmark", "nano", "--limit",
            str(problems), "--samples", "1", "--strategy", "none", "--seed", str(seed),
            "--run", f"eval-{name}-{problems}", "--set", "policy.temperature=1.0", "--set",
            "policy.dtype=fp32", "--set", "policy.top_k=-1", "--prompts", "compact",
            "--format", "json",
        )  # fmt: skip
        (evaluation,) = json.loads(said)
        (run,) = evaluation["runs"]
        return {figure["name"]: figure for figure in run["figures"]}


def report(stage: str, metric: str, found: list[dict[str, Any]]) -> None:
    """A line for each seed, with the evaluation's own interval by question, and one for all."""
    for seed, one in enumerate(found):
        line(stage, f"{metric}, seed {seed}", one["value"], low=round(one["low"], 4),
             high=round(one["high"], 4), n=one["n"])  # fmt: skip
    values = [one["value"] for one in found]
    spread = [round(min(values), 4), round(max(values), 4)]
    line(stage, metric, fmean(values), seeds=len(values), spread=spread)


def line(stage: str, metric: str, value: float, **more: Any) -> None:
    fields = {"bench": "hierarchical", "metric": f"{STAGES[stage]}: {metric}"}
    shown = {"value": round(value, 4), "unit": "share", "peer": None, "ratio": None}
    print(json.dumps(fields | shown | more), flush=True)


def main(folder: Path, seeds: int, problems: int) -> None:
    work = Work(folder)
    work.snapshot()
    for stage in STAGES:
        found = []
        for seed in range(seeds):
            model = WEIGHTS if stage == "start" else work.train(stage, seed)
            found.append(work.figures(f"{stage}-{seed}", model, problems, seed))
        for metric in ("accuracy", "first-try call pass rate"):
            report(stage, metric, [one[metric] for one in found])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, help="default: a folder that is removed")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--problems", type=int, default=600)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        main((args.work or Path(scratch)).resolve(), args.seeds, args.problems)
