"""The tables. Whatever is filtered, sorted or counted is a column; a body is opaque bytes.

Trajectories, steps, verdicts and snapshots are written once and never changed (triggers see to it);
all that changes is the state of work items and runs. Names avoid SQL's reserved words, because
people type them into psql. Durations are seconds, memory is bytes, times are the database's clock.
"""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from typing import Any

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    DateTime,
    ForeignKey,
    Identity,
    Index,
    LargeBinary,
    MetaData,
    Text,
    UniqueConstraint,
    column,
    func,
    table,
    text,
)
from sqlalchemy.dialects.postgresql import ARRAY, JSON, JSONB
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column


class RunState(StrEnum):
    RUNNING = "running"  # items may be leased
    DONE = "done"  # no item is queued or leased
    CANCELLED = "cancelled"


class ItemState(StrEnum):
    """Where a work item stands; the last four are ends, and every item comes to one."""

    QUEUED = "queued"
    LEASED = "leased"
    VETTED = "vetted"  # has a trajectory that passed every check
    REJECTED = "rejected"  # has a trajectory; `reject_check` says what it failed
    FAILED = "failed"  # dead letter: `error_class`, `error_text`, `raw`
    CANCELLED = "cancelled"


def _one_of(column: str, values: type[StrEnum]) -> str:
    return f"{column} IN ({', '.join(repr(v.value) for v in values)})"


class JobState(StrEnum):
    """Where a training job stands (rl/job_rows.py moves it)."""

    QUEUED = "queued"  # nobody works on it yet
    RUNNING = "running"  # somebody does, and says so by its heartbeat
    DONE = "done"
    FAILED = "failed"  # `error_class`, `error_text`
    CANCELLED = "cancelled"
    LOST = "lost"  # no heartbeat for long; running again should one come after all


class JobPlace(StrEnum):
    LOCAL = "local"  # this host, or hosts reached by ssh
    SLURM = "slurm"
    CELERY = "celery"  # whichever worker takes it from its queue


class Base(DeclarativeBase):
    metadata = MetaData(
        naming_convention={
            "pk": "%(table_name)s_pkey",
            "fk": "%(table_name)s_%(column_0_name)s_fkey",
            "uq": "%(table_name)s_%(column_0_name)s_key",
            "ix": "%(table_name)s_%(column_0_N_name)s_idx",
            "ck": "%(table_name)s_%(constraint_name)s_check",
        }
    )
    type_annotation_map = {  # noqa: RUF012 (SQLAlchemy's own interface)
        str: Text,
        datetime: DateTime(timezone=True),
        dict[str, Any]: JSONB,
        list[str]: ARRAY(Text),
        bytes: LargeBinary,
    }


class ProblemRow(Base):
    """A question with its reference answer; `key` is `shared.trajectory.Problem.key`."""

    __tablename__ = "problems"
    __table_args__ = tuple(Index(None, c) for c in ("external_id", "source", "subject", "level"))

    key: Mapped[str] = mapped_column(primary_key=True)
    text: Mapped[str]
    answer: Mapped[str]
    source: Mapped[str]
    external_id: Mapped[str]
    subject: Mapped[str | None]
    level: Mapped[str | None]
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())


class RunRow(Base):
    """One configured piece of work over many items.

    `kind` ("generate", "evaluate") is also the name of the Celery queue that works on it.
    """

    __tablename__ = "runs"
    __table_args__ = (CheckConstraint(_one_of("state", RunState), name="state"),)

    id: Mapped[int] = mapped_column(Identity(), primary_key=True)
    name: Mapped[str] = mapped_column(unique=True)
    kind: Mapped[str]
    config: Mapped[dict[str, Any]]
    fingerprint: Mapped[str]
    code_version: Mapped[str]
    created_by: Mapped[str]
    host: Mapped[str]
    state: Mapped[str] = mapped_column(server_default=RunState.RUNNING)
    n_items: Mapped[int] = mapped_column(server_default="0")
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    finished_at: Mapped[datetime | None]
    stop_reason: Mapped[str | None]  # the limit that it reached; the rest waits for `resume`


class WorkItemRow(Base):
    """One sample of one problem in one run (shared/work/items.py moves it from state to state)."""

    __tablename__ = "work_items"
    __table_args__ = (
        UniqueConstraint("run_id", "problem_key", "sample_index", "fingerprint"),
        CheckConstraint(_one_of("state", ItemState), name="state"),
        CheckConstraint(
            "(state = 'leased') = (lease_owner IS NOT NULL AND lease_until IS NOT NULL)",
            name="lease",
        ),
        CheckConstraint("(state = 'rejected') = (reject_check IS NOT NULL)", name="rejected"),
        CheckConstraint("state <> 'failed' OR error_class IS NOT NULL", name="failed"),
        Index("work_items_run_state_idx", "run_id", "state"),
        Index(
            "work_items_queue_idx",
            "run_id",
            "attempt",
            "id",
            postgresql_where=text("state = 'queued'"),
        ),
        Index("work_items_lease_idx", "lease_until", postgresql_where=text("state = 'leased'")),
    )

    id: Mapped[int] = mapped_column(BigInteger, Identity(), primary_key=True)
    run_id: Mapped[int] = mapped_column(ForeignKey("runs.id", ondelete="CASCADE"))
    problem_key: Mapped[str] = mapped_column(ForeignKey("problems.key"))
    sample_index: Mapped[int]
    fingerprint: Mapped[str]
    idempotency_key: Mapped[str] = mapped_column(unique=True)  # for side effects elsewhere
    state: Mapped[str] = mapped_column(server_default=ItemState.QUEUED)
    attempt: Mapped[int] = mapped_column(server_default="0")  # fencing token: only ever grows
    failures: Mapped[int] = mapped_column(server_default="0")  # attempts that failed by themselves
    kills: Mapped[int] = mapped_column(server_default="0")  # leases that ran out
    lease_owner: Mapped[str | None]
    lease_until: Mapped[datetime | None]
    reject_check: Mapped[str | None]
    error_class: Mapped[str | None]  # of the last failure, also where a later attempt succeeded
    error_text: Mapped[str | None]
    raw: Mapped[str | None]  # what the model said when it failed
    updated_at: Mapped[datetime] = mapped_column(server_default=func.now())


class SlotRow(Base):
    """A place at which one slice at a time works on a run (shared/work/slots.py).

    Only the message that carries `token` may start a slice; until `alive_until` a slice, or the
    message for it, is believed to be alive.
    """

    __tablename__ = "run_slots"

    run_id: Mapped[int] = mapped_column(ForeignKey("runs.id", ondelete="CASCADE"), primary_key=True)
    slot: Mapped[int] = mapped_column(primary_key=True)
    token: Mapped[int] = mapped_column(BigInteger, server_default="0")
    alive_until: Mapped[datetime] = mapped_column(server_default=func.now())


class TrajectoryRow(Base):
    """A finished trajectory. `vetted` is the judgement at generation; `current_verdicts` moves on.

    `body` is zstd over the canonical JSON of `Trajectory.body()`; `body_bytes` its length before.
    The lists (each value once, sorted) are of the calls that stand.
    """

    __tablename__ = "trajectories"
    __table_args__ = (
        CheckConstraint("vetted = (reject_check IS NULL)", name="rejected"),
        Index(None, "problem_key"),
        Index(None, "content_hash"),
        Index(None, "created_at"),
        Index(
            "trajectories_lists_idx", "imports", "outcomes", "error_types", postgresql_using="gin"
        ),
        # With the id, in which pages are ordered: a page of equal values needs no sort.
        Index(None, "run_id", "vetted", "id"),
        Index(None, "run_id", "id"),
        Index(None, "vetted", "id"),
        Index(None, "n_calls", "id"),
        Index(None, "n_failed_calls", "id"),
        Index(None, "n_corrections", "id"),
        Index(None, "n_tokens", "id"),
        Index(None, "end_reason", "id"),
        Index(None, "reject_check", "id"),
    )

    id: Mapped[int] = mapped_column(BigInteger, Identity(), primary_key=True)
    run_id: Mapped[int] = mapped_column(ForeignKey("runs.id", ondelete="CASCADE"))
    item_id: Mapped[int] = mapped_column(
        ForeignKey("work_items.id", ondelete="CASCADE"), unique=True
    )
    problem_key: Mapped[str] = mapped_column(ForeignKey("problems.key"))
    content_hash: Mapped[str]
    end_reason: Mapped[str]
    answer: Mapped[str | None]
    vetted: Mapped[bool]
    reject_check: Mapped[str | None]  # the first required check that it failed
    thinking: Mapped[bool]
    seed: Mapped[int] = mapped_column(BigInteger)
    n_steps: Mapped[int]
    n_calls: Mapped[int]
    n_failed_calls: Mapped[int]
    n_corrections: Mapped[int]  # failed calls taken back by self-correction
    n_tokens: Mapped[int]
    duration: Mapped[float]
    imports: Mapped[list[str]]  # top-level modules that its code imports
    outcomes: Mapped[list[str]]
    error_types: Mapped[list[str]]
    sandbox_tier: Mapped[str | None]  # the weakest that any of its calls ran under
    reasoner_model: Mapped[str]
    extractor_model: Mapped[str | None]
    code_version: Mapped[str]
    cleaned: Mapped[bool]  # text was altered to fit the database (shared.trajectory.clean)
    body: Mapped[bytes]
    body_bytes: Mapped[int]
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())


class StepRow(Base):
    """One step in numbers; its text is in the trajectory's body."""

    __tablename__ = "steps"
    __table_args__ = (
        Index("steps_error_type_idx", "error_type", postgresql_where=text("error_type <> ''")),
        Index("steps_outcome_idx", "outcome", postgresql_where=text("outcome <> 'ok'")),
    )

    trajectory_id: Mapped[int] = mapped_column(
        ForeignKey("trajectories.id", ondelete="CASCADE"), primary_key=True
    )
    position: Mapped[int] = mapped_column(primary_key=True)
    has_call: Mapped[bool]
    outcome: Mapped[str | None]
    error_type: Mapped[str | None]
    duration: Mapped[float | None]
    cpu_time: Mapped[float | None]
    peak_memory: Mapped[int | None] = mapped_column(BigInteger)
    sandbox_tier: Mapped[str | None]
    replayed: Mapped[bool | None]  # its session had been lost and was made again
    bytes_cut: Mapped[int | None] = mapped_column(BigInteger)  # of what it printed
    code_chars: Mapped[int | None]
    imports: Mapped[list[str]]


class VerdictRow(Base):
    """One check by one verifier version. Append-only: the newest of each check counts."""

    __tablename__ = "verdicts"
    __table_args__ = (Index(None, "trajectory_id", "check_name", "id"),)

    id: Mapped[int] = mapped_column(BigInteger, Identity(), primary_key=True)
    trajectory_id: Mapped[int] = mapped_column(ForeignKey("trajectories.id", ondelete="CASCADE"))
    check_name: Mapped[str]
    passed: Mapped[bool | None]  # NULL: could not decide
    version: Mapped[str]
    reason: Mapped[str]
    evidence: Mapped[dict[str, Any]]
    duration: Mapped[float]
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())


class SnapshotKind(StrEnum):
    TRAJECTORIES = "trajectories"  # for SFT
    PROBLEMS = "problems"  # for RL, with their measured difficulty


class SnapshotRow(Base):
    """A frozen, ordered selection; immutable by trigger (shared/store/snapshots.py).

    JSON rather than JSONB, which would rewrite numbers: `checksum` covers these values.
    """

    __tablename__ = "snapshots"
    __table_args__ = (CheckConstraint(_one_of("kind", SnapshotKind), name="kind"),)

    id: Mapped[int] = mapped_column(Identity(), primary_key=True)
    name: Mapped[str] = mapped_column(unique=True)
    kind: Mapped[str]
    digest: Mapped[str]  # SHA-256 over the manifest, i.e. over all of its rows
    n_rows: Mapped[int]
    splits: Mapped[dict[str, Any]] = mapped_column(JSON)  # name -> rows, in order of position
    lineage: Mapped[dict[str, Any]] = mapped_column(JSON)
    created_by: Mapped[str]
    created_at: Mapped[datetime]
    checksum: Mapped[str]  # SHA-256 over the other columns


class ManifestRow(Base):
    """One row of a snapshot's manifest: of kind `trajectories`, or of kind `problems`."""

    __tablename__ = "snapshot_rows"
    __table_args__ = (
        CheckConstraint(
            "num_nulls(trajectory_id, content_hash, body_hash, verdict_ids, verdicts_hash) "
            "= CASE WHEN n_samples IS NULL THEN 0 ELSE 5 END",
            name="trajectory",
        ),
        CheckConstraint(
            "(n_passed IS NULL) = (n_samples IS NULL) AND n_passed BETWEEN 0 AND n_samples",
            name="difficulty",
        ),
        Index(None, "trajectory_id"),
    )

    snapshot_id: Mapped[int] = mapped_column(
        ForeignKey("snapshots.id", ondelete="CASCADE", deferrable=True, initially="DEFERRED"),
        primary_key=True,
    )
    position: Mapped[int] = mapped_column(primary_key=True)
    split: Mapped[str]
    problem_key: Mapped[str] = mapped_column(ForeignKey("problems.key"))
    trajectory_id: Mapped[int | None] = mapped_column(ForeignKey("trajectories.id"))
    content_hash: Mapped[str | None]
    body_hash: Mapped[str | None]  # SHA-256 of the body's bytes as they are stored
    verdict_ids: Mapped[list[int] | None] = mapped_column(ARRAY(BigInteger))
    verdicts_hash: Mapped[str | None]  # SHA-256 over what these verdicts say
    n_passed: Mapped[int | None]
    n_samples: Mapped[int | None]


class SnapshotRunRow(Base):
    """A run that a snapshot's rows come from: it cannot be deleted before the snapshot."""

    __tablename__ = "snapshot_runs"
    __table_args__ = (Index(None, "run_id"),)

    snapshot_id: Mapped[int] = mapped_column(
        ForeignKey("snapshots.id", ondelete="CASCADE", deferrable=True, initially="DEFERRED"),
        primary_key=True,
    )
    run_id: Mapped[int] = mapped_column(ForeignKey("runs.id"), primary_key=True)


class ConsensusRow(Base):
    """What the samples of a problem agree on in one run: derived, so it is replaced when they are
    compared anew (tirgen/agreement.py; `shared.grading.consensus`)."""

    __tablename__ = "consensus"
    __table_args__ = (
        Index("consensus_disagrees_idx", "run_id", postgresql_where=text("disagrees")),
    )

    run_id: Mapped[int] = mapped_column(ForeignKey("runs.id", ondelete="CASCADE"), primary_key=True)
    problem_key: Mapped[str] = mapped_column(ForeignKey("problems.key"), primary_key=True)
    n_samples: Mapped[int]
    n_answers: Mapped[int]
    votes: Mapped[int]  # of the leading answer
    answer: Mapped[str | None]  # the majority's; NULL: a tie, or no answer at all
    share: Mapped[float | None]  # votes / n_samples; NULL: no answer at all
    tied: Mapped[bool]
    disagrees: Mapped[bool | None]  # with the reference; NULL: no majority of two, or undecided
    version: Mapped[str]  # of the grader
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())


class UsageRow(Base):
    """What one attempt at an item cost at one endpoint in one role, failed attempts included."""

    __tablename__ = "model_usage"
    __table_args__ = (Index(None, "run_id"), Index(None, "item_id"))

    id: Mapped[int] = mapped_column(BigInteger, Identity(), primary_key=True)
    run_id: Mapped[int] = mapped_column(ForeignKey("runs.id", ondelete="CASCADE"))
    item_id: Mapped[int] = mapped_column(ForeignKey("work_items.id", ondelete="CASCADE"))
    attempt: Mapped[int]
    role: Mapped[str]
    model: Mapped[str]
    endpoint: Mapped[str]
    requests: Mapped[int]
    prompt_tokens: Mapped[int] = mapped_column(BigInteger)
    completion_tokens: Mapped[int] = mapped_column(BigInteger)
    retries: Mapped[int]
    duration: Mapped[float]


class EndpointStatusRow(Base):
    """How a worker process sees one server, written every few seconds (tirgen/live.py)."""

    __tablename__ = "endpoint_status"
    __table_args__ = (Index(None, "run_id"),)

    owner: Mapped[str] = mapped_column(primary_key=True)  # host:pid
    roles: Mapped[str] = mapped_column(primary_key=True)  # that it plays: "reasoner, extractor"
    base_url: Mapped[str] = mapped_column(primary_key=True)
    run_id: Mapped[int] = mapped_column(ForeignKey("runs.id", ondelete="CASCADE"))
    model: Mapped[str]
    max_in_flight: Mapped[int]  # the limit that admission has found
    in_flight: Mapped[int]
    breaker: Mapped[str]
    requests_per_second: Mapped[float]
    tokens_per_second: Mapped[float]  # completion tokens
    latency: Mapped[float]
    seen_at: Mapped[datetime] = mapped_column(server_default=func.now())


class CurationRow(Base):
    """A chain of filters as it was applied to some candidates (tirgen/curation/chain.py).

    `digest` is over chain, seed, candidates and what was kept: applied again to the same effect,
    only `applied_at` moves.
    """

    __tablename__ = "curations"

    id: Mapped[int] = mapped_column(Identity(), primary_key=True)
    name: Mapped[str]
    spec: Mapped[dict[str, Any]]
    seed: Mapped[int] = mapped_column(BigInteger)
    digest: Mapped[str] = mapped_column(unique=True)
    n_candidates: Mapped[int]
    n_kept: Mapped[int]
    applied_at: Mapped[datetime] = mapped_column(server_default=func.now())


class CurationStageRow(Base):
    """One filter's part of a curation's funnel, for the candidates of one run."""

    __tablename__ = "curation_stages"
    __table_args__ = (
        CheckConstraint("n_after BETWEEN 0 AND n_before", name="funnel"),
        Index(None, "run_id"),
    )

    curation_id: Mapped[int] = mapped_column(
        ForeignKey("curations.id", ondelete="CASCADE"), primary_key=True
    )
    run_id: Mapped[int] = mapped_column(ForeignKey("runs.id", ondelete="CASCADE"), primary_key=True)
    position: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]
    version: Mapped[str]
    n_before: Mapped[int]
    n_after: Mapped[int]


class JobRow(Base):
    """A training job (rl/jobs.py). Who works on it holds `token`, which only ever grows.

    `heartbeat_at` is its last sign of life; of one that waits for a worker, when that was rung for.
    """

    __tablename__ = "jobs"
    __table_args__ = (
        CheckConstraint(_one_of("state", JobState), name="state"),
        CheckConstraint(_one_of("place", JobPlace), name="place"),
        CheckConstraint("state <> 'failed' OR error_class IS NOT NULL", name="failed"),
        CheckConstraint("(place = 'celery') = (queue IS NOT NULL)", name="queue"),
        Index("jobs_open_idx", "id", postgresql_where=text("state IN ('queued', 'running')")),
    )

    id: Mapped[int] = mapped_column(Identity(), primary_key=True)
    name: Mapped[str] = mapped_column(unique=True)
    command: Mapped[str]  # sft, train, eval
    place: Mapped[str]
    queue: Mapped[str | None]
    spec: Mapped[dict[str, Any]]  # how to start it again: rl.job_file.Spec
    out: Mapped[str]
    snapshot_name: Mapped[str | None]
    snapshot_digest: Mapped[str | None]
    config: Mapped[dict[str, Any] | None]  # the recipe, resolved; NULL before it first ran
    config_digest: Mapped[str | None]
    code_version: Mapped[str]
    created_by: Mapped[str]
    state: Mapped[str] = mapped_column(server_default=JobState.QUEUED)
    token: Mapped[int] = mapped_column(BigInteger, server_default="0")
    host: Mapped[str | None]
    pid: Mapped[int | None]
    world_size: Mapped[int | None]
    external_id: Mapped[str | None]  # of the Slurm job
    heartbeat_at: Mapped[datetime | None]
    cancel_at: Mapped[datetime | None]  # when somebody asked for its end
    cancel_grace: Mapped[float | None]  # seconds that it may take over it
    restarts: Mapped[int] = mapped_column(server_default="0")  # how often it may be lost
    losses: Mapped[int] = mapped_column(server_default="0")  # how often it was
    error_class: Mapped[str | None]
    error_text: Mapped[str | None]
    log_tail: Mapped[str | None]  # the end of OUT/log.txt
    log_bytes: Mapped[int | None] = mapped_column(BigInteger)  # its length when that was taken
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    started_at: Mapped[datetime | None]  # for the last time
    finished_at: Mapped[datetime | None]


class JobMetricRow(Base):
    """What a job measured at one step. A job that resumes makes anew the steps it goes back to."""

    __tablename__ = "job_metrics"

    job_id: Mapped[int] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    step: Mapped[int] = mapped_column(primary_key=True)
    metrics: Mapped[dict[str, Any]]
    logged_at: Mapped[datetime]  # by the trainer's clock: the database may have been away


class JobCheckpointRow(Base):
    """A checkpoint that a job wrote. `path` is on the job's host, and may be gone by now."""

    __tablename__ = "job_checkpoints"

    job_id: Mapped[int] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    step: Mapped[int] = mapped_column(primary_key=True)
    path: Mapped[str]
    n_bytes: Mapped[int] = mapped_column(BigInteger)
    digest: Mapped[str | None]
    saved_at: Mapped[datetime] = mapped_column(server_default=func.now())


# A view: of each problem in each run, how many samples had a decided answer, how many a right one.
pass_rates = table(
    "pass_rates",
    column("problem_key", Text),
    *(column(name, BigInteger) for name in ("run_id", "n_passed", "n_samples")),
)
