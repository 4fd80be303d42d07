"""curate, filters: apply a chain of filters, look at chains, run their own examples."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text
from sqlalchemy import Select, select
from sqlalchemy.dialects.postgresql import distinct_on

from shared.store import Database
from shared.store.models import VerdictRow
from shared.terminal import Format, console, json_text, line, share, table
from tirgen import query
from tirgen.cli.common import open_database
from tirgen.curation import chain as chains
from tirgen.curation.base import PREFIX, Filter, failures

BAR = 24  # characters

Source = Annotated[str, typer.Argument(metavar="FILE|PRESET", help="See `tirgen filters list`.")]


def curate(
    filters: Source,
    where: Annotated[str, typer.Option(help="Expression of `tirgen query`; all if left out.")] = "",
    seed: Annotated[int, typer.Option(help="Of the filters' draws.")] = 0,
    dropped: Annotated[
        bool, typer.Option("--dropped", help="List what was dropped, by which filter and why.")
    ] = False,
    format: Annotated[Format, typer.Option()] = Format.TABLE,
) -> None:
    """Let trajectories pass through a chain of filters; every decision is stored as a verdict.

    tirgen curate paper --where 'run == "gsm" and vetted' --seed 1

    To freeze what is left: tirgen snapshot create NAME --where ... --filters ... --seed ...
    """
    chosen = chains.load(filters)
    query.check(query.Query(where))
    db = open_database()
    candidates = query.candidates(db, where)
    curated = chains.apply(db, chosen, candidates, seed=seed)
    if format is Format.JSON:
        found = {"name": chosen.name, "seed": seed, "stages": [asdict(s) for s in curated.stages],
                 "kept": curated.kept}  # fmt: skip
        if dropped:
            found["dropped"] = list(_dropped(db, candidates, curated.stages))
        typer.echo(json_text(found, indent=2))
        return
    total = curated.stages[0].before if curated.stages else len(curated.kept)
    rows: list[tuple[Any, ...]] = [("candidates", "", total, "", _bar(total, total))]
    rows += [
        (one.name, one.version, one.after, share(one.after, one.before), _bar(one.after, total))
        for one in curated.stages
    ]
    console.print(table(("after", "version", "left", "of those before", ""), rows))
    if dropped:
        listed = [tuple(one.values()) for one in _dropped(db, candidates, curated.stages)]
        console.print(table(("trajectory", "filter", "reason", "evidence"), listed, "\nDropped"))


filters_app = typer.Typer(no_args_is_help=True, help="Chains of filters for curation.")


@filters_app.command(name="list")
def list_() -> None:
    """List the presets, and every filter with its keys."""
    console.print(f"Presets: {', '.join(chains.PRESETS)} (tirgen filters show NAME)\n")
    rows = [
        (kind if i == 0 else "", key, Text(about, overflow="fold"))
        for kind, filter in chains.FILTERS.items()
        for i, (key, about) in enumerate(_keys(filter))
    ]
    console.print(table(("filter", "key", "what it is"), rows))


@filters_app.command()
def show(filters: Source) -> None:
    """Print a chain as it is written; a preset to start one's own from: > mine.toml."""
    chains.load(filters)
    if filters in chains.PRESETS:
        path: Any = files("tirgen.curation").joinpath("presets", f"{filters}.toml")
    else:
        path = Path(filters)
    typer.echo(path.read_text(encoding="utf-8"), nl=False)


@filters_app.command()
def test(filters: Source) -> None:
    """Run a chain's own examples; exit code 1 if a filter does not do what they say."""
    chosen = chains.load(filters)
    found = [failure for one in chosen.filters for failure in failures(one)]
    bare = [one.called for one in chosen.filters if not one.examples]
    for failure in found:
        console.print(Text(f"failed  {line(failure, len(failure))}", style="red"))
    n = sum(len(one.examples) for one in chosen.filters)
    if bare:
        console.print(Text(f"without examples: {', '.join(map(line, bare))}", style="yellow"))
    console.print(f"{n} examples of {len(chosen.filters)} filters, {len(found)} failures")
    if found:
        raise typer.Exit(1)


def _keys(filter: type[Filter]) -> Iterator[tuple[str, str]]:
    yield "", (filter.__doc__ or "").partition("\n\n")[0].replace("\n    ", " ")
    for name, one in filter.model_fields.items():
        if name not in Filter.model_fields:
            default = "" if one.is_required() else f" [{one.default}]"
            yield name, (one.description or "") + default


def _dropped(
    db: Database, candidates: Select[Any], stages: list[chains.Stage]
) -> Iterator[dict[str, Any]]:
    """What the newest verdicts of these filters say about candidates that did not pass them."""
    verdict = VerdictRow
    for stage in stages:
        newest = (
            select(verdict)
            .where(
                verdict.trajectory_id.in_(candidates),
                verdict.check_name == PREFIX + stage.name,
                verdict.version == stage.version,
            )
            .order_by(verdict.trajectory_id, verdict.id.desc())
            .ext(distinct_on(verdict.trajectory_id))
        )
        with db.session() as session:
            for one in session.scalars(newest.execution_options(yield_per=1000)):
                if not one.passed:
                    yield {
                        "trajectory": one.trajectory_id,
                        "filter": stage.name,
                        "reason": one.reason,
                        "evidence": json_text(one.evidence) if one.evidence else "",
                    }


def _bar(n: int, total: int) -> Text:
    return Text("█" * round(BAR * n / total) if total else "", style="green", no_wrap=True)
