"""One trajectory as a page to read, or as JSON."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from rich.console import RenderableType
from rich.padding import Padding
from rich.rule import Rule
from rich.syntax import Syntax
from rich.table import Table
from rich.text import Text
from sqlalchemy import select

from shared.sandbox.result import Outcome
from shared.store import Database
from shared.store.models import VerdictRow
from shared.store.trajectories import read
from shared.terminal import cell, table, visible
from shared.trajectory import Step, ToolCall, Trajectory
from tirgen import query
from tirgen.fields import FIELDS

HIGHLIGHTED = 20_000  # characters of code up to which it is coloured
APART = ("problem", "reference")  # shown elsewhere than among the facts


@dataclass(frozen=True, slots=True)
class Shown:
    """`facts`: every field of the query language. `verdicts`: the newest of each check."""

    facts: dict[str, Any]
    trajectory: Trajectory
    verdicts: tuple[VerdictRow, ...]

    def to_json(self) -> dict[str, Any]:
        names = ("check_name", "passed", "version", "reason", "evidence", "duration", "created_at")
        return {
            **self.facts,
            "verdicts": [{name: getattr(v, name) for name in names} for v in self.verdicts],
            "trajectory": self.trajectory.body(),
        }


def load(db: Database, id: int) -> Shown:
    """Raises DatabaseError if there is no such trajectory or if it is damaged."""
    with db.session() as session:
        trajectory = read(session, id)
        of_it = select(VerdictRow).where(VerdictRow.trajectory_id == id).order_by(VerdictRow.id)
        newest = {verdict.check_name: verdict for verdict in session.scalars(of_it)}
    with query.run(db, query.Query(f"id == {id}", tuple(FIELDS))) as rows:
        facts = dict(zip(FIELDS, next(rows), strict=True))
    return Shown(facts, trajectory, tuple(newest.values()))


def page(shown: Shown) -> Iterator[RenderableType]:
    facts, trajectory = shown.facts, shown.trajectory
    state = ("vetted", "bold green") if facts["vetted"] else (_rejected(facts), "bold red")
    yield Text.assemble((f"Trajectory {facts['id']}", "bold"), "  ", state)
    yield _block("problem", facts["problem"])
    yield _block("reference", facts["reference"])
    for number, step in enumerate(trajectory.steps, start=1):
        yield from _step(number, step)
    yield Rule("end", style="dim")
    yield _block("end", trajectory.end)
    yield _block("answer", trajectory.answer or "none")
    yield _verdicts(shown.verdicts)
    yield Text()
    yield _facts((k, v) for k, v in facts.items() if k not in APART)


def _rejected(facts: dict[str, Any]) -> str:
    return f"rejected by {facts['reject_check']}" if facts["reject_check"] else "not vetted"


def _step(number: int, step: Step) -> Iterator[RenderableType]:
    yield Rule(f"step {number}", style="dim")
    if step.original is not None:
        yield _block("the reasoner wrote", step.original, "dim")
        yield _block("the extractor kept", step.thought)
    else:
        yield _block("thought", step.thought)
    for call in step.discarded:
        yield from _call(call, "taken back: code")
    if step.call is not None:
        yield from _call(step.call, "code")


def _call(call: ToolCall, label: str) -> Iterator[RenderableType]:
    code = visible(call.code)
    yield Text(label, style="cyan")
    if len(code) <= HIGHLIGHTED:
        yield Padding(Syntax(code, "python", theme="ansi_dark", word_wrap=True), (0, 0, 0, 2))
    else:
        yield Padding(Text(code), (0, 0, 0, 2))
    result = call.result
    ok = result.outcome is Outcome.OK
    facts = f"{result.outcome.replace('_', ' ')}, {result.duration:.2f} s, tier {result.tier}"
    yield Text.assemble(("observation  ", "cyan"), (facts, "dim" if ok else "red"))
    yield Padding(Text(visible(call.observation)), (0, 0, 0, 2))


def _block(label: str, text: str, style: str = "") -> RenderableType:
    """A label and, indented below it, what somebody wrote: never markup, never an escape."""
    body = Table.grid(padding=(0, 1))
    body.add_row(Text(label, style="cyan"))
    body.add_row(Padding(Text(visible(text.strip("\n")), style=style), (0, 0, 0, 2)))
    return body


def _verdicts(verdicts: Iterable[VerdictRow]) -> RenderableType:
    marks = {True: ("passed", "green"), False: ("failed", "red"), None: ("undecided", "yellow")}
    rows = [
        (v.check_name, Text(*marks[v.passed]), v.version, Text(visible(v.reason))) for v in verdicts
    ]
    return table(("check", "verdict", "version", "reason"), rows, "\nVerdicts")


def _facts(facts: Iterable[tuple[str, Any]]) -> RenderableType:
    grid = Table.grid(padding=(0, 1))
    grid.add_column(style="cyan", no_wrap=True)
    grid.add_column(overflow="fold")
    for name, value in facts:
        shown = cell(value)
        shown.justify, shown.no_wrap, shown.overflow = "left", False, "fold"
        grid.add_row(name, shown)
    return grid
