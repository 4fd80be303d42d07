"""Problems, steps and trajectories: what moves through the whole system, and its canonical form.

Everything here is frozen. The canonical form is JSON with sorted keys and no spaces; its SHA-256 is
the content hash by which snapshots name trajectories. The hash covers what was generated (problem,
steps, end), never how fast it was or which host ran it.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from enum import StrEnum
from typing import Any

import orjson

from shared.sandbox.result import CodeError, Outcome, RunResult, Tier

__all__ = [
    "Check",
    "End",
    "Outcome",
    "Problem",
    "Step",
    "ToolCall",
    "Trajectory",
    "Verdict",
    "canonical_json",
    "clean",
    "content_hash",
]


def clean(value: Any) -> tuple[Any, bool]:
    """Replace what PostgreSQL text or JSON cannot hold; say whether anything was replaced.

    NUL and lone surrogates become U+FFFD; NaN and infinities become the strings "NaN", "Infinity"
    and "-Infinity". This is the only place where stored text is altered.
    """
    if isinstance(value, str):
        if value.isascii() and "\0" not in value:
            return value, False
        cleaned = value.replace("\0", "\ufffd").encode("utf-16", "surrogatepass")
        text = cleaned.decode("utf-16", "replace")
        return text, text != value
    if isinstance(value, float) and not math.isfinite(value):
        return ("NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"), True
    if isinstance(value, Mapping):
        pairs = [(clean(str(k)), clean(v)) for k, v in value.items()]
        return {k: v for (k, _), (v, _) in pairs}, any(a or b for (_, a), (_, b) in pairs)
    if isinstance(value, list | tuple):
        items = [clean(v) for v in value]
        return [v for v, _ in items], any(dirty for _, dirty in items)
    return value, False


def canonical_json(value: Any) -> bytes:
    """UTF-8 JSON with sorted keys and no spaces: equal values give equal bytes.

    `json` defines the bytes; orjson makes the same ones several times as fast where it can, which
    is everywhere but with keys that are no texts and with integers beyond 64 bits. The frozen
    dataclasses of this module stand for their fields. Raises ValueError for NaN, infinities and
    lone surrogates: pass the value through `clean` first.
    """
    try:
        return orjson.dumps(_plain(value, _written_out), option=_EXACTLY)
    except TypeError:
        plain = _plain(value)
    text = json.dumps(
        plain, sort_keys=True, ensure_ascii=False, separators=(",", ":"), allow_nan=False
    )
    return text.encode()


_EXACTLY = (  # and nothing that `json` would refuse
    orjson.OPT_SORT_KEYS | orjson.OPT_PASSTHROUGH_DATACLASS | orjson.OPT_PASSTHROUGH_DATETIME
)


def clean_json(value: Any) -> tuple[bytes, bool]:
    """Canonical JSON of the cleaned value, and whether cleaning changed it.

    What encodes at once and has no NUL needs no cleaning, which costs as much as all the rest.
    """
    try:
        plain = canonical_json(value)
    except (TypeError, ValueError):
        plain = b""
    if plain and b"\\u0000" not in plain:
        return plain, False
    cleaned, changed = clean(_plain(value))
    return canonical_json(cleaned), changed


def _written_out(number: float) -> orjson.Fragment:
    """As `json` writes it: orjson writes 1e-05 as 1e-5, and NaN as null."""
    if not math.isfinite(number):
        raise ValueError(f"{number} has no JSON form")
    return orjson.Fragment(repr(number))


def content_hash(value: Any) -> str:
    """SHA-256 (hex) of the canonical form."""
    return hashlib.sha256(canonical_json(value)).hexdigest()


@dataclass(frozen=True, slots=True)
class Problem:
    """One question with its reference answer. `key` is what makes two problems the same."""

    text: str
    answer: str
    source: str = ""
    external_id: str = ""
    subject: str | None = None
    level: str | None = None

    @property
    def key(self) -> str:
        """SHA-256 over text and answer only: labels may be corrected without making a new one."""
        plain, _ = clean_json({"text": self.text, "answer": self.answer})
        return hashlib.sha256(plain).hexdigest()


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One executed action a_t and its observation o_t (`observation` is the text the model saw)."""

    code: str
    observation: str
    result: RunResult


@dataclass(frozen=True, slots=True)
class Step:
    """One step of a trajectory: thought r_t, and the tool call (a_t, o_t) if there is one.

    `thought` is what stands in the trajectory. Where the code extractor rewrote the reasoner's
    text, `original` is the text that it replaced, exactly. `discarded` holds failed attempts that
    self-correction took back, oldest first; they are not part of the trajectory's text.
    """

    thought: str
    call: ToolCall | None = None
    original: str | None = None
    discarded: tuple[ToolCall, ...] = ()


class End(StrEnum):
    """Why generation of a trajectory stopped."""

    ANSWERED = "answered"
    STEP_BUDGET = "step_budget"
    LENGTH_BUDGET = "length_budget"
    GAVE_UP = "gave_up"  # the reasoner ended its turn without a boxed answer
    OWN_BLOCK = "own_block"  # the reasoner wrote a code or output block that nobody executed
    FAILED_CALL = "failed_call"  # a rollout that is not continued after its first failed call
    INFRASTRUCTURE = "infrastructure"  # the sandbox failed for good: nothing to judge


@dataclass(frozen=True, slots=True)
class Trajectory:
    """A finished trajectory τ = (q, r_1, a_1, o_1, …). Tokens are the policy's."""

    problem_key: str
    steps: tuple[Step, ...]
    text: str  # the response as one string: thoughts, code fences and observations
    end: End
    answer: str | None  # content of the last complete \boxed{}
    thinking: bool
    seed: int
    n_tokens: int  # length of `text` in tokens of the policy
    meta: Mapping[str, Any] = field(default_factory=dict)  # models, prompt versions, timings

    @property
    def calls(self) -> tuple[ToolCall, ...]:
        return tuple(step.call for step in self.steps if step.call is not None)

    @property
    def n_calls(self) -> int:
        return len(self.calls)

    @property
    def n_failed_calls(self) -> int:
        """Calls that stand in the trajectory and failed through the model's fault."""
        return sum(
            c.result.outcome not in (Outcome.OK, Outcome.INFRASTRUCTURE_ERROR) for c in self.calls
        )

    def identity(self) -> dict[str, Any]:
        """What the content hash covers: what was generated, without timings, hosts or models."""
        return {
            "problem": self.problem_key,
            "text": self.text,
            "end": self.end.value,
            "answer": self.answer,
            "thinking": self.thinking,
            "steps": [_step_identity(step) for step in self.steps],
        }

    def body(self) -> dict[str, Any]:
        """Everything, as plain JSON values (see `from_body`). Shares what is plain already."""
        body: dict[str, Any] = _plain(self)
        return body

    @classmethod
    def from_body(cls, body: Mapping[str, Any]) -> Trajectory:
        """Inverse of `body` after a trip through JSON."""
        steps = tuple(_step_from(step) for step in body["steps"])
        return cls(**{**body, "steps": steps, "end": End(body["end"])})

    @classmethod
    def from_json(cls, plain: bytes) -> Trajectory:
        """Inverse of `canonical_json`. Raises ValueError, KeyError or TypeError for other texts."""
        made = cls.from_body(orjson.loads(plain))
        # orjson takes an integer beyond 64 bits for a float, and says nothing.
        return cls.from_body(json.loads(plain)) if made._lost_digits() else made

    def _lost_digits(self) -> bool:
        calls = [call for step in self.steps for call in (*step.discarded, step.call) if call]
        numbers = [self.seed, self.n_tokens]
        for call in calls:
            line = call.result.error.line if call.result.error else None
            numbers += (call.result.peak_memory, call.result.bytes_cut, line or 0)
        return float in map(type, numbers) or _is_huge(self.meta)


def _is_huge(value: Any) -> bool:
    """Is there a float in it that no 64 bits could have been?"""
    if isinstance(value, float):
        return abs(value) >= 1 << 63
    if isinstance(value, Mapping):
        return any(map(_is_huge, value.values()))
    return isinstance(value, list) and any(map(_is_huge, value))


def _plain(value: Any, real: Callable[[float], Any] = float) -> Any:
    """Dataclasses as dictionaries, tuples as lists, without the copies that `asdict` makes."""
    kind = type(value)
    names = _FIELDS.get(kind)
    if names is not None:
        return {
            name: one if type(one := getattr(value, name)) in _LEAVES else _plain(one, real)
            for name in names
        }
    if kind is dict:
        return {
            key: one if type(one) in _LEAVES else _plain(one, real) for key, one in value.items()
        }
    if kind is tuple or isinstance(value, list | tuple):
        return [one if type(one) in _LEAVES else _plain(one, real) for one in value]
    if isinstance(value, float):
        return real(value)
    if isinstance(value, Mapping):
        return _plain(dict(value), real)
    return value


_LEAVES = frozenset({str, int, bool, type(None), End, Outcome, Tier})
_FIELDS = {
    kind: tuple(f.name for f in fields(kind))
    for kind in (Trajectory, Step, ToolCall, RunResult, CodeError)
}


def _step_identity(step: Step) -> dict[str, Any]:
    def call(c: ToolCall) -> dict[str, Any]:
        return {"code": c.code, "observation": c.observation, "outcome": c.result.outcome.value}

    return {
        "thought": step.thought,
        "original": step.original,
        "call": call(step.call) if step.call else None,
        "discarded": [call(c) for c in step.discarded],
    }


def _step_from(body: Mapping[str, Any]) -> Step:
    return Step(
        thought=body["thought"],
        call=_call_from(body["call"]) if body["call"] else None,
        original=body["original"],
        discarded=tuple(_call_from(c) for c in body["discarded"]),
    )


def _call_from(body: Mapping[str, Any]) -> ToolCall:
    return ToolCall(body["code"], body["observation"], RunResult.from_json(body["result"]))


class Check(StrEnum):
    """The verifier's checks; each becomes one verdict row per trajectory and verifier version."""

    EXECUTED = "executed"  # at least one tool call was executed
    FORMAT = "format"  # fences closed, a boxed answer, no block of the policy's own making
    CALLS_OK = "calls_ok"  # every call that stands in the trajectory succeeded
    REPRODUCED = "reproduced"  # every block ran here, and its output equals the stored observation
    ANSWER = "answer"  # the boxed answer equals the reference
    CODE_QUALITY = "code_quality"  # a library call or control flow (THOR 4.1; method.md 9.2 no. 18)
    JUDGE = "judge"  # a model's opinion; recorded, never decides alone


@dataclass(frozen=True, slots=True)
class Verdict:
    """One check of one trajectory. `passed` is None where the check could not decide."""

    check: Check
    passed: bool | None
    version: str
    reason: str
    evidence: Mapping[str, Any] = field(default_factory=dict)
    duration: float = 0.0
