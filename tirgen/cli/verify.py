"""verify, consensus: look at stored answers again, with the current verifier."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from shared.terminal import Format, console, json_text, line, percent, table
from shared.trajectory import Check
from tirgen import agreement, reverify
from tirgen.agents.verifier import version_of
from tirgen.cli.common import open_database
from tirgen.cli.report import agreed
from tirgen.reverify import Change, Rejudged, Scope, Transition

EXAMPLES = 10  # that are shown of anything
MARKS = {True: ("passed", "green"), False: ("failed", "red"), None: ("undecided", "yellow")}
NAMES = {value: word for value, (word, _) in MARKS.items()}

Force = Annotated[bool, typer.Option("--force", help="Also what is up to date.")]


def verify(
    name: Annotated[str, typer.Argument(metavar="RUN|SNAPSHOT", help="What to judge again.")],
    checks: Annotated[
        str,
        typer.Option(
            help="Checks, separated by commas: `answer` alone runs no stored code. All by default."
        ),
    ] = "",
    force: Force = False,
    format: Annotated[Format, typer.Option()] = Format.TABLE,
) -> None:
    """Judge stored trajectories again with the current verifier.

    Writes new verdicts beside the old ones and shows how they differ. Only checks whose version has
    changed are made again; after a Ctrl-C the same command goes on.
    """
    wanted = reverify.chosen([word.strip() for word in checks.split(",") if word.strip()])
    db = open_database()
    scope = reverify.find(db, name)
    with _progress("judging", scope.n_trajectories) as advance:
        done = asyncio.run(reverify.rejudge(db, scope, wanted, force=force, advance=advance))
    with db.session() as session:
        transitions = reverify.confusion(session, scope, wanted)
        changed = reverify.changes(session, scope, wanted, EXAMPLES)
    if format is Format.JSON:
        typer.echo(json_text(_verify_json(scope, wanted, done, transitions, changed), indent=2))
    else:
        for part in _verify_page(scope, done, transitions, changed):
            console.print(part, highlight=False)
    if done.failures:
        raise typer.Exit(1)


def consensus(
    run: Annotated[str, typer.Argument(help="The run's name, see `tirgen runs`.")],
    force: Force = False,
    format: Annotated[Format, typer.Option()] = Format.TABLE,
) -> None:
    """Find what the samples of each problem agree on, and where that is not the reference.

    Reference answers are wrong often enough: the list it shows is worth reading. Problems that
    have not changed since are skipped.
    """
    db = open_database()
    found = agreement.find(db, run)
    with _progress("comparing", found.n_problems) as advance:
        done = agreement.compare(db, found, force=force, advance=advance)
    with db.session() as session:
        shown = agreement.summary(session, found.run_id, EXAMPLES)
    if format is Format.JSON:
        counts = {"n_compared": done.n_compared, "n_skipped": done.n_skipped}
        whole = {"run": run, **counts, "failures": dict(done.failures), **shown.to_json()}
        typer.echo(json_text(whole, indent=2))
    else:
        said = f"{done.n_compared} problems compared, {done.n_skipped} were up to date"
        console.print(said, highlight=False)
        for part in agreed(shown):
            console.print(part, highlight=False)
        for key, why in list(done.failures.items())[:EXAMPLES]:
            console.print(_failure(f"problem {key[:12]}", why), highlight=False)
    if done.failures:
        raise typer.Exit(1)


def _verify_page(
    scope: Scope, done: Rejudged, transitions: Sequence[Transition], changed: Sequence[Change]
) -> Iterator[Any]:
    yield Text(
        f"{scope.kind} {line(scope.name)}: {scope.n_trajectories} trajectories, "
        f"{done.n_judged} judged, {done.n_skipped} were up to date"
    )
    if transitions:
        yield table(
            ("check", "version", "was", "version now", "is", "verdicts"),
            [
                (t.check.value, t.old_version, _mark(t.old), t.new_version, _mark(t.new), t.n)
                for t in transitions
            ],
            "\nThe newest verdict beside the one before it",
        )
        n = sum(t.n for t in transitions)
        n_changed = sum(t.n for t in transitions if t.changed)
        yield Text(f"{n_changed} of {n} changed ({percent(n_changed, n)})")
    if changed:
        yield table(
            ("id", "check", "was", "is", "answer", "reference", "reason"),
            [
                (c.id, c.check.value, _mark(c.old), _mark(c.new), c.answer, c.reference, c.reason)
                for c in changed
            ],
            "\nChanged, for example (tirgen show ID)",
        )
    for i, why in list(done.failures.items())[:EXAMPLES]:
        yield _failure(f"trajectory {i}", why)
    if done.failures:
        yield Text(f"{len(done.failures)} could not be judged; the same command tries them again")


def _verify_json(
    scope: Scope,
    checks: Sequence[Check],
    done: Rejudged,
    transitions: Sequence[Transition],
    changed: Sequence[Change],
) -> dict[str, Any]:
    return {
        "name": scope.name,
        "kind": scope.kind,
        "versions": {check.value: version_of(check) for check in checks},
        "n_trajectories": scope.n_trajectories,
        "n_judged": done.n_judged,
        "n_skipped": done.n_skipped,
        "failures": [{"id": i, "reason": why} for i, why in done.failures.items()],
        "confusion": [_worded(asdict(t)) for t in transitions],
        "n_changed": sum(t.n for t in transitions if t.changed),
        "changed": [_worded(asdict(c)) for c in changed],
    }


def _worded(row: dict[str, Any]) -> dict[str, Any]:
    return {**row, "old": NAMES[row["old"]], "new": NAMES[row["new"]]}


def _mark(passed: bool | None) -> Text:
    return Text(*MARKS[passed])


def _failure(what: str, why: str) -> Text:
    return Text.assemble((f"{what}: ", "red"), line(why))


@contextmanager
def _progress(word: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar on standard error; yields what moves it. Ctrl-C ends with a word on how to go on."""
    columns = (TextColumn(word), BarColumn(bar_width=24), MofNCompleteColumn(),
               TimeRemainingColumn())  # fmt: skip
    shown = Console(stderr=True)
    try:
        with Progress(*columns, console=shown, transient=True) as progress:
            task = progress.add_task(word, total=total)
            yield lambda n: progress.advance(task, n)
    except KeyboardInterrupt:
        shown.print("Stopped. The same command goes on.")
        raise typer.Exit(130) from None
