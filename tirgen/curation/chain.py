"""A chain of filters: read from a file, applied to trajectories, every decision a verdict row.

Contract: `apply` is a function of the candidates, what is stored about them, the chain and the
seed. Its decisions are appended as verdicts (check `filter/NAME`), each batch in a transaction of
its own; a decision that the newest verdict of that check and version already says is not written
again, so that applying a chain twice, or once more after a crash, doubles nothing. Bodies are read
a batch at a time; of each candidate only its id is held, and what a filter says that it holds.
"""

from __future__ import annotations

import difflib
import json
import time
import tomllib
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from sqlalchemy import Select, func, select, text, true
from sqlalchemy.dialects.postgresql import distinct_on, insert
from sqlalchemy.orm import Session

from shared.errors import ConfigError
from shared.store import Database
from shared.store.models import (
    CurationRow,
    CurationStageRow,
    ProblemRow,
    TrajectoryRow,
    VerdictRow,
)
from shared.store.trajectories import copy_in, decode
from shared.trajectory import Check, clean, content_hash
from tirgen.curation import filters, population
from tirgen.curation.base import PREFIX, Decision, Filter, Row, Sieve
from tirgen.curation.decontaminate import Decontaminate
from tirgen.curation.duplicates import NearDuplicates
from tirgen.curation.rates import Stored

PRESETS = ("paper", "authors-code")
BATCH = 500  # candidates whose bodies are held at once

FILTERS: Mapping[str, type[Filter]] = {
    one.KIND: one
    for one in (
        filters.Format,
        filters.Executed,
        filters.Answer,
        filters.Length,
        filters.CodeQuality,
        filters.Repetition,
        filters.Language,
        population.Difficulty,
        population.CotSolvable,
        population.OnePerProblem,
        population.Balance,
        NearDuplicates,
        Decontaminate,
    )
}


@dataclass(frozen=True, slots=True)
class Stage:
    """One filter's part of the funnel: candidates before and after it."""

    name: str
    version: str
    before: int
    after: int


@dataclass(frozen=True, slots=True)
class Curated:
    """`kept`: trajectory ids, in the candidates' order. `id`: of the row in `curations`."""

    kept: list[int]
    stages: list[Stage]
    id: int


@dataclass(frozen=True, slots=True)
class Chain:
    name: str
    filters: tuple[Filter, ...] = ()

    def spec(self) -> dict[str, Any]:
        """Everything that decides what passes but the seed, as plain JSON values."""
        return {
            "name": self.name,
            "filters": [
                {
                    "filter": one.KIND,
                    "name": one.called,
                    "code": one.VERSION,
                    "parameters": one.parameters(),
                }
                for one in self.filters
            ],
        }


def load(source: str | Path) -> Chain:
    """The chain of a preset or a TOML file. Raises ConfigError, naming file and key at fault."""
    if source in PRESETS:
        packaged = files("tirgen.curation").joinpath("presets", f"{source}.toml")
        return parse(packaged.read_text(encoding="utf-8"), str(source), f"preset {source}")
    path = Path(source)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        near = difflib.get_close_matches(str(source), PRESETS, n=1)
        presets = f"did you mean {near[0]!r}?" if near else f"presets are {', '.join(PRESETS)}"
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ConfigError(
            f"the filters cannot be read: {why}", where=str(source), remedy=presets
        ) from error
    return parse(text, path.stem, str(source), path.parent)


def parse(text: str, name: str, where: str, folder: Path = Path()) -> Chain:
    """A chain from TOML; relative paths in it are taken from `folder`. Raises ConfigError."""
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"Not valid TOML: {error}", where=where) from error
    unknown = sorted(values.keys() - {"filters"})
    entries = values.get("filters")
    if unknown or not isinstance(entries, list):
        what = f"unknown key {unknown[0]!r}" if unknown else "there is no [[filters]]"
        raise ConfigError(what, where=where, remedy="a chain is a list of [[filters]] tables")
    found = tuple(
        _filter(entry, f"{where}, filter {i}").located(folder)
        for i, entry in enumerate(entries, start=1)
    )
    names = [one.called for one in found]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        remedy = 'give one of them a name of its own: name = "..."'
        raise ConfigError(f"two filters are called {twice!r}", where=where, remedy=remedy)
    return Chain(name, found)


def _filter(entry: Any, where: str) -> Filter:
    if not isinstance(entry, dict) or not isinstance(entry.get("filter"), str):
        raise ConfigError('it has no filter = "KIND"', where=where, remedy=_kinds())
    kind = entry["filter"]
    if kind not in FILTERS:
        near = difflib.get_close_matches(kind, FILTERS, n=1)
        remedy = f"did you mean {near[0]!r}?" if near else _kinds()
        raise ConfigError(f"there is no filter {kind!r}", where=where, remedy=remedy)
    values = {key: value for key, value in entry.items() if key != "filter"}
    try:
        return FILTERS[kind].model_validate(values)
    except ValidationError as error:
        lines = [_explain(FILTERS[kind], one["loc"], one["msg"]) for one in error.errors()]
        raise ConfigError(
            f"the {kind} filter is not valid:\n    " + "\n    ".join(lines),
            where=where,
            remedy=f"`tirgen filters list` names its keys: {', '.join(_keys(FILTERS[kind]))}",
        ) from error


def _explain(kind: type[Filter], loc: Sequence[str | int], message: str) -> str:
    path = ".".join(map(str, loc))
    near = difflib.get_close_matches(path, _keys(kind), n=1)
    unknown = message.startswith("Extra inputs")
    hint = f"; did you mean {near[0]!r}?" if unknown and near else ""
    return f"{path}: {'unknown key' if unknown else message}{hint}"


def _keys(kind: type[Filter]) -> list[str]:
    return list(kind.model_fields)


def _kinds() -> str:
    return f"filters are {', '.join(FILTERS)}"


# ---- application --------------------------------------------------------------------------------


def apply(db: Database, chain: Chain, candidates: Select[Any], *, seed: int) -> Curated:
    """Let `candidates`, a select of trajectory ids in the order wanted, pass through the chain.

    Without an order of its own it is by id. Raises ConfigError where a filter lacks what it needs,
    before anything is written.
    """
    with db.session() as session:
        ordered = candidates.order_by(text("1")).execution_options(yield_per=10_000)
        ids = array("q", session.scalars(ordered))
    context = Stored(db, seed)
    sieves = [(one, one.sieve(context)) for one in chain.filters]
    stages: list[Stage] = []
    by_run: list[tuple[Counter[int], Counter[int]]] = []
    alive = ids
    for together in _passes(sieves):
        alive, counts = _pass(db, together, alive, seed)
        for (one, _), (before, after) in zip(together, counts, strict=True):
            version = one.version(seed)
            stages.append(Stage(one.called, version, before.total(), after.total()))
            by_run.append((before, after))
    kept = alive.tolist()
    return Curated(kept, stages, _enter(db, chain, seed, ids, kept, stages, by_run))


Working = tuple[Filter, Sieve]


def _passes(sieves: Sequence[Working]) -> Iterator[list[Working]]:
    """Filters that share one reading of the candidates: one that surveys begins a new one."""
    together: list[Working] = []
    for one in sieves:
        if one[1].surveys and together:
            yield together
            together = []
        together.append(one)
    if together:
        yield together


def _pass(
    db: Database, together: Sequence[Working], ids: array[int], seed: int
) -> tuple[array[int], list[tuple[Counter[int], Counter[int]]]]:
    first, sieve = together[0]
    if sieve.surveys:
        for rows in _batches(db, ids, first.reads_body):
            sieve.survey(rows)
    reads_body = any(one.reads_body for one, _ in together)
    counts = [(Counter[int](), Counter[int]()) for _ in together]
    kept = array("q")
    for rows in _batches(db, ids, reads_body):
        with db.begin() as session:
            for (one, sieve), (before, after) in zip(together, counts, strict=True):
                before.update(row.run_id for row in rows)
                started = time.monotonic()
                decisions = sieve.decide(rows)
                each = (time.monotonic() - started) / max(len(rows), 1)
                _record(session, one, seed, rows, decisions, each)
                rows = [r for r, d in zip(rows, decisions, strict=True) if d.passed]
                after.update(row.run_id for row in rows)
        kept.extend(row.id for row in rows)
    return kept, counts


def _batches(db: Database, ids: array[int], reads_body: bool) -> Iterator[list[Row]]:
    for start in range(0, len(ids), BATCH):
        with db.session() as session:
            rows = read_rows(session, ids[start : start + BATCH].tolist(), reads_body)
        yield rows


def read_rows(session: Session, ids: Sequence[int], reads_body: bool) -> list[Row]:
    """The candidates of these ids, in their order."""
    one, verdict = TrajectoryRow, VerdictRow
    newest = (
        select(verdict.passed)
        .where(verdict.trajectory_id == one.id, verdict.check_name == Check.ANSWER)
        .order_by(verdict.id.desc())
        .limit(1)
        .lateral("answered")
    )
    columns = (
        one.id, one.run_id, one.problem_key, ProblemRow.text, one.content_hash,
        one.reasoner_model, one.n_calls, one.n_tokens, one.outcomes, newest.c.passed,
    )  # fmt: skip
    statement = (
        select(*columns, *((one.body,) if reads_body else ()))
        .join(ProblemRow, ProblemRow.key == one.problem_key)
        .outerjoin(newest, true())
        .where(one.id == func.any(list(ids)))
    )
    found = {}
    for (
        id,
        run,
        key,
        problem,
        digest,
        model,
        calls,
        tokens,
        outcomes,
        passed,
        *body,
    ) in session.execute(statement):
        trajectory = decode(body[0]) if body else None
        found[id] = Row(
            id, run, key, problem, digest, model, calls, tokens, tuple(outcomes), passed, trajectory
        )
    return [found[id] for id in ids]


def _record(
    session: Session,
    one: Filter,
    seed: int,
    rows: Sequence[Row],
    decisions: Sequence[Decision],
    duration: float,
) -> None:
    """Append those decisions that the newest verdict of this check and version does not say."""
    check, version = PREFIX + one.called, one.version(seed)
    verdict = VerdictRow
    statement = (
        select(verdict.trajectory_id, verdict.passed, verdict.reason, verdict.evidence)
        .where(
            verdict.trajectory_id == func.any([row.id for row in rows]),
            verdict.check_name == check,
            verdict.version == version,
        )
        .order_by(verdict.trajectory_id, verdict.id.desc())
        .ext(distinct_on(verdict.trajectory_id))
    )
    said = {id: (passed, why, facts) for id, passed, why, facts in session.execute(statement)}
    written = []
    for row, decision in zip(rows, decisions, strict=True):
        reason = clean(decision.reason)[0]
        evidence = json.loads(json.dumps(clean(decision.evidence)[0]))
        if said.get(row.id) != (decision.passed, reason, evidence):
            written.append(
                {
                    "trajectory_id": row.id,
                    "check_name": check,
                    "passed": decision.passed,
                    "version": version,
                    "reason": reason,
                    "evidence": evidence,
                    "duration": duration,
                }
            )
    copy_in(session, verdict, written)


def _enter(
    db: Database,
    chain: Chain,
    seed: int,
    ids: array[int],
    kept: Sequence[int],
    stages: Sequence[Stage],
    by_run: Sequence[tuple[Counter[int], Counter[int]]],
) -> int:
    """The row in `curations`: applied again to the same effect, it is the same row."""
    digest = content_hash([chain.spec(), seed, ids.tolist(), list(kept)])
    values = {
        "name": chain.name,
        "spec": chain.spec(),
        "seed": seed,
        "digest": digest,
        "n_candidates": len(ids),
        "n_kept": len(kept),
    }
    with db.begin() as session:
        entered = insert(CurationRow).values(values)
        id = session.execute(
            entered.on_conflict_do_update(
                index_elements=["digest"], set_={"applied_at": func.clock_timestamp()}
            ).returning(CurationRow.id)
        ).scalar_one()
        rows = [
            {
                "curation_id": id,
                "position": position,
                "run_id": run_id,
                "name": stage.name,
                "version": stage.version,
                "n_before": before[run_id],
                "n_after": after[run_id],
            }
            for position, (stage, (before, after)) in enumerate(zip(stages, by_run, strict=True))
            for run_id in before
        ]
        if rows:
            session.execute(insert(CurationStageRow).on_conflict_do_nothing(), rows)
    return int(id)
