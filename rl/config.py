"""What a training job is told: typed, from a preset, a file and `--set`, checked before any work.

Three programs, three configurations (`SftConfig`, `TrainConfig`, and the evaluation's own) that
share their sections. Presets are files in `rl/presets`; each names every choice it makes that the
paper and its release leave open (method.md 9.2). `batch_arithmetic` is the page that says which
batch is which; `--dry-run` prints it.
"""

from __future__ import annotations

from collections.abc import Iterable
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, model_validator

from rl.credit import CreditSettings
from rl.loss import Aggregation, LossSettings
from rl.render import Format
from rl.steps import StepSettings
from shared.config import Section, choose, merge, merge_settings, parse, read_file, read_toml
from shared.prompts import Profile
from shared.sandbox.observation import Style
from shared.sandbox.result import Tier
from shared.trajectory import content_hash

# Where a job writes and whom it tells changes nothing about what it computes.
NOT_IDENTITY = (
    "log", "checkpoint", "data.url", "rollout.base_url", "rollout.save_to", "rollout.sleep",
    "rollout.transfer",
)  # fmt: skip


class Lora(Section):
    rank: int = Field(default=16, ge=1)
    alpha: int = Field(default=32, ge=1)
    targets: str | tuple[str, ...] = Field(
        default="all-linear", description="Names of modules, or all-linear."
    )


class ModelConfig(Section):
    path: str = Field(description="A Hugging Face folder, or a name on the Hub.")
    fresh: bool = Field(default=False, description="Take the architecture, draw new weights.")
    prompts: Profile = "full"
    format: Format = Format.PAPER
    thinking: bool = False
    attention: str = Field(
        default="rows",
        description="rows: packed rows each by itself (rl/attention.py); or a name of "
        "transformers: sdpa, eager, flash_attention_2.",
    )
    recompute: int = Field(
        default=0, ge=0, description="0: keep activations. n: recompute those of each n-th layer."
    )
    logits_chunk: int = Field(default=1024, ge=1, description="Loss tokens per chunk of logits.")
    lora: Lora | None = None


class DataConfig(Section):
    snapshot: str = Field(
        description="A snapshot of the database, or an exported folder; sft: `nano`, its teacher."
    )
    url: str | None = Field(default=None, description="Its database; default as for tirgen.")
    split: str | None = Field(default=None, description="Only this split of it.")
    max_length: int = Field(
        default=4096, ge=16, description="Longer rows are left out, and counted."
    )


class OptimizerConfig(Section):
    kind: Literal["adamw", "sgd"] = "adamw"
    lr: float = Field(default=1e-6, gt=0)
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.01, ge=0, description="Of matrices only.")
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup: float = Field(
        default=0, ge=0, description="Optimizer steps until the full rate; below 1, share of all."
    )
    least: float = Field(default=0.0, ge=0, le=1, description="Share of the rate at the end.")


class EngineConfig(Section):
    zero: Literal[0, 1, 2, 3] = 2
    dtype: Literal["bf16", "fp32"] = "bf16"
    offload_optimizer: bool = False
    offload_parameters: bool = Field(default=False, description="ZeRO-3 only.")
    max_grad_norm: float | None = Field(default=1.0, gt=0, description="Null: no clipping.")
    timeout_minutes: float = Field(default=120, gt=0, description="Of every collective.")
    token_budget: int = Field(default=8192, ge=16, description="Tokens of a micro-batch.")
    compile: bool | None = Field(
        default=None,
        description="Fuse kernels by torch.compile, which takes half a minute at the start. "
        "Null: on a GPU with a C compiler, in bf16, unless zero = 3.",
    )
    layout: Literal["packed", "padded"] = "packed"
    deepspeed: dict[str, Any] = Field(default={}, description="Put over the DeepSpeed config.")

    @model_validator(mode="after")
    def _offload(self) -> EngineConfig:
        if self.offload_parameters and self.zero != 3:
            raise ValueError("offload_parameters needs zero = 3")
        if self.offload_optimizer and self.zero == 0:
            raise ValueError("offload_optimizer needs zero = 1, 2 or 3")
        if self.compile and self.zero == 3:
            raise ValueError("compile needs zero = 0, 1 or 2: whole weights")
        return self


Tracker = Literal["wandb", "tensorboard", "trackio"]


class LogConfig(Section):
    trackers: tuple[Tracker, ...] = ()
    project: str = "tirgen-rl"


class CheckpointConfig(Section):
    every: int = Field(default=50, ge=0, description="Optimizer steps; 0: only at the end.")
    keep: int = Field(default=2, ge=1, description="The newest so many.")


class Common(Section):
    seed: int = 0
    model: ModelConfig
    data: DataConfig
    optimizer: OptimizerConfig = OptimizerConfig()
    engine: EngineConfig = EngineConfig()
    log: LogConfig = LogConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()

    @property
    def fingerprint(self) -> str:
        """Equal for jobs that compute the same."""
        values = self.model_dump(mode="json")
        for path in NOT_IDENTITY:
            section, _, key = path.partition(".")
            if key:
                values.get(section, {}).pop(key, None)
            else:
                values.pop(section, None)
        return content_hash(values)[:16]


class SftConfig(Common):
    """`tirgen-rl sft`: the cold start. Eq. 3 of the paper, observations masked unless asked."""

    epochs: int = Field(default=1, ge=1)
    batch_rows: int = Field(default=256, ge=1, description="Snapshot rows per optimizer step.")
    max_steps: int | None = Field(default=None, ge=1)
    learn_observations: bool = Field(
        default=False, description="Loss on tool output too: the paper's Eq. 3 (9.2 no. 13)."
    )
    aggregation: Aggregation = "token-mean"


class Tool(Section):
    timeout: float = Field(default=10.0, gt=0, le=600, description="CPU seconds per call.")
    observation: Style = "paper"
    minimum_tier: Tier = Tier.B
    sandbox_url: str | None = None


class Stage(Section):
    """From this rollout on, so many calls per trajectory."""

    rollout: int = Field(ge=0)
    calls: int = Field(ge=0)


class RolloutConfig(Section):
    engine: Literal["local", "http"] = "local"
    base_url: str | None = Field(default=None, description="http: a vLLM or nano server, /v1.")
    served_model: str = Field(default="policy", description="http: its name there.")
    transfer: Literal["folder", "nccl"] = Field(
        default="folder", description="http: how new weights get there; nccl is from GPU to GPU."
    )
    save_to: str | None = Field(
        default=None, description="folder: one that the server can read too."
    )
    sleep: bool = Field(
        default=False,
        description="http: vLLM (--enable-sleep-mode) on the trainer's own GPU gives up its memory "
        "while the policy is trained.",
    )
    slots: int = Field(default=64, ge=1, description="local: sequences at once.")
    temperature: float = Field(default=1.0, gt=0)
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int = Field(default=-1, ge=-1)
    calls: int = Field(default=5, ge=0, description="Executed tool calls per trajectory.")
    tokens: int = Field(default=3200, ge=16, description="Length of a response.")
    context: int = Field(default=4096, ge=32, description="Prompt and response.")
    abort_at_failure: bool = Field(
        default=False, description="End a trajectory at its first failed call (authors' code)."
    )
    in_flight: int = Field(default=256, ge=1, description="Trajectories at once, per rank.")
    overlap: bool = Field(
        default=False, description="Sample the next rollout while this one is trained on."
    )
    tool: Tool = Tool()

    @model_validator(mode="after")
    def _address(self) -> RolloutConfig:
        if self.engine == "http" and not self.base_url:
            raise ValueError("engine = 'http' needs base_url")
        if self.engine == "http" and self.transfer == "folder" and not self.save_to:
            raise ValueError("transfer = 'folder' needs save_to, a folder that the server can read")
        if self.sleep and (self.engine != "http" or self.overlap):
            raise ValueError("sleep needs engine = 'http', and overlap = false: one or the other")
        if self.engine == "http" and self.temperature != 1:
            raise ValueError("a server tells log-probabilities at temperature 1 only; sample at 1")
        if self.top_p != 1.0 or self.top_k != -1:
            raise ValueError(
                "top_p and top_k cut the support of the sampler, not of the trainer: wrong ratios"
            )
        return self


class Schedule(Section):
    rollouts: int = Field(default=100, ge=1, description="Rounds of sampling and training.")
    prompts: int = Field(default=128, ge=1, description="Groups wanted per rollout.")
    updates: int = Field(default=1, ge=1, description="Optimizer steps per rollout (9.2 no. 24).")
    group: int = Field(default=16, ge=2, description="G: trajectories per prompt.")
    step_group: int = Field(default=16, ge=2, description="G of the step level.")
    refill_cap: float = Field(
        default=2.0, ge=1, description="Sample at most so many times `prompts` to fill up."
    )
    curriculum: tuple[Stage, ...] = Field(default=(), description="Calls, by rollout (no. 25).")

    def calls(self, rollout: int, default: int) -> int:
        past = [stage for stage in self.curriculum if stage.rollout <= rollout]
        return max(past, key=lambda s: s.rollout).calls if past else default


class HeldOut(Section):
    """Problems of another split of the snapshot, to measure progress on."""

    split: str
    every: int = Field(default=10, ge=1, description="Rollouts; also before the first and at last.")
    limit: int = Field(default=256, ge=1)
    samples: int = Field(default=1, ge=1)


class TrainConfig(Common):
    """`tirgen-rl train`: hierarchical RL."""

    levels: tuple[Literal["episode", "step"], ...] = ("episode", "step")
    schedule: Schedule = Schedule()
    rollout: RolloutConfig = RolloutConfig()
    credit: CreditSettings = CreditSettings()
    step: StepSettings = StepSettings()
    loss: LossSettings = LossSettings()
    heldout: HeldOut | None = None
    old_logprobs: Literal["trainer", "sampler"] = Field(
        default="trainer",
        description="pi_old by a forward pass of the trainer, or the sampler's own (no TIS then).",
    )

    @model_validator(mode="after")
    def _levels(self) -> TrainConfig:
        if not self.levels:
            raise ValueError("levels: at least one of episode, step")
        return self


PRESETS: dict[type[Common], tuple[str, ...]] = {
    SftConfig: ("sft-paper", "sft-authors-code", "sft-nano"),
    TrainConfig: (
        "rl-paper", "rl-paper-thinking", "rl-authors-code", "rl-authors-code-thinking", "rl-nano",
    ),
}  # fmt: skip

C = TypeVar("C", bound=Common)


def load(
    kind: type[C],
    preset: str | None = None,
    file: Path | None = None,
    settings: Iterable[str] = (),
    model: str | None = None,
    snapshot: str | None = None,
) -> C:
    """Preset < file < model and snapshot < settings. Raises ConfigError naming the key.

    A file may name the preset it stands on: `preset = "rl-paper"`.
    """
    given = read_file(file) if file is not None else {}
    named = given.pop("preset", None)
    preset = preset or named
    values: dict[str, Any] = {}
    if preset is not None:
        choose(str(preset), PRESETS[kind], "preset", "--preset")
        text = files("rl").joinpath("presets", f"{preset}.toml").read_text(encoding="utf-8")
        values = read_toml(text, f"preset {preset}")
    merge(values, given)
    for section, key, value in (("model", "path", model), ("data", "snapshot", snapshot)):
        if value is not None:
            merge(values, {section: {key: value}})
    merge_settings(values, settings)
    where = str(file) if file else f"preset {preset}" if preset else "the command line"
    return parse(kind, values, where, "`--dry-run` prints every key with its value")


Line = Annotated[tuple[str, str], "what, how much"]


def batch_arithmetic(config: Common, world: int) -> list[Line]:
    """Which batch is which, in numbers: what `--dry-run` prints."""
    budget = config.engine.token_budget
    lines: list[Line] = [
        ("ranks", f"{world}"),
        ("tokens of a micro-batch", f"at most {budget} on each rank, rows {config.engine.layout}"),
    ]
    if isinstance(config, SftConfig):
        lines += [
            ("rows per optimizer step", f"{config.batch_rows}, over all ranks"),
            ("micro-batches per step", f"as many as their tokens need: ceil(tokens / {budget})"),
            ("passes over the snapshot", f"{config.epochs}"),
        ]
    if isinstance(config, TrainConfig):
        s = config.schedule
        lines += [
            ("prompts per rollout", f"{s.prompts} that train, of at most "
             f"{int(s.refill_cap * s.prompts)} sampled"),
            ("trajectories per rollout", f"{s.prompts} x {s.group} = {s.prompts * s.group}"),
            ("step-level regenerations", f"at most {int(config.step.share * s.prompts)} x "
             f"{s.step_group}" if "step" in config.levels else "none"),
            ("optimizer steps per rollout", f"{s.updates}"),
            ("prompts per optimizer step", f"{s.prompts / s.updates:g}"),
            ("optimizer steps in all", f"{s.rollouts * s.updates}"),
        ]  # fmt: skip
    return lines
