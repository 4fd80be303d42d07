"""Rows for the trainer: the snapshot's, in its order, whatever the number of ranks or restarts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from rl.config import DataConfig
from rl.data import Position, Prompts, SnapshotSource, Window
from rl.packing import TrainRow, train_row
from rl.render import Renderer
from rl.world import World
from shared.errors import ConfigError, InputError
from shared.segments import SAMPLED, Kind
from shared.store import Database, Snapshot
from shared.store.models import SnapshotKind
from tests import nano_frozen
from tirgen.stack import WEIGHTS

N = 60


@dataclass(frozen=True)
class Frozen:
    url: str
    renderer: Renderer

    def config(self, **fields: Any) -> DataConfig:
        return DataConfig(snapshot="sft", url=self.url, **fields)


@pytest.fixture(scope="module")
def frozen(new_database: Callable[[], AbstractContextManager[str]]) -> Iterator[Frozen]:
    with new_database() as url:
        db = Database(url)
        nano_frozen.freeze(db, "sft", N)
        nano_frozen.freeze(db, "problems", 20, kind=SnapshotKind.PROBLEMS)
        db.close()
        yield Frozen(url, Renderer(AutoTokenizer.from_pretrained(WEIGHTS), "compact"))


class Ranks:
    """Worlds whose ranks take turns in one thread: `gather` hands out what all have given."""

    def __init__(self, size: int) -> None:
        self.size = size

    def windows(self, make: Callable[[World], Iterator[Window]]) -> list[Window]:
        """All windows, which must be the same on every rank."""
        given: list[list[Any]] = []

        class Turn(World):
            def gather(self, value: Any) -> list[Any]:
                given.append([value])
                return [value]

        alone = [
            list(make(Turn(rank, self.size, rank, torch.device("cpu"))))
            for rank in range(self.size)
        ]
        return [
            Window(
                tuple(row for part in parts for row in part.rows),
                sum((part.left_out for part in parts[1:]), parts[0].left_out),
                parts[0].after,
            )
            for parts in zip(*alone, strict=True)
        ]


def windows(
    frozen: Frozen, size: int, world: int = 1, start: Position = Position(), **fields: Any
) -> list[Window]:
    def make(of: World) -> Iterator[Window]:
        source = SnapshotSource(frozen.config(**fields), frozen.renderer, of, observations=False)
        return source.windows(start, 2, size)

    return Ranks(world).windows(make)


def expected(frozen: Frozen) -> list[TrainRow]:
    """By the reader and the renderer alone."""
    entries = Snapshot.open("sft", frozen.url).rows()
    return [
        train_row(frozen.renderer.render(entry.problem.text, entry.trajectory)) for entry in entries
    ]


def test_windows_are_the_snapshots_rows_in_its_order(frozen: Frozen) -> None:
    made = windows(frozen, size=7)
    rows = [row for window in made for row in window.rows]
    assert rows == expected(frozen) * 2
    assert [len(window.rows) for window in made[:9]] == [7] * 8 + [4]
    assert made[8].after == Position(1, 0)


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_share_each_window(frozen: Frozen, world: int) -> None:
    """The same rows in every window, though each rank reads its own positions only."""
    alone, shared = windows(frozen, size=7), windows(frozen, size=7, world=world)
    assert [w.after for w in shared] == [w.after for w in alone]
    assert [sorted(w.rows, key=repr) for w in shared] == [sorted(w.rows, key=repr) for w in alone]


def test_any_position_is_gone_on_from(frozen: Frozen) -> None:
    whole = windows(frozen, size=7)
    for i, window in enumerate(whole[:-1]):
        rest = windows(frozen, size=7, start=window.after)
        assert [w.rows for w in rest] == [w.rows for w in whole[i + 1 :]]


def test_what_cannot_be_trained_on_is_counted_and_leaves_a_gap(frozen: Frozen) -> None:
    """Windows are of positions: a row that is left out moves no other row into its window."""
    lengths = sorted(len(row.ids) for row in expected(frozen))
    limit = lengths[len(lengths) // 2]
    made = windows(frozen, size=7, max_length=limit)[:9]
    for window, whole in zip(made, windows(frozen, size=7), strict=False):
        assert window.rows == tuple(row for row in whole.rows if len(row.ids) <= limit)
        assert sum(window.left_out.values()) == len(whole.rows) - len(window.rows)
    assert {reason for w in made for reason in w.left_out} == {
        f"longer than data.max_length = {limit}"
    }


def test_a_trajectory_of_the_other_mode_of_thinking_is_left_out(frozen: Frozen) -> None:
    renderer = Renderer(AutoTokenizer.from_pretrained(WEIGHTS), "compact", thinking=True)
    world = World(0, 1, 0, torch.device("cpu"))
    source = SnapshotSource(frozen.config(), renderer, world, observations=False)
    (window,) = islice(source.windows(Position(), 1, N), 1)
    assert not window.rows
    assert sum(window.left_out.values()) == N


def test_with_observations_they_carry_loss(frozen: Frozen) -> None:
    world = World(0, 1, 0, torch.device("cpu"))
    source = SnapshotSource(frozen.config(), frozen.renderer, world, observations=True)
    (window,) = islice(source.windows(Position(), 1, N), 1)
    entries = list(Snapshot.open("sft", frozen.url).rows())
    for row, entry in zip(window.rows, entries, strict=True):
        segments = frozen.renderer.render(entry.problem.text, entry.trajectory)
        learned = sum(len(s.ids) for s in segments if s.kind in SAMPLED | {Kind.OBSERVATION})
        assert row.n_loss == learned
        assert row.n_loss > train_row(segments).n_loss or not entry.trajectory.calls


def test_a_split_is_a_snapshot_of_its_own(frozen: Frozen) -> None:
    train = windows(frozen, size=100, split="train")[0]
    valid = windows(frozen, size=100, split="valid")[0]
    assert [*train.rows, *valid.rows] == expected(frozen)
    with pytest.raises(ConfigError, match="no split 'test'"):
        windows(frozen, size=7, split="test")


def test_prompts_are_each_problem_once_and_again(frozen: Frozen) -> None:
    prompts = Prompts(frozen.config(), "train")
    n = len(prompts)
    assert len({p.problem.key for p in prompts.take(0, n)}) == n
    assert [p.problem for p in prompts.take(n, n)] == [p.problem for p in prompts.take(0, n)]
    assert [p.number for p in prompts.take(n - 1, 2)] == [n - 1, n]
    of_problems = Prompts(DataConfig(snapshot="problems", url=frozen.url), None)
    assert len(of_problems) == 20


def test_a_snapshot_of_problems_is_not_for_sft(frozen: Frozen) -> None:
    world = World(0, 1, 0, torch.device("cpu"))
    with pytest.raises(ConfigError, match="holds problems"):
        SnapshotSource(
            DataConfig(snapshot="problems", url=frozen.url), frozen.renderer, world,
            observations=False,
        )  # fmt: skip
    with pytest.raises(InputError, match="no-such"):
        Prompts(DataConfig(snapshot="no-such", url=frozen.url), None)
