"""Where a row of a snapshot goes: its split and its place, by seed and content alone.

Neither depends on ids or on what else is selected. The same problem falls into the same split of
every snapshot with the same seed and shares, so that no later training set takes in what an earlier
one held out; and the same selection gives the same digest in any database.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping

from shared.errors import ConfigError

WHOLE = {"train": 1.0}  # where no splits are asked for: the name that datasets' users expect

_NAME = re.compile(r"[a-z][a-z0-9_]{0,29}")
_HELP = "write --split train=0.95,valid=0.05"


def parse(text: str) -> dict[str, float]:
    """Shares by name from "train=0.95,valid=0.05". Raises ConfigError as `checked` does."""
    shares: dict[str, float] = {}
    for part in text.split(","):
        name, equals, number = part.strip().partition("=")
        try:
            share = float(number)
        except ValueError:
            share = math.nan
        if not equals or math.isnan(share) or name in shares:
            raise ConfigError(f"{part.strip()!r} is no split", where="--split", remedy=_HELP)
        shares[name] = share
    return checked(shares)


def checked(shares: Mapping[str, float]) -> dict[str, float]:
    """Raises ConfigError unless the names are plain and the shares positive, with sum 1."""
    for name, share in shares.items():
        if not _NAME.fullmatch(name):
            raise ConfigError(f"{name!r} cannot be the name of a split", where="--split",
                              remedy="use lower-case letters, digits and '_'")  # fmt: skip
        if not 0 < share <= 1:
            raise ConfigError(f"split {name} has the share {share}", where="--split",
                              remedy="a share is above 0 and at most 1")  # fmt: skip
    if not math.isclose(sum(shares.values()), 1, abs_tol=1e-9):
        total = f"{sum(shares.values()):.6g}"
        raise ConfigError(f"the shares sum to {total}, not to 1", where="--split", remedy=_HELP)
    return dict(shares)


def index(problem_key: str, seed: int, shares: Mapping[str, float]) -> int:
    """Which of `shares` the problem falls into, counted from 0."""
    drawn = _number(f"{seed}/split/{problem_key}") / 2**64
    reached = 0.0
    for i, share in enumerate(shares.values()):
        reached += share
        if drawn < reached:
            return i
    return len(shares) - 1  # where rounding left the sum just below 1


def place(content: str, seed: int) -> int:
    """Sorting by it shuffles. `content`: a hash that names the row's content."""
    return _number(f"{seed}/place/{content}")


def _number(text: str) -> int:
    """Uniform below 2^64."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
