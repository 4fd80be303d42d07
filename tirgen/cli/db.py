"""db: the schema, its size, its upkeep, its backups, its roles."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from shared.store import migrate, roles, upkeep
from shared.terminal import Format, console, json_text, table
from shared.work.celery_app import make_app, prepare_broker
from tirgen.cli.common import open_database

app = typer.Typer(no_args_is_help=True, help="The database: schema, size, backups, roles.")


@app.command()
def upgrade() -> None:
    """Bring the schema up to this version of the program."""
    db = open_database(migrate=False)
    before = migrate.current(db)
    migrate.upgrade(db)
    after = migrate.current(db)
    same = before == after
    told = f"{after}, as before" if same else f"{before or 'no schema'} -> {after}"
    console.print(told, highlight=False)


@app.command()
def address() -> None:
    """Where the database is, as psql takes it: psql "$(tirgen db address)". May hold a password."""
    typer.echo(open_database(migrate=False).conninfo)


@app.command()
def current() -> None:
    """Show the schema's version; exit code 1 unless it is the one that this program needs."""
    db = open_database(migrate=False)
    found, head = migrate.current(db), migrate.head()
    console.print(f"{found or 'no schema'} in {db.location}", markup=False, highlight=False)
    if found != head:
        console.print(f"this program needs {head}: tirgen db upgrade", style="red", highlight=False)
        raise typer.Exit(1)


@app.command()
def size(format: Annotated[Format, typer.Option()] = Format.TABLE) -> None:
    """How large each table is: rows (estimated), its own bytes, those of its indexes, together."""
    relations = upkeep.sizes(open_database())
    names = ("table", "rows", "data", "indexes", "together")
    if format is Format.JSON:
        rows = [(r.name, r.rows, r.table_bytes, r.index_bytes, r.total_bytes) for r in relations]
        typer.echo(json_text([dict(zip(names, row, strict=True)) for row in rows], indent=2))
        return
    shown = [
        (r.name, r.rows, _bytes(r.table_bytes), _bytes(r.index_bytes), _bytes(r.total_bytes))
        for r in [*relations, upkeep.together(relations)]
    ]
    console.print(table(names, shown))


@app.command()
def vacuum() -> None:
    """Give the space of deleted rows back to the tables, and renew the planner's statistics."""
    upkeep.vacuum(open_database())
    console.print("vacuumed and analysed", highlight=False)


@app.command()
def backup(
    file: Annotated[Path, typer.Argument(help="The file to write, which must not exist.")],
) -> None:
    """Write the whole database into one file (pg_dump, compressed), while work goes on."""
    upkeep.backup(open_database(), file)
    console.print(f"{file}: {_bytes(file.stat().st_size)}", markup=False, highlight=False)


@app.command()
def restore(
    file: Annotated[Path, typer.Argument(help="A file that `tirgen db backup` wrote.")],
) -> None:
    """Fill an empty database from a backup, all or nothing; older schemas are upgraded."""
    db = open_database(migrate=False)
    upkeep.restore(db, file)
    migrate.upgrade(db)
    told = f"restored into {db.location}, schema {migrate.current(db)}"
    console.print(told, markup=False, highlight=False)


@app.command(name="roles")
def make_roles() -> None:
    """Create the roles for a shared server, and give them their rights; to be run by the owner."""
    db = open_database()
    prepare_broker(db, make_app(db))
    roles.create(db)
    console.print(table(("role", "for"), ((r, Text(what)) for r, what in roles.ROLES.items())))
    example = f"CREATE ROLE alice LOGIN PASSWORD '...' IN ROLE {roles.READER};"
    console.print(f"\nA login of its own for everybody: {example}", highlight=False, markup=False)


def _bytes(n: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if n < 1000:
            return f"{n:.3g} {unit}"
        n /= 1000
    return f"{n:.3g} TB"
