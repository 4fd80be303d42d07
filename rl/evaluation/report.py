"""The report of an evaluation: one HTML page that needs nothing else, and its plots as PNG files.

What a model wrote is shown as text: the template escapes everything, control characters are written
out, and the page's own policy forbids scripts and requests.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2

from rl.evaluation import analyses, plots
from rl.evaluation.attempts import Attempt, Tried
from rl.evaluation.figures import Figure, Settings, average, context, figures
from rl.evaluation.results import Results, trajectory_of
from shared.errors import InputError
from shared.segments import SAMPLED
from shared.store.database import Database
from shared.terminal import visible

EXAMPLES = 2  # of each kind of attempt
SHOWN = 20_000  # characters of one segment
MAIN = ("accuracy", "accuracy by judge", "pass@", "maj@", "best-of-")


@dataclass(frozen=True, slots=True)
class Section:
    """One benchmark's part of the page; plots by file name."""

    results: Results
    figures: list[Figure]
    context: list[tuple[str, str]]
    tool_success: analyses.ToolSuccess
    first_try: analyses.ToolSuccess
    funnel: analyses.Funnel
    examples: list[dict[str, Any]]
    plots: dict[str, bytes]
    agreement: tuple[int, int, int, int] | None  # rules and judge: both, rules, judge, neither


def write(
    db: Database, evaluation: str, results: Sequence[Results], to: Path, settings: Settings
) -> Path:
    """Write DIR/index.html and the plots beside it; returns the page.

    Raises InputError where it cannot be written, ConfigError without matplotlib.
    """
    sections = [_section(db, one, settings) for one in results]
    shown = [(s.results.config.benchmark.name, _main(s.figures)) for s in sections]
    common = {"accuracy.png": plots.accuracy(shown), "cost.png": plots.cost(results)}
    page = _template().render(
        evaluation=evaluation,
        made=datetime.now(UTC),
        sections=sections,
        average=average(results, settings) if len(results) > 1 else None,
        main=dict(shown),
        columns=list(dict.fromkeys(f.name for _, found in shown for f in found)),
        plots=common,
    )
    try:
        to.mkdir(parents=True, exist_ok=True)
        for name, png in common.items():
            (to / name).write_bytes(png)
        for section in sections:
            for name, png in section.plots.items():
                (to / name).write_bytes(png)
        path = to / "index.html"
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        what = f"the report cannot be written: {error.strerror or error}"
        raise InputError(
            what, where=str(to), remedy="name a folder that you may write to"
        ) from error
    return path


def _section(db: Database, results: Results, settings: Settings) -> Section:
    made = figures(results, settings)
    found = analyses.correction_funnel(results.attempts)
    name = results.config.benchmark.name
    return Section(
        results=results,
        figures=made,
        context=context(results, settings),
        tool_success=analyses.tool_success(results.attempts),
        first_try=analyses.tool_success(results.attempts, first_try=True),
        funnel=found,
        examples=[_example(db, why, one) for why, one in _chosen(results)],
        plots={f"funnel-{name}.png": plots.funnel(found)} if found.n_actions else {},
        agreement=_agreement(results.attempts),
    )


def _main(found: Sequence[Figure]) -> list[Figure]:
    """Accuracy, and of every k-figure the largest k."""
    chosen: dict[str, Figure] = {}
    for figure in found:
        for prefix in MAIN:
            if figure.name == prefix or (prefix[-1] in "@-" and figure.name.startswith(prefix)):
                chosen[prefix] = figure
    return list(chosen.values())


def _agreement(attempts: Sequence[Attempt]) -> tuple[int, int, int, int] | None:
    judged = [one for one in attempts if one.judged is not None]
    if not judged:
        return None
    cells = [(one.right is True, one.judged) for one in judged]
    order = ((True, True), (True, False), (False, True), (False, False))
    both, rules, judge, neither = (cells.count(cell) for cell in order)
    return both, rules, judge, neither


# ---- attempts that are shown ----------------------------------------------------------------


def _chosen(results: Results) -> Iterator[tuple[str, Attempt]]:
    """A few attempts of every kind that there is, the first ones, each at most once."""
    kinds: tuple[tuple[str, Callable[[Attempt], bool]], ...] = (
        ("corrected, and right", lambda a: _corrected(a) and a.right is True),
        ("corrected, and not right", lambda a: _corrected(a) and not a.right),
        ("tried again in vain", lambda a: any(_in_vain(call) for call in a.calls)),
        ("a failed call that stands", lambda a: any(c.stands and not c.ok for c in a.calls)),
        ("rules and judge differ",
         lambda a: a.judged is not None and a.judged != (a.right is True)),
        ("undecided", lambda a: a.right is None),
        ("right without correction", lambda a: a.right is True and not a.n_retries),
        ("not right", lambda a: not a.right),
    )  # fmt: skip
    seen: set[int | None] = set()
    for why, holds in kinds:
        fitting = (a for a in results.attempts if a.trajectory_id not in seen and holds(a))
        for one in [one for one, _ in zip(fitting, range(EXAMPLES), strict=False)]:
            seen.add(one.trajectory_id)
            yield why, one


def _corrected(one: Attempt) -> bool:
    return any(call.corrected_at is not None for call in one.calls)


def _in_vain(call: Tried) -> bool:
    return len(call.outcomes) > 1 and not call.ok


def _example(db: Database, why: str, one: Attempt) -> dict[str, Any]:
    """What the page shows of an attempt: its segments with their masks, before and after."""
    assert one.trajectory_id is not None
    trajectory, verdicts = trajectory_of(db, one.trajectory_id)
    meta = trajectory.meta
    segments = [_segment(segment) for segment in meta.get("segments", ())]
    outcomes = iter(step.call.result.outcome for step in trajectory.steps if step.call)
    for segment in segments:
        if segment["kind"] == "code":
            segment["outcome"] = next(outcomes, None)
    return {
        "why": why,
        "id": one.trajectory_id,
        "attempt": one,
        "end": trajectory.end,
        "parts": list(_in_order(segments, meta.get("discarded", ()))),
        "n_loss": sum(s["n"] for s in segments if s["loss"]),
        "n_all": sum(s["n"] for s in segments),
        "verdicts": verdicts,
    }


def _in_order(
    segments: Sequence[dict[str, Any]], discarded: Sequence[dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    """Segments, and before those of a step the tries of it that were taken back.

    A step ends with its observation, if it has one.
    """
    step = 0
    for number, segment in enumerate(segments):
        if number == 1 or (number and segments[number - 1]["kind"] == "observation"):
            for gone in discarded:
                if gone["step"] == step:
                    yield {**gone, "segments": [_segment(s) for s in gone["segments"]]}
            step += 1
        yield {"step": None, "segment": segment}


def _segment(segment: dict[str, Any]) -> dict[str, Any]:
    return {**segment, "loss": segment["kind"] in SAMPLED, "outcome": None}


# ---- the template ---------------------------------------------------------------------------


def _template() -> jinja2.Template:
    env = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    env.filters |= {"figure": figure_text, "span": interval_text, "number": number_text,
                    "shown": _shown, "data": _data, "p": p_text}  # fmt: skip
    source = files(__package__).joinpath("report.html.j2").read_text(encoding="utf-8")
    return env.from_string(source)


def figure_text(figure: Figure) -> str:
    """71.5 %, or 213.4."""
    return number_text(figure.value, figure.unit)


def interval_text(figure: Figure) -> str:
    """68.0 to 75.1, in the unit of the figure; "" without one."""
    low, high = figure.interval.low, figure.interval.high
    if low is None or high is None:
        return ""
    scale = 100 if figure.unit == "share" else 1
    return f"{_digits(scale * low)} to {_digits(scale * high)}"


def number_text(value: float | None, unit: str = "") -> str:
    if value is None:
        return "-"
    return f"{_digits(100 * value)} %" if unit == "share" else _digits(value)


def _digits(value: float) -> str:
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def p_text(p: float | None) -> str:
    if p is None:
        return "-"
    return f"{p:.1e}" if 0 < p < 1e-3 else f"{p:.3f}"


def _shown(text: Any) -> str:
    """A model's text: control characters written out, cut where it is very long."""
    said = visible(str(text))
    return said if len(said) <= SHOWN else said[:SHOWN] + f"… ({len(said) - SHOWN} more)"


def _data(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()
