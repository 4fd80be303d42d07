"""A stream is the frozen rows, each once and in order, whatever breaks; or it is an error."""

from __future__ import annotations

import gc
import os
import pickle
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from multiprocessing import get_context
from multiprocessing.connection import wait
from pathlib import Path
from random import Random

import psycopg
import pytest
from sqlalchemy import make_url, select

from shared.errors import ConfigError, DatabaseError, InputError
from shared.store import (
    Database,
    EmbeddedPostgres,
    Snapshot,
    TrajectoryEntry,
    migrate,
    snapshot_reader,
)
from shared.store import snapshot_database as reading
from shared.store.database import libpq_conninfo
from shared.store.models import ManifestRow
from tests import frozen
from tirgen.curation.snapshots import Snapshots

N = 150  # rows
KILLS = 200
NAME = "frozen"

New = Callable[[], AbstractContextManager[str]]


@pytest.fixture(autouse=True)
def small_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many pages in few rows: what happens between two pages happens often."""
    monkeypatch.setattr(reading, "PAGE", 7)


@dataclass(frozen=True)
class Frozen:
    url: str
    entries: list[TrajectoryEntry]


@pytest.fixture(scope="module")
def shared(new_database: New) -> Iterator[Frozen]:
    """A snapshot of N rows, and what must come out of it."""
    with new_database() as url:
        db = Database(url)
        frozen.fill(db, N)
        Snapshots(db).create(NAME, seed=1, splits={"train": 0.8, "valid": 0.2})
        db.close()
        yield Frozen(url, list(Snapshot.open(NAME, url).rows()))


@pytest.fixture
def own(db: Database) -> Database:
    """A smaller one, for a test that alters it."""
    frozen.fill(db, 30)
    Snapshots(db).create(NAME, seed=1)
    return db


def url_of(db: Database) -> str:
    return db.url.render_as_string(hide_password=False)


def cut(url: str) -> int:
    """End the server's side of every stream; how many there were."""
    with psycopg.connect(libpq_conninfo(url), autocommit=True) as connection:
        cursor = connection.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
            "WHERE datname = current_database() AND application_name = 'tirgen snapshot'"
        )
        return cursor.rowcount


def test_rows_are_the_frozen_ones_in_order(shared: Frozen) -> None:
    assert [entry.position for entry in shared.entries] == list(range(N))
    assert len({entry.content_hash for entry in shared.entries}) == N
    for entry in shared.entries:
        assert entry.trajectory.problem_key == entry.problem.key


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("start", [0, 37])
def test_ranks_and_workers_share_the_rows_exactly(shared: Frozen, world: int, start: int) -> None:
    snapshot = Snapshot.open(NAME, shared.url)
    by_rank = [list(snapshot.rows(rank, world, start)) for rank in range(world)]
    seen = sorted((entry for rows in by_rank for entry in rows), key=lambda e: e.position)
    assert seen == shared.entries[start:]
    workers = [list(snapshot.rows(0, world, start, worker=w, workers=3)) for w in range(3)]
    # Row by row, worker after worker, as a data loader takes them, is the rank's own order.
    first = min(range(3), key=lambda w: workers[w][0].position)
    taken = [workers[(first + i) % 3][i // 3] for i in range(len(by_rank[0]))]
    assert taken == by_rank[0]


def test_a_split_is_read_alone_and_resumed_by_the_same_positions(shared: Frozen) -> None:
    snapshot = Snapshot.open(NAME, shared.url)
    valid = list(snapshot.rows(split="valid"))
    assert valid == [entry for entry in shared.entries if entry.split == "valid"]
    assert valid
    resumed = list(snapshot.rows(split="valid", start=valid[3].position + 1))
    assert resumed == valid[4:]
    with pytest.raises(ConfigError, match="no split 'test'"):
        snapshot.rows(split="test")


@pytest.mark.parametrize("world", [1, 2, 4])
def test_killed_anywhere_and_resumed_is_the_same_sequence(
    shared: Frozen, world: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A third of KILLS for each number of ranks: of the reader, or of its connection under it.

    A reader that is killed leaves only the position of its last row. A connection is cut by the
    server; the reader that holds it must not notice.
    """
    random = Random(world)
    n_connections = 0
    connect = reading._Line._connect

    def counted(line: object) -> object:
        nonlocal n_connections
        n_connections += 1
        return connect(line)  # type: ignore[arg-type]

    monkeypatch.setattr(reading._Line, "_connect", counted)
    n_kills = n_cuts = n_streams = 0
    while n_kills < -(-KILLS // 3):
        for rank in range(world):
            seen: list[TrajectoryEntry] = []
            stream: Iterator[TrajectoryEntry] | None = None
            wanted = shared.entries[rank::world]
            while len(seen) < len(wanted):
                if stream is None:
                    n_streams += 1
                    start = seen[-1].position + 1 if seen else 0
                    stream = Snapshot.open(NAME, shared.url).rows(rank, world, start)
                for _ in range(random.randint(1, 40)):
                    entry = next(stream, None)
                    if entry is None:
                        break
                    seen.append(entry)
                n_kills += 1
                if random.random() < 0.5:
                    n_cuts += cut(shared.url)
                else:
                    stream.close()  # type: ignore[attr-defined]
                    stream = None
            assert seen == wanted
    assert n_cuts > 0
    assert n_connections > n_streams, "some of the cuts made a reader connect again"


def test_ranks_may_change_when_a_job_is_resumed(shared: Frozen) -> None:
    snapshot = Snapshot.open(NAME, shared.url)
    before = [entry for rank in range(4) for entry in snapshot.rows(rank, 4)]
    done = [entry for entry in before if entry.position < 60]
    after = [entry for rank in range(2) for entry in snapshot.rows(rank, 2, start=60)]
    assert sorted(e.position for e in [*done, *after]) == list(range(N))


def test_the_server_may_die_under_a_stream(tmp_path: Path) -> None:
    """kill -9 of the postmaster; the stream goes on when it is back, with the very next row."""
    server = EmbeddedPostgres(tmp_path / "home")
    db = Database(server.start())
    try:
        migrate.upgrade(db)
        frozen.fill(db, 60)
        Snapshots(db).create(NAME)
        snapshot = Snapshot.open(NAME, url_of(db))
        wanted = list(snapshot.rows())
        stream = snapshot.rows()
        seen = [next(stream) for _ in range(10)]
        pid = server.status().pid
        assert pid is not None
        handle = os.pidfd_open(pid)
        os.kill(pid, signal.SIGKILL)
        wait([handle])  # until it is dead
        os.close(handle)
        restarting = threading.Thread(target=server.start)
        restarting.start()
        seen += stream
        restarting.join()
        assert seen == wanted
    finally:
        db.close()
        server.stop()


def test_a_server_that_stays_away_is_an_error_in_the_end(own: Database) -> None:
    url = url_of(own)
    stream = Snapshot.open(NAME, url, patience=0.2).rows()
    next(stream)
    own.close()
    name = make_url(url).database
    admin = libpq_conninfo(url) + " dbname=postgres"
    with psycopg.connect(admin, autocommit=True) as connection:
        connection.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false".encode())
        connection.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", (name,)
        )
    with pytest.raises(DatabaseError, match="cannot be read on"):
        list(stream)


# What was altered does not come out


IN_MANIFEST = (
    "SET split = 'Train' WHERE position = 29",
    "SET content_hash = overlay(content_hash PLACING 'x' FROM 7) WHERE position = 29",
    "SET body_hash = overlay(body_hash PLACING 'x' FROM 7) WHERE position = 29",
    "SET verdicts_hash = overlay(verdicts_hash PLACING 'x' FROM 7) WHERE position = 29",
    "SET problem_key = (SELECT max(key) FROM problems) WHERE position IN (0, 29)",
    "SET position = 30 WHERE position = 29",
)


def test_an_altered_manifest_gives_no_row_at_all(own: Database) -> None:
    all_snapshots = Snapshots(own)
    altered = [f"UPDATE snapshot_rows {change} AND snapshot_id = :id" for change in IN_MANIFEST]
    altered += [
        "DELETE FROM snapshot_rows WHERE position = 29 AND snapshot_id = :id",
        "INSERT INTO snapshot_rows SELECT snapshot_id, 30, split, problem_key, trajectory_id, "
        "content_hash, body_hash, verdict_ids, verdicts_hash FROM snapshot_rows "
        "WHERE position = 29 AND snapshot_id = :id",
    ]
    for i, change in enumerate(altered, start=2):
        all_snapshots.create(f"s{i}", seed=1)
        frozen.alter(own, change, id=i)
        with pytest.raises(DatabaseError, match="manifest was altered"):
            next(Snapshot.open(f"s{i}", url_of(own)).rows())
        assert not all_snapshots.verify(f"s{i}").is_sound
    assert all_snapshots.verify(NAME).is_sound  # the control


def test_one_changed_byte_of_any_body_stops_the_stream_there(own: Database) -> None:
    random = Random(0)
    snapshot = Snapshot.open(NAME, url_of(own))
    for _ in range(20):
        position, share = random.randrange(30), random.random()
        flip = (
            "UPDATE trajectories SET body = set_byte(body, at, get_byte(body, at) # 1) "
            "FROM (SELECT trajectory_id, (length(body) * :share)::int AS at FROM snapshot_rows "
            "JOIN trajectories ON id = trajectory_id WHERE position = :position) byte "
            "WHERE id = trajectory_id"
        )
        frozen.alter(own, flip, position=position, share=share)
        seen = []
        with pytest.raises(DatabaseError, match=f"row {position} was altered: its trajectory"):
            seen.extend(snapshot.rows())
        assert [f.position for f in Snapshots(own).verify(NAME).findings] == [position]
        frozen.alter(own, flip, position=position, share=share)  # back again
    assert len(list(snapshot.rows())) == 30


def test_a_changed_problem_stops_the_stream(own: Database) -> None:
    for column in ("text", "answer"):
        frozen.alter(own, f"UPDATE problems SET {column} = {column} || ' '")
        with pytest.raises(DatabaseError, match="row 0 was altered: its problem"):
            next(Snapshot.open(NAME, url_of(own)).rows())
        frozen.alter(own, f"UPDATE problems SET {column} = trim({column})")
    assert next(Snapshot.open(NAME, url_of(own)).rows()).position == 0


def test_every_changed_or_lost_verdict_is_found(own: Database) -> None:
    changes = (
        "UPDATE verdicts SET passed = NOT passed",
        "UPDATE verdicts SET passed = NULL",
        "UPDATE verdicts SET reason = reason || '.'",
        "UPDATE verdicts SET version = version || '1'",
        "UPDATE verdicts SET evidence = jsonb_set(evidence, '{share}', '0.5')",
        "UPDATE verdicts SET check_name = 'format'",
        "DELETE FROM verdicts",
    )
    with own.session() as session:
        rows = select(ManifestRow.position, ManifestRow.trajectory_id)
        ids = {row.position: row.trajectory_id for row in session.execute(rows)}
    for position, change in enumerate(changes):
        what = f"{change} WHERE trajectory_id = :id AND check_name = 'answer'"
        frozen.alter(own, what, id=ids[position])
    findings = Snapshots(own).verify(NAME).findings
    assert [finding.position for finding in findings] == list(range(len(changes)))
    assert all("a verdict is not what was frozen" in finding.what for finding in findings)


def test_an_altered_record_is_not_opened(own: Database) -> None:
    changes = (
        "lineage = replace(lineage::text, '\"seed\": 1', '\"seed\": 2')::json",
        "n_rows = n_rows + 1",
        "created_by = 'someone'",
        "created_at = created_at + interval '1 microsecond'",
        "digest = overlay(digest PLACING 'x' FROM 7)",
        "kind = 'problems'",
        "splits = '{\"all\": 30}'",
        "name = name || 'x'",
    )
    for i, change in enumerate(changes, start=2):
        Snapshots(own).create(f"s{i}", seed=1)
        frozen.alter(own, f"UPDATE snapshots SET {change} WHERE id = :id", id=i)
        name = f"s{i}x" if change.startswith("name") else f"s{i}"
        with pytest.raises(DatabaseError, match="record was altered"):
            Snapshot.open(name, url_of(own))
    assert len(Snapshot.open(NAME, url_of(own))) == 30  # the control


def test_a_snapshot_that_is_deleted_while_it_is_read_is_no_shorter_one(own: Database) -> None:
    stream = Snapshot.open(NAME, url_of(own)).rows()
    next(stream)
    Snapshots(own).delete(NAME)
    with pytest.raises(DatabaseError, match="are gone"):
        list(stream)


# Being used


def test_memory_holds_a_few_pages_whatever_the_length(
    shared: Frozen, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pages are asked for only as rows are taken: those ahead and the one in hand."""
    asked: list[int] = []
    page = reading.DatabaseSource._page

    def counted(source: object, wanted: range, connection: object) -> object:
        asked.append(len(wanted))
        return page(source, wanted, connection)  # type: ignore[arg-type]

    monkeypatch.setattr(reading.DatabaseSource, "_page", counted)
    taken = 0
    for _ in Snapshot.open(NAME, shared.url).rows():
        taken += 1
        assert sum(asked) - taken < 4 * reading.PAGE
    assert sum(asked) == taken == N


@pytest.mark.parametrize("slow", [0.0, 1e9])
def test_a_thread_reads_ahead_for_who_has_more_to_do_than_to_read(
    shared: Frozen, monkeypatch: pytest.MonkeyPatch, slow: float
) -> None:
    """Every caller counts as slow, or none does. The rows are the same, a lost server included."""
    monkeypatch.setattr(snapshot_reader, "SLOW", slow)
    readers = []
    page = reading.DatabaseSource._page

    def noted(source: object, wanted: range, connection: object) -> object:
        readers.append(threading.current_thread() is not threading.main_thread())
        return page(source, wanted, connection)  # type: ignore[arg-type]

    monkeypatch.setattr(reading.DatabaseSource, "_page", noted)
    rows = []
    for entry in Snapshot.open(NAME, shared.url).rows():
        rows.append(entry)
        if entry.position % 50 == 20:
            cut(shared.url)
    assert rows == shared.entries
    first, *others = readers
    assert not first, "there is nothing to do beside it yet"
    if slow:
        assert 0 < others.count(True) <= 2 * snapshot_reader.AHEAD, "before anybody knew, or again"
    else:
        assert all(others)


def test_an_abandoned_stream_leaves_no_thread(shared: Frozen) -> None:
    before = threading.active_count()
    stream = Snapshot.open(NAME, shared.url).rows()
    next(stream)
    assert threading.active_count() == before + 1
    del stream
    gc.collect()
    assert threading.active_count() == before


def _read(snapshot: Snapshot, rank: int) -> list[int]:
    return [entry.position for entry in snapshot.rows(rank, 2)]


def test_opened_here_and_read_in_forked_workers(shared: Frozen) -> None:
    """What a data loader with workers does, while the parent reads too."""
    snapshot = Snapshot.open(NAME, shared.url)
    stream = snapshot.rows()
    next(stream)
    with get_context("fork").Pool(2) as pool:
        read = pool.starmap(_read, [(snapshot, 0), (snapshot, 1)])
    assert read == [list(range(0, N, 2)), list(range(1, N, 2))]
    assert len(list(stream)) == N - 1


def test_what_is_no_snapshot_is_said_so(shared: Frozen, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no snapshot named 'frozn'\n.*newest snapshots: frozen"):
        Snapshot.open("frozn", shared.url)
    with pytest.raises(InputError, match="no exported snapshot"):
        Snapshot.open(tmp_path / "nowhere")
    with pytest.raises(DatabaseError, match="cannot be used"):
        Snapshot.open(NAME, "postgresql://nobody@127.0.0.1:1/none")
    snapshot = Snapshot.open(NAME, shared.url)
    for bad in (
        {"rank": 1},
        {"rank": -1},
        {"start": -1},
        {"world": 0},
        {"worker": 2, "workers": 2},
    ):
        with pytest.raises(ConfigError):
            snapshot.rows(**bad)
    with pytest.raises(ConfigError, match="one of trajectories"):
        snapshot.problems()
    assert list(snapshot.rows(start=N)) == []
    assert list(snapshot.rows(start=N + 1000)) == []


def test_entries_and_snapshots_travel(shared: Frozen) -> None:
    entry = shared.entries[0]
    assert pickle.loads(pickle.dumps(entry)) == entry != replace(entry, position=1)
    snapshot = pickle.loads(pickle.dumps(Snapshot.open(NAME, shared.url)))
    assert len(snapshot) == N
    assert "host=" not in repr(snapshot), "the address may hold a password"
