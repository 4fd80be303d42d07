"""What goes into an episode and what comes out of it; the loop between is `shared/episode.py`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from shared.endpoints.config import Sampling
from shared.errors import ConfigError
from shared.sandbox.observation import Style
from shared.segments import Segment
from shared.trajectory import End, Outcome, Problem, Step, ToolCall, Trajectory


@dataclass(frozen=True, slots=True)
class Correction:
    """Self-correction of a failed call (method.md 5.1, 9.1 no. 4, 9.2 no. 8 to 10).

    strategy: what of r_t is kept when a_t failed: "none" leaves the failure standing, "action"
        keeps all of r_t, "suffix" all but its last `l_suf` tokens (nothing where it is shorter),
        "replan" nothing.
    n_corr, n_corr_total: tries per step and per episode. After the last, the error stays.
    feedback: while it tries again, the policy sees the failed try and its error before what is
        kept of r_t. They are not part of the episode afterwards, so its logprobs belong to
        another context: for evaluation, not for training.
    """

    strategy: Literal["none", "action", "suffix", "replan"] = "none"
    l_suf: int = 100
    n_corr: int = 4
    n_corr_total: int = 12
    feedback: bool = False

    def kept(self, thought: int) -> int:
        """How many of r_t's `thought` tokens stay."""
        match self.strategy:
            case "suffix":
                return max(0, thought - self.l_suf)
            case "replan":
                return 0
            case _:
                return thought


@dataclass(frozen=True, slots=True)
class EpisodeSettings:
    """What an episode may cost, and the choices that the paper leaves open.

    calls: actions that are run (tries of self-correction are not among them); 0 is no tool.
    tokens: of the response, observations included. context: of the prompt and the response.
    sampling: temperature, top_p and top_k; the loop sets max_tokens and the stop string itself.
    after_calls: "notice" injects once, instead of the observation of an action too many, that no
        calls are left, and runs no further block (9.2 no. 12). "free" removes the stop string, as
        the authors' code does; the policy may then write outputs of its own.
    abort_at_failure: end at the first failed call that stands, as the authors' rollouts do.
    infrastructure_tries: of a run that the sandbox fails to make, first one included; the wait
        between them starts at `infrastructure_wait` seconds and doubles.
    """

    calls: int = 5
    tokens: int = 3200
    context: int = 4096
    sampling: Sampling = field(default_factory=Sampling)
    thinking: bool = False
    tool_timeout: float = 10.0
    observation: Style = "paper"
    after_calls: Literal["notice", "free"] = "notice"
    abort_at_failure: bool = False
    infrastructure_tries: int = 3
    infrastructure_wait: float = 0.5
    correction: Correction = Correction()

    def __post_init__(self) -> None:
        least = {
            "calls": (self.calls, 0),
            "tokens": (self.tokens, 1),
            "context": (self.context, 1),
            "infrastructure_tries": (self.infrastructure_tries, 1),
            "correction.l_suf": (self.correction.l_suf, 0),
            "correction.n_corr": (self.correction.n_corr, 0),
            "correction.n_corr_total": (self.correction.n_corr_total, 0),
        }
        for name, (value, minimum) in least.items():
            if value < minimum:
                raise ConfigError(f"{value} is less than {minimum}.", where=name)


@dataclass(frozen=True, slots=True)
class Discarded:
    """A failed try of step `step` (of `Episode.steps`) that self-correction took back.

    segments: the end of r_t that was dropped, if any, and a_t, with the sampler's logprobs.
    """

    step: int
    call: ToolCall
    segments: tuple[Segment, ...]


@dataclass(frozen=True, slots=True)
class Episode:
    """A finished episode.

    segments: the prompt first, then what was sampled and injected. A CODE segment for each call,
        in order; blocks that nobody ran are part of thoughts.
    steps, text: the same as `Trajectory` has them. answer: of the last complete box in prose.
    versions: least and greatest of the weights that sampled it.
    n_turns: texts that the policy wrote between injections; void_turns: those of them that
        neither acted nor answered. Only the last one can be void.
    n_generated: tokens sampled, with those that self-correction or a late stop threw away.
    seconds_generate, seconds_tool: waits of this episode; no two runs agree on them.
    """

    segments: tuple[Segment, ...]
    steps: tuple[Step, ...]
    text: str
    end: End
    answer: str | None
    seed: int
    versions: tuple[int, int]
    n_turns: int
    void_turns: int
    discarded: tuple[Discarded, ...]
    n_generated: int
    seconds_generate: float = field(compare=False)
    seconds_tool: float = field(compare=False)

    @property
    def calls(self) -> tuple[ToolCall, ...]:
        """One per CODE segment, in order."""
        return tuple(step.call for step in self.steps if step.call is not None)

    @property
    def outcomes(self) -> tuple[Outcome, ...]:
        return tuple(call.result.outcome for call in self.calls)

    @property
    def n_retries(self) -> int:
        return len(self.discarded)

    @property
    def n_tokens(self) -> int:
        """Of the response."""
        return sum(len(segment.ids) for segment in self.segments[1:])

    def trajectory(
        self, problem: Problem, thinking: bool, meta: Mapping[str, Any] | None = None
    ) -> Trajectory:
        """The episode as it is stored, queried and judged."""
        return Trajectory(
            problem_key=problem.key,
            steps=self.steps,
            text=self.text,
            end=self.end,
            answer=self.answer,
            thinking=thinking,
            seed=self.seed,
            n_tokens=self.n_tokens,
            meta={
                "n_turns": self.n_turns,
                "void_turns": self.void_turns,
                "n_retries": self.n_retries,
                "n_generated": self.n_generated,
                "versions": list(self.versions),
                "seconds_generate": self.seconds_generate,
                "seconds_tool": self.seconds_tool,
                **(meta or {}),
            },
        )


@dataclass(frozen=True, slots=True)
class StepAttempt:
    """One action from a prefix: what was sampled after it, thought first, and how it went.

    The segments end with the closing fence (of an action) and never hold an EOS. `outcome` and
    `call` are None where the policy took no action.
    """

    segments: tuple[Segment, ...]
    outcome: Outcome | None
    call: ToolCall | None
    version: int
    n_generated: int
    seconds_generate: float = field(compare=False)
    seconds_tool: float = field(compare=False)
