"""tirgen snapshot: freeze a selection, look at it, check it, carry it elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import RenderableType
from rich.text import Text

from shared.store.models import SnapshotKind
from shared.store.snapshots import Record
from shared.terminal import Format, age, console, json_text, line, percent, table
from tirgen.cli.common import open_database
from tirgen.curation import splits
from tirgen.curation.audit import Difference, Report
from tirgen.curation.snapshots import Snapshots

SHOWN = 20  # findings that are printed

app = typer.Typer(
    no_args_is_help=True, help="Frozen selections, for training: create, look, check, carry."
)

Name = Annotated[str, typer.Argument(metavar="NAME", help="See `tirgen snapshot list`.")]
Output = Annotated[Format, typer.Option("--format")]


@app.command()
def create(
    name: Annotated[str, typer.Argument(help="Letters, digits, '-', '_' and '.'.")],
    where: Annotated[str, typer.Option(help="Expression of `tirgen query`; all if left out.")] = "",
    filters: Annotated[
        str | None, typer.Option(help="Preset or file of a filter chain; none if left out.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the filters' draws, the splits and the order.")] = 0,
    kind: Annotated[
        SnapshotKind, typer.Option(help="`problems`: for RL, with their measured difficulty.")
    ] = SnapshotKind.TRAJECTORIES,
    split: Annotated[
        str, typer.Option(help="Shares by name: train=0.95,valid=0.05. By problem.")
    ] = "train=1",
    format: Output = Format.TABLE,
) -> None:
    """Freeze what an expression selects and filters let through.

    tirgen snapshot create gsm-v1 --where 'run == "gsm" and vetted' --filters paper --seed 1
    """
    shares = splits.parse(split)
    snapshots = _snapshots()
    with console.status("Selecting, filtering, freezing ..."):
        made = snapshots.create(
            name, where=where, filters=filters, seed=seed, kind=kind, splits=shares
        )
    _print(made, format)


@app.command(name="list")
def list_(format: Output = Format.TABLE) -> None:
    """List the snapshots, newest first."""
    found = _snapshots().list()
    if format is Format.JSON:
        typer.echo(json_text([_json(one) for one in found], indent=2))
    elif found:
        names = ("snapshot", "kind", "rows", "splits", "digest", "age")
        rows = [
            (r.name, r.kind.value, r.n_rows, _splits(r), r.digest[:12], age(r.created_at))
            for r in found
        ]
        console.print(table(names, rows))
    else:
        console.print("No snapshots yet: tirgen snapshot create NAME --where vetted", style="dim")


@app.command()
def show(name: Name, format: Output = Format.TABLE) -> None:
    """Show where a snapshot comes from: funnel, runs, models, verdicts."""
    _print(_snapshots().show(name), format)


@app.command()
def diff(
    first: Annotated[str, typer.Argument(metavar="A")],
    second: Annotated[str, typer.Argument(metavar="B")],
    format: Output = Format.TABLE,
) -> None:
    """Say in what snapshot B differs from snapshot A."""
    found = _snapshots().diff(first, second)
    if format is Format.JSON:
        typer.echo(json_text(asdict(found), indent=2))
        return
    for part in _difference(found, first, second):
        console.print(part, highlight=False)


@app.command()
def verify(
    name: Annotated[str, typer.Argument(metavar="NAME|./DIR", help="A snapshot or an export.")],
    execute: Annotated[
        bool, typer.Option("--execute", help="Run all of its code again, and compare.")
    ] = False,
    format: Output = Format.TABLE,
) -> None:
    """Check that nothing was altered; exit code 1 if anything was."""
    snapshots = _snapshots()
    with console.status("Checking every row ..."):
        found = snapshots.verify(name, execute)
    if format is Format.JSON:
        typer.echo(json_text(_report_json(found), indent=2))
    else:
        for part in _report(found):
            console.print(part, highlight=False)
    if not found.is_sound:
        raise typer.Exit(1)


@app.command()
def export(
    name: Name,
    to: Annotated[Path, typer.Option(help="A folder that does not exist yet.")],
) -> None:
    """Write Parquet shards with checksums and a dataset card; `load_dataset(DIR)` reads them."""
    snapshots = _snapshots()
    with console.status("Exporting ..."):
        record = snapshots.export(name, to)
    console.print(f"{record.n_rows} rows in {to}, digest {record.digest}", markup=False,
                  highlight=False)  # fmt: skip


@app.command(name="import")
def import_(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="As `export` wrote it.")],
) -> None:
    """Bring an exported snapshot into this database: same rows, same name, same digest."""
    snapshots = _snapshots()
    with console.status("Checking and importing ..."):
        record = snapshots.import_(folder)
    console.print(f"{record.name}: {record.n_rows} rows, digest {record.digest}", markup=False,
                  highlight=False)  # fmt: skip


@app.command()
def delete(
    name: Name,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Delete a whole snapshot; the trajectories stay. What was trained on it can't be traced."""
    record = _snapshots().show(name)
    if not yes:
        typer.confirm(f"Delete snapshot {name} with {record.n_rows} rows?", abort=True)
    _snapshots().delete(name)
    console.print(f"{name} is deleted.", markup=False, highlight=False)


def _snapshots() -> Snapshots:
    return Snapshots(open_database())


def _print(record: Record, format: Format) -> None:
    if format is Format.JSON:
        typer.echo(json_text(_json(record), indent=2))
        return
    for part in _page(record):
        console.print(part, highlight=False)


def _json(record: Record) -> dict[str, Any]:
    return {**record.to_json(), "splits": dict(record.splits)}


def _page(record: Record) -> Iterator[RenderableType]:
    lineage = record.lineage
    yield Text.assemble(
        (f"Snapshot {line(record.name)}", "bold"),
        f"  {record.n_rows} {record.kind}, frozen {record.created_at:%Y-%m-%d %H:%M} UTC",
    )
    yield _fact("digest", record.digest)
    yield _fact("selected by", line(lineage["where"] or "everything"))
    chain = (lineage["filters"] or {}).get("name", "none")
    yield _fact("filters", line(str(chain)))
    yield _fact("splits", f"{_splits(record)}, by problem, seed {lineage['seed']}")
    yield _fact("frozen by", line(f"{record.created_by}, tirgen {lineage['code_version']}"))
    stages = [
        (s["stage"], s["version"] or None, s["before"], s["after"],
         Text(percent(s["after"], s["before"]), justify="right"))
        for s in lineage["funnel"]
    ]  # fmt: skip
    yield table(("stage", "version", "before", "after", "kept"), stages, "\nFunnel")
    runs = [(r["name"], r["trajectories"], r["fingerprint"], r["code_version"])
            for r in lineage["runs"]]  # fmt: skip
    yield table(("run", "trajectories", "fingerprint", "code version"), runs, "\nRuns")
    models = [(m["reasoner"], m["extractor"], m["trajectories"]) for m in lineage["models"]]
    yield table(("reasoner", "code extractor", "trajectories"), models, "\nModels")
    verdicts = [(v["check"], v["version"], v["passed"], v["failed"], v["undecided"])
                for v in lineage["verdicts"]]  # fmt: skip
    yield table(("check", "version", "passed", "failed", "undecided"), verdicts, "\nVerdicts used")


def _report(found: Report) -> Iterator[RenderableType]:
    name = line(found.record.name)
    for one in found.findings[:SHOWN]:
        where = "" if one.position is None else f"row {one.position}: "
        yield Text(f"{where}{line(one.what)}", style="red")
    if len(found.findings) > SHOWN:
        yield Text(f"and {len(found.findings) - SHOWN} more: --format json lists all", style="red")
    again = "" if found.n_executed is None else f", the code of {found.n_executed} run again"
    if found.is_sound:
        yield Text(f"{name} is what was frozen: {found.n_checked} rows checked{again}; digest "
                   f"{found.record.digest}", style="green")  # fmt: skip
    else:
        yield Text(f"{name} is NOT what was frozen: {len(found.findings)} findings",
                   style="bold red")  # fmt: skip


def _report_json(found: Report) -> dict[str, Any]:
    return {
        "snapshot": found.record.name, "digest": found.record.digest, "sound": found.is_sound,
        "n_rows": found.record.n_rows, "n_checked": found.n_checked,
        "n_executed": found.n_executed, "findings": [asdict(one) for one in found.findings],
    }  # fmt: skip


def _difference(found: Difference, first: str, second: str) -> Iterator[RenderableType]:
    rows = [
        ("rows in both", found.in_both),
        (f"rows only in {first}", found.only_in_first),
        (f"rows only in {second}", found.only_in_second),
        ("of those in both: with other verdicts or difficulty", found.rejudged),
        ("of those in both: in another split", found.other_split),
        ("problems that are in different splits", found.crossing),
    ]
    yield table(("", "n"), [(Text(line(what)), n) for what, n in rows])
    if found.lineage:
        listed = [(key, json_text(a), json_text(b)) for key, (a, b) in found.lineage.items()]
        yield table(("made with", first, second), listed, "\nMade otherwise")
    if found.is_empty:
        yield Text("The rows are the same.", style="green")


def _splits(record: Record) -> str:
    return ", ".join(f"{name} {n}" for name, n in record.splits.items())


def _fact(label: str, text: str) -> Text:
    return Text.assemble((f"{label:14}", "cyan"), text)
