"""TRL's trainers on given rows, for bench/trainer.py: in a process of their own, step by step.

Timed of a step is what its trainer does between its callbacks `on_step_begin` and `on_step_end`:
forward, backward, clipping, optimizer and metrics; its collation is outside. Of GRPO the rollout is
taken out too (`_generate_and_score_completions`, which here only hands over ids that were made
before, pads them and normalises given rewards), so that the update is what remains.
The package is of the `bench` extra: pip install 'tirgen[bench]'.
"""

from __future__ import annotations

import importlib.util
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

from rl.packing import TrainRow

NAME = "trl"


def missing() -> str | None:
    """What to do to have it, or None."""
    if importlib.util.find_spec(NAME) is not None:
        return None
    return f"no package {NAME}: pip install 'tirgen[bench]'"


class Spent(NamedTuple):
    """Seconds by the clock and of this process's CPUs; `Spent.now()` are two clocks to subtract."""

    wall: float
    cpu: float

    @classmethod
    def now(cls) -> Spent:
        return cls(time.perf_counter(), time.process_time())

    def less(self, other: Spent) -> Spent:
        return Spent(self.wall - other.wall, self.cpu - other.cpu)


@dataclass(frozen=True)
class Setting:
    """How TRL is told to run: rows of a micro-batch, rows of like length together, no padding."""

    rows: int
    grouped: bool = False
    padding_free: bool = False

    def __str__(self) -> str:
        how = ["padding_free"] * self.padding_free + ["group_by_length"] * self.grouped
        return ", ".join([f"{self.rows} rows a micro-batch", *how])


def serve(
    pipe: Connection,
    program: str,
    size: str,
    rows: Sequence[TrainRow],
    setting: Setting,
    steps: int,
    group: int,
    threads: int,
) -> None:
    """Train `steps` steps of all `rows`; each begins when something comes through the pipe, and
    ends with its `Spent` going back. Then goes what its own log says of the first loss, and the
    bytes of memory that training took at its peak.
    """
    import resource

    import torch

    torch.set_num_threads(threads)
    from peers.models import make, tokenizer
    from transformers import PrinterCallback

    lm = make(size, "sdpa")
    with tempfile.TemporaryDirectory() as out:
        common = {
            "output_dir": out, "max_steps": steps, "per_device_train_batch_size": setting.rows,
            "gradient_accumulation_steps": len(rows) // setting.rows, "learning_rate": 1e-5,
            "lr_scheduler_type": "constant", "max_grad_norm": 1.0, "gradient_checkpointing": False,
            "report_to": [], "save_strategy": "no", "logging_strategy": "steps", "logging_steps": 1,
            "disable_tqdm": True, "use_cpu": not torch.cuda.is_available(),
            "bf16": torch.cuda.is_available(), "seed": 0,
        }  # fmt: skip
        make_trainer = _sft if program == "sft" else _grpo
        trainer = make_trainer(lm, tokenizer(), rows, setting, group, common)
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(_clock(pipe, trainer))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        trainer.train()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    on_gpu = torch.cuda.is_available()
    memory = torch.cuda.max_memory_allocated() if on_gpu else 1024 * (peak - before)
    pipe.send((losses[0], memory))
    pipe.recv()
    os._exit(0)  # nothing to keep, and no threads to wait for


def _clock(pipe: Connection, trainer: Any) -> Any:
    from transformers import TrainerCallback

    class Clock(TrainerCallback):  # type: ignore[misc]
        began = Spent(0.0, 0.0)

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            pipe.recv()
            trainer.aside = Spent(0.0, 0.0)
            self.began = Spent.now()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            pipe.send(Spent.now().less(self.began).less(trainer.aside))

    return Clock()


def _sft(
    lm: Any, tokenizer: Any, rows: Sequence[TrainRow], setting: Setting, group: int, common: Any
) -> Any:
    """Labels are given, so that the loss tokens are ours: prompts and observations are -100."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    labels = [
        [i if learn else -100 for i, learn in zip(row.ids, row.learn, strict=True)] for row in rows
    ]
    data = Dataset.from_dict({"input_ids": [list(row.ids) for row in rows], "labels": labels})
    config = SFTConfig(
        **common,
        max_length=None,
        padding_free=setting.padding_free,
        train_sampling_strategy="group_by_length" if setting.grouped else "random",
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    return SFTTrainer(lm, config, train_dataset=data, processing_class=tokenizer)


def _grpo(
    lm: Any, tokenizer: Any, rows: Sequence[TrainRow], setting: Setting, group: int, common: Any
) -> Any:
    """Completions, their masks and their rewards are given; no KL, no sampler's correction."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    starts = [row.learn.index(True) for row in rows]
    given = {
        "prompt_ids": [list(row.ids[:n]) for row, n in zip(rows, starts, strict=True)],
        "completion_ids": [list(row.ids[n:]) for row, n in zip(rows, starts, strict=True)],
        "env_mask": [list(map(int, row.learn[n:])) for row, n in zip(rows, starts, strict=True)],
        "logprobs": [[0.0] * (len(row.ids) - n) for row, n in zip(rows, starts, strict=True)],
    }

    class Timed(GRPOTrainer):  # type: ignore[misc]
        aside = Spent(0.0, 0.0)

        def _generate_and_score_completions(self, inputs: Any) -> Any:
            began = Spent.now()
            found = super()._generate_and_score_completions(inputs)
            self.aside = Spent.now().less(began)  # once a step
            return found

    def rewards(completions: Sequence[Any], **_: Any) -> list[float]:
        return [float(n % 2) for n in range(len(completions))]

    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    longest = max(len(ids) for ids in given["completion_ids"])
    config = GRPOConfig(
        **common, num_generations=group, max_completion_length=longest, beta=0.0, loss_type="dapo"
    )
    return Timed(
        lm, rewards, config, processing_class=tokenizer,
        train_dataset=Dataset.from_dict({"prompt": [str(n) for n in range(len(rows) // group)]}),
        rollout_func=lambda prompts, trainer: {name: list(part) for name, part in given.items()},
    )  # fmt: skip
