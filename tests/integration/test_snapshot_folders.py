"""An export is the snapshot: readable by others, checked to the byte, and importable elsewhere."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from random import Random

import datasets
import pyarrow.parquet as pq
import pytest
import yaml
from sqlalchemy import select, text

from shared.errors import DatabaseError, InputError
from shared.store import Database, Snapshot, snapshot_parquet
from shared.store.models import RunRow, TrajectoryRow, WorkItemRow
from tests import frozen
from tirgen.curation import folders
from tirgen.curation.snapshots import Snapshots

New = Callable[[], AbstractContextManager[str]]


@pytest.fixture(scope="module")
def shared(new_database: New, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Snapshots]:
    """Snapshots `rows` (three shards, two splits) and `problems`, and their folders."""
    with new_database() as url:
        db = Database(url)
        frozen.fill(db, 60)
        made = Snapshots(db)
        made.create("rows", where="vetted", seed=1, splits={"train": 0.7, "valid": 0.3})
        made.create("problems", kind="problems", seed=1)
        yield made
        db.close()


@pytest.fixture(scope="module")
def exported(shared: Snapshots, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that holds the exports `rows` and `problems`."""
    folder = tmp_path_factory.mktemp("exports")
    folders.export(shared.db, "rows", folder / "rows", shard_rows=20)
    folders.export(shared.db, "problems", folder / "problems")
    return folder


@pytest.fixture
def copied(exported: Path, tmp_path: Path) -> Path:
    """A copy of the export `rows` that a test may damage."""
    return Path(shutil.copytree(exported / "rows", tmp_path / "rows"))


def test_the_same_rows_come_from_the_folder(shared: Snapshots, exported: Path) -> None:
    there, here = shared.open("rows"), Snapshot.open(exported / "rows")
    assert here.record == there.record
    assert list(here.rows()) == list(there.rows())
    for world in (1, 2, 4):
        for rank in range(world):
            assert list(here.rows(rank, world, 11)) == list(there.rows(rank, world, 11))
    assert list(here.rows(split="valid")) == list(there.rows(split="valid"))
    problems = Snapshot.open(exported / "problems").problems()
    assert list(problems) == list(shared.open("problems").problems())


def test_the_folder_is_read_anywhere_in_it_at_once(
    exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Resuming opens only the shards that are still to be read."""
    opened: list[str] = []
    check = snapshot_parquet.ParquetSource.check_file

    def counted(source: snapshot_parquet.ParquetSource, file: snapshot_parquet.File) -> None:
        opened.append(file.path)
        check(source, file)

    monkeypatch.setattr(snapshot_parquet.ParquetSource, "check_file", counted)
    snapshot = Snapshot.open(str(exported / "rows"))
    start = snapshot.source.files[-1].first  # type: ignore[attr-defined]
    assert [e.position for e in snapshot.rows(start=start)] == list(range(start, len(snapshot)))
    assert opened == [snapshot.source.files[-1].path]  # type: ignore[attr-defined]


def test_reading_a_folder_starts_no_threads_of_arrow(exported: Path) -> None:
    """They abort a process that ends soon after: "terminate called without an active exception"."""
    program = (
        "import os, pathlib, pyarrow.parquet\n"
        "from shared.store.snapshot_parquet import ParquetSource\n"
        "before = set(os.listdir('/proc/self/task'))\n"
        f"ParquetSource.open(pathlib.Path({str(exported / 'rows')!r})).check()\n"
        "assert set(os.listdir('/proc/self/task')) <= before\n"
    )
    # Without the allocator's own thread, which comes and goes as it likes and harms nobody.
    environment = {**os.environ, "JE_ARROW_MALLOC_CONF": "background_thread:false"}
    subprocess.run([sys.executable, "-c", program], check=True, env=environment)


def test_datasets_loads_an_export(exported: Path, tmp_path: Path, shared: Snapshots) -> None:
    cache = str(tmp_path / "cache")
    loaded = datasets.load_dataset(str(exported / "rows"), cache_dir=cache)
    record = shared.show("rows")
    assert {name: len(rows) for name, rows in loaded.items()} == dict(record.splits)
    entries = list(shared.open("rows").rows())
    for row, entry in zip([*loaded["train"], *loaded["valid"]], entries, strict=True):
        made = entry.trajectory
        assert (row["position"], row["split"]) == (entry.position, entry.split)
        assert (row["problem"], row["reference"]) == (entry.problem.text, entry.problem.answer)
        assert (row["response"], row["answer"]) == (made.text, made.answer)
        codes = [step.call.code if step.call else None for step in made.steps]
        assert [step["code"] for step in row["steps"]] == codes
        assert {v["check"] for v in json.loads(row["verdicts"])} == {"executed", "answer"}
    problems = datasets.load_dataset(
        str(exported / "problems"), cache_dir=cache, split="train", streaming=True
    )
    assert {row["pass_rate"] for row in problems} == {0.5, 1.0}


def test_the_card_says_what_it_is(exported: Path, shared: Snapshots) -> None:
    card = (exported / "rows" / "README.md").read_text()
    _, front, page = card.split("---\n", 2)
    [config] = yaml.safe_load(front)["configs"]
    assert [entry["split"] for entry in config["data_files"]] == ["train", "valid"]
    record = shared.show("rows")
    for said in (record.digest, "| `many` | 48 |", "`vetted`", "| `where` | 60 | 48 |"):
        assert said in page


def test_what_users_named_stays_text_on_the_card(db: Database, tmp_path: Path) -> None:
    run = "x`<script>|[a](b)\n# title"
    frozen.fill(db, 4, run=run)
    where = r'run == "x`<script>|[a](b)\n# title"'
    Snapshots(db).create("a", where=where)
    Snapshots(db).export("a", tmp_path / "a")
    page = (tmp_path / "a" / "README.md").read_text()
    assert "\n# title" not in page
    assert "| `` x`<script>\\|[a](b) # title `` |" in page


# One changed byte


def test_one_changed_byte_of_a_shard_is_found(copied: Path, shared: Snapshots) -> None:
    random = Random(0)
    for shard in sorted((copied / "data").iterdir()):
        whole = shard.read_bytes()
        for at in [0, len(whole) - 1, *(random.randrange(len(whole)) for _ in range(15))]:
            shard.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
            with pytest.raises((InputError, DatabaseError)):
                list(Snapshot.open(copied).rows())
            assert not shared.verify(copied).is_sound
        shard.write_bytes(whole)
    assert shared.verify(copied).is_sound


def test_one_changed_byte_of_the_manifest_file_is_found(copied: Path) -> None:
    """Also one that JSON would not mind, such as a space or the case of a hexadecimal digit."""
    manifest = copied / "manifest.json"
    whole = manifest.read_bytes()
    random = Random(0)
    for at in [0, len(whole) - 1, *(random.randrange(len(whole)) for _ in range(150))]:
        for flip in (1, 32):
            manifest.write_bytes(whole[:at] + bytes([whole[at] ^ flip]) + whole[at + 1 :])
            with pytest.raises(InputError, match="manifest file was altered"):
                Snapshot.open(copied)
    manifest.write_bytes(whole + b"\n")
    with pytest.raises(InputError, match="manifest file was altered"):
        Snapshot.open(copied)


def test_a_shard_that_was_written_anew_is_found(copied: Path, shared: Snapshots) -> None:
    """Somebody edits rows and mends the shard's checksum too: the digest still tells."""
    source = snapshot_parquet.ParquetSource.open(copied)
    path = copied / source.files[0].path
    table = pq.read_table(path)
    column = table.schema.get_field_index("split")
    values = ["valid"] * table.num_rows
    pq.write_table(table.set_column(column, table.schema.field(column), [values]), path)
    first = source.files[0]
    mended = snapshot_parquet.describe(copied, first.path, first.first, first.rows)
    snapshot_parquet.write_manifest(copied, source.record, [mended, *source.files[1:]])
    with pytest.raises(InputError, match="content of the shards was altered"):
        list(Snapshot.open(copied).rows())
    assert not shared.verify(copied).is_sound


def test_a_missing_shard_is_found(copied: Path, shared: Snapshots) -> None:
    (copied / Snapshot.open(copied).source.files[1].path).unlink()  # type: ignore[attr-defined]
    with pytest.raises(InputError, match=r"altered|cannot be read"):
        list(Snapshot.open(copied).rows())
    assert not shared.verify(copied).is_sound


def test_a_manifest_cannot_point_outside_its_folder(copied: Path) -> None:
    source = snapshot_parquet.ParquetSource.open(copied)
    first = source.files[0]
    for path in ("data/../../rows/data/x.parquet", "/etc/passwd", "data/x"):
        outside = snapshot_parquet.File(path, first.sha256, first.bytes, first.first, first.rows)
        snapshot_parquet.write_manifest(copied, source.record, [outside, *source.files[1:]])
        with pytest.raises(InputError, match="manifest file was altered"):
            Snapshot.open(copied)


# Into another database


def test_an_import_elsewhere_has_the_same_digest_and_rows(
    exported: Path, shared: Snapshots, new_database: New, tmp_path: Path
) -> None:
    with new_database() as url:
        db = Database(url)
        frozen.fill(db, 6, run="earlier")  # ids differ from those at home
        other = Snapshots(db)
        for name in ("rows", "problems"):
            record = other.import_(exported / name)
            assert record == other.show(name) == shared.show(name)
            assert other.verify(name).is_sound
        assert list(other.open("rows").rows()) == list(shared.open("rows").rows())
        again = other.export("rows", tmp_path / "again")
        assert again == record or again == shared.show("rows")
        assert _ids(other) != _ids(shared)

        with db.session() as session:
            run = session.scalars(select(RunRow).where(RunRow.name == "rows/many")).one()
            assert (run.state, run.n_items) == ("done", 48)
            states = select(WorkItemRow.state).where(WorkItemRow.run_id == run.id)
            assert set(session.scalars(states)) == {"vetted"}
            facts = select(
                TrajectoryRow.content_hash, TrajectoryRow.vetted, TrajectoryRow.duration,
                TrajectoryRow.reasoner_model, TrajectoryRow.code_version, TrajectoryRow.n_steps,
            )  # fmt: skip
            brought = session.execute(facts.where(TrajectoryRow.run_id == run.id)).all()
        with shared.db.session() as session:
            origin = session.execute(facts.where(TrajectoryRow.vetted)).all()
        assert sorted(brought) == sorted(origin)
        # What was imported can be selected and frozen like anything else, to the same rows.
        anew = other.create("anew", where='run == "rows/many"', seed=1,
                            splits={"train": 0.7, "valid": 0.3})  # fmt: skip
        assert anew.digest == shared.show("rows").digest
        with pytest.raises(InputError, match="'rows' already"):
            other.import_(exported / "rows")
        db.close()


def _ids(made: Snapshots) -> list[int]:
    with made.db.session() as session:
        rows = "SELECT trajectory_id FROM snapshot_rows WHERE trajectory_id > 0 ORDER BY 1"
        return list(session.scalars(text(rows)))


def test_nothing_is_kept_of_an_import_that_fails(copied: Path, db: Database) -> None:
    source = snapshot_parquet.ParquetSource.open(copied)
    last = source.files[-1]
    table = pq.read_table(copied / last.path)
    column = table.schema.get_field_index("origin")
    pq.write_table(
        table.set_column(column, table.schema.field(column), [["{}"] * table.num_rows]),
        copied / last.path,
    )
    mended = snapshot_parquet.describe(copied, last.path, last.first, last.rows)
    snapshot_parquet.write_manifest(copied, source.record, [*source.files[:-1], mended])
    with pytest.raises(InputError, match="not of the format"):
        Snapshots(db).import_(copied)
    with db.session() as session:
        for table_name in ("snapshots", "snapshot_rows", "runs", "trajectories", "problems"):
            assert session.scalar(text(f"SELECT count(*) FROM {table_name}")) == 0


# Where it is written


def test_an_export_overwrites_nothing_and_leaves_nothing_half_made(
    shared: Snapshots, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used = tmp_path / "used"
    used.mkdir()
    (used / "thesis.tex").touch()
    with pytest.raises(InputError, match="something already"):
        shared.export("rows", used)
    assert [path.name for path in used.iterdir()] == ["thesis.tex"]

    def fails(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(snapshot_parquet, "write_manifest", fails)
    with pytest.raises(InputError, match="No space left"):
        shared.export("rows", tmp_path / "full")
    assert not (tmp_path / "full").exists()
    monkeypatch.undo()
    shared.export("rows", tmp_path / "full")  # what an interrupted one left is no obstacle
    assert not list(tmp_path.glob("*.unfinished"))


def test_an_altered_row_is_not_exported(db: Database, tmp_path: Path) -> None:
    frozen.fill(db, 10)
    Snapshots(db).create("a")
    frozen.alter(db, "UPDATE verdicts SET reason = 'because' WHERE id = 3")
    with pytest.raises(DatabaseError, match="a verdict is not what was frozen"):
        Snapshots(db).export("a", tmp_path / "a")
    assert not (tmp_path / "a").exists()
