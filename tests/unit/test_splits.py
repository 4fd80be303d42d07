"""A problem is in one split only, and which one depends on the seed and on nothing else."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest

from shared.errors import ConfigError
from shared.store.snapshot_rows import Shard
from tirgen.curation import splits

SHARES = {"train": 0.8, "valid": 0.15, "test": 0.05}
KEYS = [f"{i:064x}" for i in range(20_000)]


def test_shares_come_out_as_asked() -> None:
    """Within five standard deviations of a binomial: a fixed seed, hence no luck involved."""
    found = Counter(splits.index(key, 1, SHARES) for key in KEYS)
    for i, share in enumerate(SHARES.values()):
        deviation = (len(KEYS) * share * (1 - share)) ** 0.5
        assert abs(found[i] - len(KEYS) * share) < 5 * deviation


def test_another_seed_draws_anew() -> None:
    one, two = ([splits.index(key, seed, SHARES) for key in KEYS] for seed in (1, 2))
    assert one != two
    assert one == [splits.index(key, 1, SHARES) for key in KEYS]


def test_order_is_a_shuffle_that_ignores_where_rows_come_from() -> None:
    order = sorted(KEYS, key=lambda key: splits.place(key, 1))
    assert order not in (KEYS, sorted(KEYS, key=lambda key: splits.place(key, 2)))
    backwards = KEYS[::-1]
    assert order == sorted(backwards, key=lambda key: splits.place(key, 1))
    half = set(KEYS[::2])
    assert sorted(half, key=lambda key: splits.place(key, 1)) == [k for k in order if k in half]


def test_rounding_leaves_nobody_without_a_split() -> None:
    shares = {f"s{i}": 0.1 for i in range(10)}
    assert [*itertools.accumulate(shares.values())][-1] < 1, "control: one after the other"
    assert {splits.index(key, 0, shares) for key in KEYS} == set(range(10))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("train", "no split"), ("train=a", "no split"), ("train=0.5,train=0.5", "no split"),
        ("train=nan", "no split"), ("train=0.9", "sum to 0.9"), ("train=1.5,valid=-0.5", "share"),
        ("../x=1", "name"), ("Train=1", "name"), ("", "no split"), ("train=0,valid=1", "share"),
    ],
)  # fmt: skip
def test_bad_splits_are_refused(text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        splits.parse(text)


def test_splits_are_read_in_their_order() -> None:
    assert list(splits.parse("valid=0.25, train=0.75")) == ["valid", "train"]


@pytest.mark.parametrize("of", [1, 2, 3, 8])
@pytest.mark.parametrize(("start", "stop"), [(0, 100), (17, 100), (99, 100), (50, 50), (0, 1)])
def test_shards_share_positions_exactly(of: int, start: int, stop: int) -> None:
    shares = [list(Shard(index, of, start, stop).positions()) for index in range(of)]
    assert sorted(p for share in shares for p in share) == list(range(start, stop))
    assert all(p % of == index for index, share in enumerate(shares) for p in share)
