"""What can be asked of a stored trajectory: every field of the query language, with its column."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from sqlalchemy.orm import InstrumentedAttribute

from shared.sandbox.result import Tier
from shared.store.models import ProblemRow, RunRow, TrajectoryRow, WorkItemRow
from shared.trajectory import Check, End


class Kind(StrEnum):
    """Type of a field; the value is the word that people see."""

    TEXT = "text"
    INTEGER = "whole number"
    NUMBER = "number"
    BOOLEAN = "True or False"
    TIME = "time"


@dataclass(frozen=True, slots=True)
class Field:
    """`values`: all that occur, where they are few and known."""

    name: str
    kind: Kind
    column: InstrumentedAttribute[Any]
    description: str
    values: tuple[str, ...] = ()

    @property
    def nullable(self) -> bool:
        return bool(self.column.property.columns[0].nullable)


_T, _W, _P, _R = TrajectoryRow, WorkItemRow, ProblemRow, RunRow

FIELDS = {
    field.name: field
    for field in (
        Field("id", Kind.INTEGER, _T.id, "the trajectory, as `tirgen show` takes it"),
        Field("run", Kind.TEXT, _R.name, "name of the run that made it"),
        Field("kind", Kind.TEXT, _R.kind, "what kind of run that was: generate, ..."),
        Field("problem_id", Kind.TEXT, _P.external_id, "the problem's id in its file"),
        Field("problem_key", Kind.TEXT, _T.problem_key, "SHA-256 of the problem and its answer"),
        Field("problem", Kind.TEXT, _P.text, "the question"),
        Field("reference", Kind.TEXT, _P.answer, "the problem's reference answer"),
        Field("source", Kind.TEXT, _P.source, "where the problem comes from"),
        Field("subject", Kind.TEXT, _P.subject, "the problem's subject, if it has one"),
        Field("level", Kind.TEXT, _P.level, "the problem's level, if it has one: a text, '5'"),
        Field("sample", Kind.INTEGER, _W.sample_index, "which sample of its problem, from 0"),
        Field("attempt", Kind.INTEGER, _W.attempt, "times that the item was begun"),
        Field("vetted", Kind.BOOLEAN, _T.vetted, "passed every required check when generated"),
        Field(
            "reject_check", Kind.TEXT, _W.reject_check, "the check that rejected it",
            tuple(Check),
        ),
        Field("answer", Kind.TEXT, _T.answer, "content of its last \\boxed{}; None without one"),
        Field("end", Kind.TEXT, _T.end_reason, "why generation stopped", tuple(End)),
        Field("thinking", Kind.BOOLEAN, _T.thinking, "made by a thinking policy"),
        Field("n_steps", Kind.INTEGER, _T.n_steps, "steps"),
        Field("n_calls", Kind.INTEGER, _T.n_calls, "tool calls that stand in it"),
        Field("n_failed_calls", Kind.INTEGER, _T.n_failed_calls, "of these, failed"),
        Field("n_corrections", Kind.INTEGER, _T.n_corrections, "failed calls that were taken back"),
        Field("n_tokens", Kind.INTEGER, _T.n_tokens, "length in tokens of the policy"),
        Field("n_bytes", Kind.INTEGER, _T.body_bytes, "length of the stored body, unpacked"),
        Field("duration", Kind.NUMBER, _T.duration, "seconds from start to verdicts"),
        Field(
            "tier", Kind.TEXT, _T.sandbox_tier, "weakest sandbox tier that a call ran under",
            tuple(Tier),
        ),
        Field("model", Kind.TEXT, _T.reasoner_model, "the reasoner's model"),
        Field("extractor_model", Kind.TEXT, _T.extractor_model, "the code extractor's model"),
        Field("seed", Kind.INTEGER, _T.seed, "seed that everything random derives from"),
        Field("code_version", Kind.TEXT, _T.code_version, "version of tirgen that made it"),
        Field("hash", Kind.TEXT, _T.content_hash, "content hash, by which snapshots name it"),
        Field("cleaned", Kind.BOOLEAN, _T.cleaned, "text was altered to fit the database"),
        Field("created_at", Kind.TIME, _T.created_at, "when it was stored: '2026-05-01 12:00'"),
    )
}  # fmt: skip
