"""What can be asked of a stored trajectory: every field of the query language, with its column."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from sqlalchemy import Index, PrimaryKeyConstraint, Table, UniqueConstraint
from sqlalchemy.orm import InstrumentedAttribute

from shared.sandbox.result import Outcome, Tier
from shared.store.models import (
    ConsensusRow,
    ProblemRow,
    RunRow,
    StepRow,
    TrajectoryRow,
    WorkItemRow,
)
from shared.trajectory import Check, End


class Kind(StrEnum):
    """Type of a field; the value is the word that people see."""

    TEXT = "text"
    INTEGER = "whole number"
    NUMBER = "number"
    BOOLEAN = "True or False"
    TIME = "time"
    TEXTS = "list of texts"

    @property
    def article(self) -> str:
        return self.value if self is Kind.BOOLEAN else f"a {self.value}"


NUMBERS = (Kind.INTEGER, Kind.NUMBER)


@dataclass(frozen=True, slots=True)
class Field:
    """A column with a name. `values`: all that occur, where they are few and known.

    A new field is an entry in FIELDS, and its table one more join in `tirgen.query.joined`.
    """

    name: str
    kind: Kind
    column: InstrumentedAttribute[Any]
    description: str
    values: tuple[str, ...] = ()

    @property
    def nullable(self) -> bool:
        return bool(self.column.property.columns[0].nullable)

    @property
    def indexed(self) -> bool:
        """A condition on it alone finds rare rows without reading the table."""
        column = self.column.property.columns[0]
        table = column.table
        assert isinstance(table, Table)
        keys = [
            list(key.columns)
            for key in table.constraints
            if isinstance(key, PrimaryKeyConstraint | UniqueConstraint)
        ]
        return any(key[0] is column for key in keys) or any(
            _leads(index, column) for index in table.indexes
        )


def _leads(index: Index, column: Any) -> bool:
    """A GIN index serves each of its columns, a B-tree only what starts with its first."""
    options = index.dialect_options["postgresql"]
    columns = list(index.columns)
    return column in (columns if options["using"] == "gin" else columns[:1])


def _by_name(*fields: Field) -> dict[str, Field]:
    return {field.name: field for field in fields}


_T, _W, _P, _R, _S = TrajectoryRow, WorkItemRow, ProblemRow, RunRow, StepRow
_C = ConsensusRow

FIELDS = _by_name(
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
    Field("reject_check", Kind.TEXT, _T.reject_check, "the check that rejected it", tuple(Check)),
    Field("answer", Kind.TEXT, _T.answer, "content of its last \\boxed{}; None without one"),
    Field("end", Kind.TEXT, _T.end_reason, "why generation stopped", tuple(End)),
    Field("thinking", Kind.BOOLEAN, _T.thinking, "made by a thinking policy"),
    Field("n_steps", Kind.INTEGER, _T.n_steps, "steps"),
    Field("n_tool_calls", Kind.INTEGER, _T.n_calls, "tool calls that stand in it"),
    Field("n_calls", Kind.INTEGER, _T.n_calls, "short for n_tool_calls"),
    Field("n_failed_calls", Kind.INTEGER, _T.n_failed_calls, "of these, failed"),
    Field("n_corrections", Kind.INTEGER, _T.n_corrections, "failed calls that were taken back"),
    Field("n_tokens", Kind.INTEGER, _T.n_tokens, "length in tokens of the policy"),
    Field("n_bytes", Kind.INTEGER, _T.body_bytes, "length of the stored body, unpacked"),
    Field("imports", Kind.TEXTS, _T.imports, "top-level modules that its code imports"),
    Field(
        "outcomes", Kind.TEXTS, _T.outcomes, "outcomes of its tool calls, each once",
        tuple(Outcome),
    ),
    Field("error_types", Kind.TEXTS, _T.error_types, "types of exceptions that its calls raised"),
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
    Field("consensus_answer", Kind.TEXT, _C.answer, "of most samples of its problem in the run"),
    Field("consensus_share", Kind.NUMBER, _C.share, "share of them that give the commonest answer"),
    Field(
        "consensus_disagrees", Kind.BOOLEAN, _C.disagrees,
        "consensus_answer is not the reference; None before `tirgen consensus`, or undecided",
    ),
)  # fmt: skip

# Inside any_step(), all_steps() and count_steps(). None where a step has no call.
STEP_FIELDS = _by_name(
    Field("position", Kind.INTEGER, _S.position, "which step of its trajectory, from 0"),
    Field("has_call", Kind.BOOLEAN, _S.has_call, "it calls the tool"),
    Field("outcome", Kind.TEXT, _S.outcome, "what became of its call", tuple(Outcome)),
    Field("error_type", Kind.TEXT, _S.error_type, "type of the exception: 'ValueError'"),
    Field("duration", Kind.NUMBER, _S.duration, "seconds that its call took"),
    Field("cpu_time", Kind.NUMBER, _S.cpu_time, "of these, seconds of CPU"),
    Field("peak_memory", Kind.INTEGER, _S.peak_memory, "memory of its call, in bytes"),
    Field("sandbox_tier", Kind.TEXT, _S.sandbox_tier, "tier of the sandbox that it ran under"),
    Field("replayed", Kind.BOOLEAN, _S.replayed, "its session was lost and had to be made again"),
    Field("bytes_cut", Kind.INTEGER, _S.bytes_cut, "of its output that were dropped"),
    Field("code_chars", Kind.INTEGER, _S.code_chars, "length of its code"),
    Field("imports", Kind.TEXTS, _S.imports, "top-level modules that its code imports"),
)

# All the functions there are, as people write them.
FUNCTIONS = {
    "any_step(CONDITION)": "some step is so: any_step(outcome == 'timeout' and duration > 5)",
    "all_steps(CONDITION)": "every step is so, those without a call too",
    "count_steps(CONDITION)": "how many steps are so, a whole number",
    "check(NAME)": "the newest verdict of that check: True, False, or None (undecided or missing)",
    "contains(TEXT)": "TEXT occurs in the trajectory; slow: every body that is left is unpacked",
}
