"""A run's funnel as a picture."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from shared.errors import ConfigError
from shared.optional import require
from shared.store import ItemState
from tirgen.stats import RunStats

GREY = "#9aa5b1"
CURATED = "#3b7dd8"
COLOURS = {
    ItemState.VETTED: "#2a9d5c",
    ItemState.REJECTED: "#e0a030",
    ItemState.FAILED: "#c8443c",
}
MAX_SUBJECTS = 20


def plot(stats: RunStats, path: Path) -> None:
    """Where the items went, over all and by subject. Raises ConfigError if `path` cannot be."""
    module = require("matplotlib.figure", need="--plot", install="tirgen[plot]")
    bars = _bars(stats)
    height = 1.6 + 0.32 * max(len(bars), min(len(stats.subjects), MAX_SUBJECTS) + 2)
    figure = module.Figure(figsize=(11, height), layout="constrained")
    funnel, subjects = figure.subplots(1, 2, width_ratios=(3, 2))
    names, counts, colours = zip(*bars, strict=True)
    drawn = funnel.barh([_plain(name) for name in names], counts, color=colours)
    total = max(stats.funnel.n_items, 1)
    labels = [f"{n} ({100 * n / total:.1f} %)" for n in counts]
    funnel.bar_label(drawn, labels, padding=3)
    funnel.set(xlim=(0, 1.25 * total), title="where the items went")
    _draw_subjects(stats, subjects)
    for axes in (funnel, subjects):
        axes.invert_yaxis()
        axes.set_xlabel("work items")
        axes.spines[["top", "right"]].set_visible(False)
        axes.xaxis.get_major_locator().set_params(integer=True)
    figure.suptitle(_plain(f"Run {stats.funnel.name} ({stats.funnel.state})"))
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        what = f"the plot cannot be written: {error}"
        remedy = "name a .png, .svg or .pdf file in a folder that you may write to"
        raise ConfigError(what, where=f"--plot {path}", remedy=remedy) from error


def _bars(stats: RunStats) -> list[tuple[str, int, str]]:
    run = stats.funnel
    rest = (ItemState.QUEUED, ItemState.LEASED, ItemState.CANCELLED)
    return [
        ("items", run.n_items, GREY),
        ("vetted", stats.n_vetted, COLOURS[ItemState.VETTED]),
        *((f"rejected: {k}", n, COLOURS[ItemState.REJECTED]) for k, n in run.rejected.items()),
        *((f"failed: {k}", n, COLOURS[ItemState.FAILED]) for k, n in run.failed.items()),
        *((state.value, run.items[state], GREY) for state in rest if run.items[state]),
        *_curated(stats),
    ]


def _curated(stats: RunStats) -> Iterator[tuple[str, int, str]]:
    """What each filter of the last chain left, in its order."""
    if stats.curation is None:
        return
    stages = stats.curation.stages
    yield f"candidates of {stats.curation.name}", stages[0][1], CURATED
    yield from ((f"after {name}", after, CURATED) for name, _, after in stages)


def _draw_subjects(stats: RunStats, axes: Any) -> None:
    found = list(stats.subjects.items())[:MAX_SUBJECTS]
    names = [_plain(subject or "(no subject)")[:30] for subject, _ in found]
    left = [0] * len(found)
    for state, colour in COLOURS.items():
        widths = [states[state] for _, states in found]
        axes.barh(names, widths, left=left, color=colour, label=state.value)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.set_title("by subject")
    axes.figure.legend(loc="outside lower right", ncols=3, frameon=False)


def _plain(text: str) -> str:
    """matplotlib would take what stands between dollars for mathematics."""
    return text.replace("$", r"\$")
