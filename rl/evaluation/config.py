"""What an evaluation is: one policy on one benchmark, typed, and the fingerprint that names it.

Two evaluations with the same fingerprint draw from the same distribution: it covers all but
addresses, patience and how many attempts are under way at once. Figures are printed with what is
here, so that no two of them are compared without seeing in what they differ.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from shared.config import Section, leaves, merge, merge_settings, parse, read_file
from shared.endpoints import EndpointConfig, Sampling
from shared.endpoints.config import NOT_IDENTITY as ENDPOINT_NOT_IDENTITY
from shared.episode_records import Correction, EpisodeSettings
from shared.prompts import Profile, version
from shared.sandbox.observation import Style
from shared.sandbox.result import Tier
from shared.trajectory import content_hash

# Where a request goes, how patiently, and how many at once does not change what is drawn.
NOT_IDENTITY = frozenset(
    f"{role}.{name}"
    for role in ("policy.endpoint", "judge.endpoint")
    for name in ENDPOINT_NOT_IDENTITY
) | {"tool.minimum_tier", "tool.sandbox_url", "in_flight", "policy.slots", "policy.model",
     "policy.tokenizer", "benchmark.source", "benchmark.title"}  # fmt: skip


class BenchmarkInfo(Section):
    """What was measured on. `digest` is over its problems, in order."""

    name: str
    title: str = ""
    kind: Literal["math", "code"] = "math"
    source: str
    n: int
    digest: str


class PolicyConfig(Section):
    """The policy and how it is sampled; defaults are those of method.md 5.1."""

    engine: Literal["local", "http", "text"] = Field(
        default="local",
        description="local: a Hugging Face folder, run here. http: token ids to a vLLM or nano "
        "server. text: any server of OpenAI's /completions; without a tokenizer, budgets and L_suf "
        "count characters and the prompt has no chat template.",
    )
    model: str | None = Field(default=None, description="local: a folder, or a name on the Hub.")
    endpoint: EndpointConfig | None = Field(default=None, description="http, text: the server.")
    tokenizer: str | None = Field(
        default=None, description="http, text: folder or name of the server's tokenizer."
    )
    weights: str = Field(default="", description="Digest of a local folder's files.")
    prompts: Profile = "full"
    thinking: bool = False
    dtype: Literal["fp32", "bf16"] = "bf16"
    slots: int = Field(default=64, ge=1, description="local: sequences at once.")
    temperature: float = Field(default=0.6, ge=0, le=10)
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int | None = Field(default=50, ge=-1)

    @model_validator(mode="after")
    def _address(self) -> PolicyConfig:
        if self.engine == "local" and self.model is None:
            raise ValueError("engine = 'local' needs a model")
        if self.engine != "local" and self.endpoint is None:
            raise ValueError(f"engine = {self.engine!r} needs an endpoint")
        return self

    @property
    def label(self) -> str:
        """What it is called in tables."""
        if self.engine == "local":
            return "/".join(Path(self.model or "").parts[-2:])  # "model" alone says little
        assert self.endpoint is not None
        return self.endpoint.model


class Budgets(Section):
    """Per attempt, each by itself (method.md 9.1 no. 2, 9.2 no. 11 and 12)."""

    calls: int = Field(default=5, ge=0, description="Executed calls that stand; 0: no tool.")
    tokens: int = Field(default=4096, ge=1, description="Of the response.")
    context: int = Field(default=8192, ge=16, description="Of prompt and response.")
    after_calls: Literal["notice", "free"] = "notice"


class Tool(Section):
    timeout: float = Field(default=10.0, gt=0, le=600, description="CPU seconds per call.")
    tests_timeout: float = Field(
        default=30.0, gt=0, le=600, description="CPU seconds for all tests of a code task."
    )
    observation: Style = "paper"
    minimum_tier: Tier = Tier.B
    sandbox_url: str | None = None

    @field_validator("minimum_tier")
    @classmethod
    def _is_a_wall(cls, tier: Tier) -> Tier:
        if tier is Tier.REMOTE:
            raise ValueError("'remote' says nothing about a wall; set sandbox_url, and A to D here")
        return tier


class JudgeConfig(Section):
    """A model's opinion on the final answer, beside the rules' and never instead of it."""

    endpoint: EndpointConfig
    prompts: Profile = "full"
    max_tokens: int = Field(default=8, ge=1)


class EvaluationConfig(Section):
    benchmark: BenchmarkInfo
    policy: PolicyConfig
    samples: int = Field(default=1, ge=1, description="n: attempts per question.")
    seed: int = 0
    budgets: Budgets = Budgets()
    correction: Correction = Correction()
    tool: Tool = Tool()
    judge: JudgeConfig | None = None
    in_flight: int = Field(default=64, ge=1, le=1000, description="Attempts at once.")

    def identity(self) -> dict[str, Any]:
        """Field path -> value for every field that decides what is measured.

        Not the number of samples: each has a seed of its own, and more may be added later.
        """
        fields = {path: value for path, value in leaves(self) if path not in NOT_IDENTITY}
        fields.pop("samples")
        if not self.policy.weights:  # a name on the Hub
            fields["policy.model"] = self.policy.model
        return {**fields, "prompts.version": version(self.policy.prompts)}

    @property
    def fingerprint(self) -> str:
        return content_hash(self.identity())[:16]

    def episode(self) -> EpisodeSettings:
        policy, budgets, tool = self.policy, self.budgets, self.tool
        return EpisodeSettings(
            calls=budgets.calls,
            tokens=budgets.tokens,
            context=budgets.context,
            after_calls=budgets.after_calls,
            sampling=Sampling(
                temperature=policy.temperature, top_p=policy.top_p, top_k=policy.top_k
            ),
            thinking=policy.thinking,
            tool_timeout=tool.timeout,
            observation=tool.observation,
            correction=self.correction,
        )


def build(
    values: dict[str, Any], file: Path | None = None, settings: Iterable[str] = ()
) -> EvaluationConfig:
    """`values` of the command line < file < settings. Raises ConfigError naming the key."""
    if file is not None:
        merge(values, read_file(file))
    merge_settings(values, settings)
    return read(values, str(file) if file else "the command line")


def read(values: Mapping[str, Any], where: str) -> EvaluationConfig:
    return parse(EvaluationConfig, values, where, "`--dry-run` prints every key with its value")


def differences(one: EvaluationConfig, other: EvaluationConfig) -> list[str]:
    """One line for every setting of identity in which two evaluations differ."""
    old, new = one.identity(), other.identity()
    return [
        f"{path}: {old.get(path)!r} and {new.get(path)!r}"
        for path in sorted(old.keys() | new.keys())
        if old.get(path) != new.get(path)
    ]
