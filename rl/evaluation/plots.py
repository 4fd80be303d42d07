"""The plots of a report, as PNG."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from rl.evaluation.analyses import Ended, Funnel, cost_accuracy
from rl.evaluation.figures import Figure
from rl.evaluation.results import Results
from shared.optional import require

GREY, RIGHT, WRONG = "#c3cad2", "#2a9d5c", "#c8443c"
COLOURS = ("#3b7dd8", "#2a9d5c", "#e0a030", "#8a5cc9", "#c8443c", "#3aa6a6", "#7a6a58")
DPI = 110


def accuracy(rows: Sequence[tuple[str, Sequence[Figure]]]) -> bytes:
    """Bars per benchmark, each with its interval. `rows`: (benchmark, figures of interest)."""
    names = list(dict.fromkeys(f.name for _, figures in rows for f in figures))
    figure = _figure(max(6.0, 1.8 + 0.5 * len(names) * len(rows)), 3.6)
    axes = figure.subplots()
    width = 0.8 / max(1, len(names))
    for number, name in enumerate(names):
        for place, (_, figures) in enumerate(rows):
            found = next((f for f in figures if f.name == name and f.value is not None), None)
            if found is None or found.value is None:
                continue
            x, value = place + (number - (len(names) - 1) / 2) * width, 100 * found.value
            low, high = found.interval.low, found.interval.high
            whiskers = None
            if low is not None and high is not None:
                whiskers = [[max(0, value - 100 * low)], [max(0, 100 * high - value)]]
            axes.bar(
                x, value, 0.9 * width, color=COLOURS[number % len(COLOURS)], yerr=whiskers,
                error_kw={"elinewidth": 1, "capsize": 2, "ecolor": "#333"},
                label=name if place == 0 else None,
            )  # fmt: skip
            top = 100 * high if high is not None else value
            axes.text(x, top + 1.5, f"{value:.1f}", ha="center", va="bottom", fontsize=7)
    axes.set_xticks(range(len(rows)), [_plain(name) for name, _ in rows])
    axes.set(ylim=(0, 112), ylabel="%")
    axes.set_yticks(range(0, 101, 20))
    figure.legend(loc="outside upper right", ncols=min(5, len(names)), frameon=False, fontsize=8)
    return _png(figure, axes)


def funnel(found: Funnel) -> bytes:
    """Where actions went whose first try failed; the part whose trajectory is right is green."""
    ends: list[tuple[str, Ended]] = [("first try succeeded", found.first_ok)]
    ends.append(("first try failed", found.failed))
    ends += [(f"corrected at try {at}", ended) for at, ended in found.corrected.items()]
    rest = {
        "never corrected": found.never,
        "abandoned": found.abandoned,
        "not tried": found.untried,
    }
    ends += [(name, ended) for name, ended in rest.items() if ended.n]
    figure = _figure(7.5, 0.9 + 0.34 * len(ends))
    axes = figure.subplots()
    names = [name for name, _ in ends]
    right = [ended.n_right for _, ended in ends]
    wrong = [ended.n - ended.n_right for _, ended in ends]
    axes.barh(names, right, color=RIGHT, label="its answer is right")
    drawn = axes.barh(names, wrong, left=right, color=GREY, label="its answer is not")
    total = max(1, found.n_actions)
    labels = [f"{e.n} ({100 * e.n / total:.1f} %)" for _, e in ends]
    axes.bar_label(drawn, labels, padding=3, fontsize=8)
    axes.invert_yaxis()
    axes.set(xlim=(0, 1.28 * max(e.n for _, e in ends) or 1), xlabel="actions")
    figure.legend(loc="outside upper right", ncols=2, frameon=False, fontsize=8)
    return _png(figure, axes)


def cost(results: Sequence[Results]) -> bytes:
    """Accuracy against a budget of sampled tokens, a line per run."""
    figure = _figure(6.4, 3.6)
    axes = figure.subplots()
    for number, one in enumerate(results):
        points = cost_accuracy(one.attempts)
        tokens = [point.tokens for point in points]
        shares = [100 * point.accuracy for point in points]
        colour = COLOURS[number % len(COLOURS)]
        axes.step(tokens, shares, where="post", color=colour, label=_plain(one.run))
        if points:
            axes.plot(tokens[-1], shares[-1], "o", color=colour, markersize=4)
    axes.set(xlabel="sampled tokens an attempt may use, retries counted", ylabel="accuracy, %")
    axes.set_ylim(bottom=0, top=105)
    axes.set_xlim(left=0)
    axes.legend(frameon=False, fontsize=8, loc="lower right")
    return _png(figure, axes)


def sweep(points: Sequence[tuple[str, Figure, Figure]]) -> bytes:
    """Accuracy against sampled tokens, a point per evaluation: (label, accuracy, tokens)."""
    figure = _figure(6.4, 3.8)
    axes = figure.subplots()
    for number, (label, right, tokens) in enumerate(points):
        a, t = right.interval, tokens.interval
        if a.value is None or t.value is None:
            continue
        vertical = None
        if a.low is not None and a.high is not None:
            vertical = [[100 * (a.value - a.low)], [100 * (a.high - a.value)]]
        axes.errorbar(
            t.value, 100 * a.value, yerr=vertical, fmt="o", capsize=2, markersize=5,
            color=COLOURS[number % len(COLOURS)], label=_plain(label),
        )  # fmt: skip
    axes.set(xlabel="sampled tokens an attempt, retries counted", ylabel="accuracy, %")
    axes.legend(frameon=False, fontsize=8)
    return _png(figure, axes)


def _figure(width: float, height: float) -> Any:
    module = require("matplotlib.figure", need="the report", install="tirgen[plot]")
    return module.Figure(figsize=(width, height), layout="constrained")


def _png(figure: Any, axes: Any) -> bytes:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=DPI)
    return out.getvalue()


def _plain(text: str) -> str:
    """matplotlib would take what stands between dollars for mathematics."""
    return text.replace("$", r"\$")
