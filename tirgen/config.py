"""What a run is: one frozen, typed object, its presets, and the fingerprint that names it.

A config is read from a preset, then a file, then `key=value` settings, each over the one before.
Everything is checked before any work starts. Two configs with the same fingerprint generate the
same distribution: it covers every field except `NOT_IDENTITY`, and the text of the prompts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AwareDatetime, Field, FiniteFloat, field_validator, model_validator

from shared.config import Section, choose, leaves, merge, merge_settings, read_file, read_toml
from shared.config import parse as parse_section
from shared.endpoints import EndpointConfig, Sampling
from shared.endpoints.config import NOT_IDENTITY as ENDPOINT_NOT_IDENTITY
from shared.prompts import Profile, version
from shared.sandbox.observation import Style
from shared.sandbox.result import Tier
from shared.trajectory import Check, content_hash
from tirgen.code_quality import Rule

PRESETS = ("nano", "nano-think", "paper", "authors-code")

# Where a request goes and how patiently does not change what is asked.
NOT_IDENTITY = frozenset(
    f"{role}.endpoint.{name}"
    for role in ("reasoner", "extractor", "judge")
    for name in ENDPOINT_NOT_IDENTITY
) | {"tool.minimum_tier", "tool.sandbox_url", "in_flight"} | {
    f"limits.{name}" for name in ("max_tokens", "max_cost", "deadline")
}  # fmt: skip


Mark = Annotated[str, Field(min_length=1)]


class Role(Section):
    """A model in one role. Sampling defaults are the paper's (P3, appendix D.1)."""

    endpoint: EndpointConfig
    temperature: float = Field(default=0.6, ge=0, le=10)
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int | None = Field(
        default=50, ge=-1, description="Paper 50, released code 30 (9.2 no. 15)."
    )

    def sampling(self, max_tokens: int, stop: tuple[str, ...] = ()) -> Sampling:
        return Sampling(
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            max_tokens=max_tokens,
            stop=stop,
            include_stop=True,
        )


class ReasonerConfig(Role):
    """π_actor of Alg. 1. Its server must speak vLLM's /tokenize and token-id prompts."""

    thinking: bool = False
    l_step: int = Field(default=512, ge=8, description="L_step: longest step, in tokens.")
    boundary: Literal["paragraph", "window"] = Field(
        default="paragraph",
        description="paragraph: a step ends at a blank line. window: L_step tokens, cut back.",
    )
    cut_at: tuple[Mark, ...] = Field(
        default=("\n\n", ". ", "\n"),
        description="Where a step that reached L_step is cut back to: first that occurs.",
    )
    own_blocks: Literal["execute", "reject"] = Field(
        default="execute", description="A python block that the reasoner wrote itself (9.1 no. 12)."
    )


class ExtractorConfig(Role):
    """π_critic of Alg. 1: judge, extract, convert. It sees one step and nothing else."""

    calls: Literal["one", "three"] = Field(
        default="one", description="one: a JSON reply, three calls if it is unusable (9.2 no. 16)."
    )
    response_format: Literal["text", "json_object", "json_schema"] = "text"
    max_tokens: int = Field(default=2048, ge=16)
    chat_template_kwargs: dict[str, bool | int | FiniteFloat | str] = Field(
        default={"enable_thinking": False},
        description="The critic does not think; {} for other servers.",
    )
    min_overlap: float = Field(
        default=0.6,
        ge=0,
        le=1,
        description="Share of the rewritten step's words that must come, in order, from the step.",
    )


class JudgeConfig(Role):
    """A model's opinion on the final answer; recorded as a verdict, never decides."""

    max_tokens: int = Field(default=8, ge=1)


class Budgets(Section):
    """Per trajectory, each by itself (9.1 no. 2)."""

    calls: int = Field(
        default=5,
        ge=0,
        description="Executed tool calls that stand in the trajectory. 0: the reasoner alone, to "
        "measure what it solves without the tool; nothing of that is ever vetted.",
    )
    steps: int = Field(default=64, ge=1)
    tokens: int = Field(default=4096, ge=16, description="Length of the response, policy's tokens.")


class Correction(Section):
    """Self-correction of a failed call (method.md 5.1, 9.1 no. 4)."""

    strategy: Literal["none", "suffix"] = "none"
    l_suf: int = Field(default=100, ge=1, description="L_suf: tokens dropped from the step's end.")
    n_corr: int = Field(default=4, ge=1, description="N_corr: tries per step.")
    n_corr_total: int = Field(default=12, ge=1, description="Tries per trajectory (9.2 no. 9).")


class Tool(Section):
    timeout: float = Field(default=10.0, gt=0, le=600, description="CPU seconds per call.")
    observation: Style = "paper"
    minimum_tier: Tier = Tier.B
    sandbox_url: str | None = Field(
        default=None,
        min_length=1,
        description="Run code at a server of SandboxFusion's /run_code, not on the worker's host.",
    )

    @field_validator("minimum_tier")
    @classmethod
    def _is_a_wall(cls, tier: Tier) -> Tier:
        if tier is Tier.REMOTE:
            raise ValueError("'remote' says nothing about a wall; set sandbox_url, and A to D here")
        return tier


class VerifierConfig(Section):
    """Which checks decide, in this order, and the rule of code quality (9.2 no. 18)."""

    required: tuple[Check, ...] = (
        Check.EXECUTED,
        Check.FORMAT,
        Check.CALLS_OK,
        Check.REPRODUCED,
        Check.ANSWER,
        Check.CODE_QUALITY,
    )
    trivial: Rule = Field(
        default="syntax",
        description="syntax: no library call and no control flow (paper). lines: at most 5 (code).",
    )
    max_trivial: float = Field(
        default=0.4,
        ge=0,
        le=1,
        description="Trivial blocks allowed: ceil(share x blocks), never all of them.",
    )

    @field_validator("required")
    @classmethod
    def _tools_are_used_and_no_model_decides(cls, required: tuple[Check, ...]) -> tuple[Check, ...]:
        if Check.EXECUTED not in required:
            raise ValueError(f"{Check.EXECUTED.value!r} must be among them")
        if Check.JUDGE in required:
            raise ValueError(f"{Check.JUDGE.value!r} is recorded only, it cannot decide")
        return required


class Limits(Section):
    """When a run is stopped, to be resumed with more (tirgen/budgets.py)."""

    max_tokens: int | None = Field(
        default=None, ge=1, description="Prompt and completion tokens, all roles."
    )
    max_cost: float | None = Field(default=None, gt=0, description="In the money of the prices.")
    deadline: AwareDatetime | None = None


class RunConfig(Section):
    prompts: Profile = "full"
    seed: int = 0
    in_flight: int = Field(
        default=32, ge=1, le=1000, description="Samples at once per worker process."
    )
    reasoner: ReasonerConfig
    extractor: ExtractorConfig
    judge: JudgeConfig | None = None
    budgets: Budgets = Budgets()
    correction: Correction = Correction()
    tool: Tool = Tool()
    verifier: VerifierConfig = VerifierConfig()
    limits: Limits = Limits()

    @model_validator(mode="after")
    def _cost_has_prices(self) -> Self:
        roles = [self.reasoner, self.extractor, *([self.judge] if self.judge else [])]
        prices = (r.endpoint.prompt_price + r.endpoint.completion_price for r in roles)
        if self.limits.max_cost is not None and not any(prices):
            raise ValueError(
                "limits.max_cost needs prices: set reasoner.endpoint.prompt_price, completion_price"
            )
        return self

    def identity(self) -> dict[str, Any]:
        """Field path -> value for every field that decides what is generated."""
        fields = {path: value for path, value in leaves(self) if path not in NOT_IDENTITY}
        return {**fields, "prompts.version": version(self.prompts)}

    @property
    def fingerprint(self) -> str:
        return content_hash(self.identity())[:16]


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """One line for every field of two identities that differs."""
    return [
        f"{path}: {_shown(old, path)} in the run, {_shown(new, path)} now"
        for path in sorted(old.keys() | new.keys())
        if path not in old or path not in new or old[path] != new[path]
    ]


def load(
    preset: str = "nano",
    file: Path | None = None,
    settings: Iterable[str] = (),
    base_url: str | None = None,
    model: str | None = None,
) -> RunConfig:
    """Preset < file < base_url and model (all roles) < settings. Raises ConfigError naming the key.

    `settings` are `key=value` with a TOML value ("budgets.calls=3"); a bare word is a string.
    """
    choose(preset, PRESETS, "preset", "--preset")
    text = files("tirgen").joinpath("presets", f"{preset}.toml").read_text(encoding="utf-8")
    values = read_toml(text, f"preset {preset}")
    return _layered(values, f"preset {preset}", file, settings, base_url, model)


def override(
    config: RunConfig,
    file: Path | None = None,
    settings: Iterable[str] = (),
    base_url: str | None = None,
) -> RunConfig:
    """`config` < file < base_url < settings. Raises ConfigError as `load` does."""
    values = config.model_dump(mode="json")
    return _layered(values, "the run's own configuration", file, settings, base_url, None)


def _layered(
    values: dict[str, Any],
    where: str,
    file: Path | None,
    settings: Iterable[str],
    base_url: str | None,
    model: str | None,
) -> RunConfig:
    if file is not None:
        merge(values, read_file(file))
    asked = {name: value for name, value in (("base_url", base_url), ("model", model)) if value}
    for role in ("reasoner", "extractor", "judge"):
        if asked and isinstance(values.get(role), dict):
            merge(values[role], {"endpoint": asked})
    merge_settings(values, settings)
    return parse(values, str(file) if file else where)


def parse(values: Mapping[str, Any], where: str) -> RunConfig:
    """Validate; every wrong key is named, an unknown one with its nearest neighbour."""
    remedy = "`tirgen generate --show-config` prints every key with its value."
    return parse_section(RunConfig, values, where, remedy)


def _shown(identity: Mapping[str, Any], path: str) -> str:
    return repr(identity[path]) if path in identity else "absent"
