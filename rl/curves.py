"""A job's metrics as curves: a line of blocks each in the terminal, or one picture of them all."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

from shared.errors import ConfigError
from shared.optional import require

BLOCKS = "▁▂▃▄▅▆▇█"
GAP = " "
BLUE = "#3b7dd8"
COLUMNS = 3  # of the picture
# What one looks at first, with or without "heldout/" before it; a picture of all 70 is none.
HEADLINES = (
    "reward/episode", "reward/step", "calls/first_try", "loss", "nll", "entropy", "grad_norm", "lr",
    "kl/k3", "ratio/clipped", "mismatch/abs", "length/response", "rows", "staleness", "time/round",
    "time/step", "speed/effective_tokens", "speed/loss_tokens", "speed/mfu",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Curve:
    """One metric at the steps that have it; a value may be NaN or infinite."""

    name: str
    steps: tuple[int, ...]
    values: tuple[float, ...]

    @property
    def finite(self) -> list[float]:
        return [value for value in self.values if math.isfinite(value)]


def curves(logged: Iterable[tuple[int, Mapping[str, Any]]]) -> list[Curve]:
    """By name; values that JSON has no number for come as texts ("NaN")."""
    steps: dict[str, list[int]] = {}
    values: dict[str, list[float]] = {}
    for step, measured in logged:
        for name, value in measured.items():
            steps.setdefault(name, []).append(step)
            values.setdefault(name, []).append(float(value))
    return [Curve(name, tuple(steps[name]), tuple(values[name])) for name in sorted(steps)]


def sparkline(values: Sequence[float], width: int) -> str:
    """`values` over at most `width` characters, from the lowest to the highest of what is shown.

    Where there are more values than characters, each shows the mean of its share of them. What is
    not finite leaves a gap.
    """
    shown = binned(values, width)
    finite = [value for value in shown if value is not None]
    if not finite:
        return GAP * len(shown)
    low, high = min(finite), max(finite)
    return "".join(GAP if v is None else BLOCKS[_level(v, low, high, len(BLOCKS))] for v in shown)


def plot_lines(values: Sequence[float], width: int, height: int) -> list[str]:
    """The same over `height` lines, the highest first."""
    shown = binned(values, width)
    finite = [value for value in shown if value is not None]
    if not finite:
        return [GAP * len(shown)] * height
    low, high = min(finite), max(finite)
    eighths = [
        None if v is None else 1 + _level(v, low, high, 8 * height) for v in shown
    ]  # filled, of 8 per line
    return ["".join(_filled(full, line) for full in eighths) for line in reversed(range(height))]


def binned(values: Sequence[float], width: int) -> list[float | None]:
    """At most `width` means of neighbours; None where none of them is finite."""
    n = min(width, len(values))
    found: list[float | None] = []
    for i in range(n):
        share = values[i * len(values) // n : (i + 1) * len(values) // n]
        finite = [value for value in share if math.isfinite(value)]
        found.append(sum(finite) / len(finite) if finite else None)
    return found


def headlines(curves: Sequence[Curve]) -> list[Curve]:
    """The curves of HEADLINES, in their order; all curves where there is none of them."""
    place = {name: n for n, name in enumerate(HEADLINES)}
    found = [c for c in curves if c.name.removeprefix("heldout/") in place]
    found.sort(key=lambda c: (place[c.name.removeprefix("heldout/")], c.name))
    return found or list(curves)


def picture(curves: Sequence[Curve], title: str, path: Path) -> None:
    """The headlines among the curves, one axes each.

    Raises ConfigError if `path` cannot be written, or if there is nothing to draw.
    """
    if not curves:
        raise ConfigError("the job has no metrics yet", where=f"--plot {path}")
    curves = headlines(curves)
    module = require("matplotlib.figure", need="--plot", install="tirgen[plot]")
    rows = ceil(len(curves) / COLUMNS)
    figure = module.Figure(figsize=(4.2 * COLUMNS, 2.4 * rows + 0.6), layout="constrained")
    grid = figure.subplots(rows, COLUMNS, squeeze=False)
    for axes, curve in zip(grid.flat, curves, strict=False):
        axes.plot(curve.steps, curve.values, color=BLUE, linewidth=1.2)
        axes.set_title(_plain(curve.name), fontsize=10, loc="left")
        axes.spines[["top", "right"]].set_visible(False)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.tick_params(labelsize=8)
    for axes in list(grid.flat)[len(curves) :]:
        axes.set_visible(False)
    figure.suptitle(_plain(title))
    figure.supxlabel("step", fontsize=9)
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        what = f"the plot cannot be written: {error}"
        remedy = "name a .png, .svg or .pdf file in a folder that you may write to"
        raise ConfigError(what, where=f"--plot {path}", remedy=remedy) from error


def _level(value: float, low: float, high: float, levels: int) -> int:
    if high == low:
        return levels // 2
    return min(levels - 1, int((value - low) / (high - low) * levels))


def _filled(full: int | None, line: int) -> str:
    if full is None or full <= 8 * line:
        return GAP
    return BLOCKS[min(8, full - 8 * line) - 1]


def _plain(text: str) -> str:
    """matplotlib would take what stands between dollars for mathematics."""
    return text.replace("$", r"\$")
