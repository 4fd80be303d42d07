"""Evaluations on a terminal, as tables or JSON: no figure without what it rests on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import typer
from rich.text import Text

from rl.evaluation import analyses, plots
from rl.evaluation.benchmarks import REGISTRY
from rl.evaluation.config import differences
from rl.evaluation.figures import Figure, Pairing, Settings, average, context, figures, pair
from rl.evaluation.plan import Planned
from rl.evaluation.report import figure_text, interval_text, number_text, p_text
from rl.evaluation.results import Results
from shared.errors import InputError
from shared.terminal import Format, console, json_text, table, visible

Made = Sequence[tuple[str, list[Results]]]


def dry_run(plans: Sequence[Planned], format: Format) -> None:
    if format is Format.JSON:
        typer.echo(json_text([one.config.model_dump(mode="json") for one in plans], indent=2))
        return
    for one in plans:
        typer.echo(one.config.model_dump_json(indent=2))
    rows = [
        (
            one.evaluation, one.config.benchmark.name, len(one.problems), one.config.samples,
            len(one.problems) * one.config.samples,
            f"{len(one.problems) * one.config.samples * one.config.budgets.tokens:,}",
            ", ".join(f"{n} {why}" for why, n in one.left_out.items()) or "-",
            one.config.fingerprint,
        )
        for one in plans
    ]  # fmt: skip
    names = ("evaluation", "benchmark", "questions", "k", "attempts", "tokens at most", "left out",
             "fingerprint")  # fmt: skip
    console.print(table(names, rows))


def evaluations(made: Made, how: Settings, format: Format) -> None:
    """Every figure of every benchmark, each block under what it was measured with."""
    if format is Format.JSON:
        typer.echo(json_text([_json(name, each, how) for name, each in made], indent=2))
        return
    for name, each in made:
        for one in each:
            console.print(_context(one, how))
            rows = [
                (f.name, _right(figure_text(f)), _right(interval_text(f)), f.interval.n)
                for f in figures(one, how)
            ]
            level = f"{100 * how.level:g} % interval"
            console.print(table(("figure", "value", level, "questions"), rows, one.run))
            console.print()
        if len(each) > 1:
            found = average(each, how)
            console.print(
                f"{name}: {found.name} {figure_text(found)} ({interval_text(found)}), "
                f"{found.about}, each counting alike",
                highlight=False, markup=False,
            )  # fmt: skip


def comparison(a: list[Results], b: list[Results], how: Settings, format: Format) -> None:
    """B against A, for every benchmark that both have. Raises InputError where there is none."""
    of_a = {one.config.benchmark.name: one for one in a}
    pairs = [
        pair(of_a[name], one, differences(of_a[name].config, one.config), how)
        for one in b
        if (name := one.config.benchmark.name) in of_a
    ]
    if not pairs or not any(one.n_common for one in pairs):
        raise InputError(
            "the two evaluations have no question in common",
            remedy="evaluate both on the same benchmark",
        )
    if format is Format.JSON:
        typer.echo(json_text([_pair_json(one) for one in pairs], indent=2))
        return
    for one in pairs:
        console.print(_context(one.b, how))
        listed = "\n".join(f"  {line}" for line in one.differences) or "  nothing"
        console.print(f"A is {one.a.run}, B is {one.b.run}; they differ in (A, B):", style="bold",
                      highlight=False, markup=False)  # fmt: skip
        console.print(visible(listed), highlight=False, markup=False)
        if one.unmatched:
            console.print(f"{one.unmatched} questions that only one has are left out", style="dim")
        names = ("figure", "A", "B", "B - A", f"{100 * how.level:g} % interval", "p", "differ")
        console.print(table(names, [_pair_row(c.unit, c.name, c.comparison) for c in one.figures]))
        console.print("p: sides swapped question by question; not corrected for looking at several "
                      "figures. differ: questions on which A and B do, of those that both have",
                      style="dim")  # fmt: skip


def tool_success(made: Made, format: Format) -> None:
    found = [
        (one, kind, analyses.tool_success(one.attempts, first_try=first))
        for _, each in made
        for one in each
        for kind, first in (("calls that stand", False), ("first tries", True))
        if not first or one.config.correction.strategy != "none"
    ]
    if format is Format.JSON:
        told = [{"run": one.run, "calls": kind, **asdict(said)} for one, kind, said in found]
        typer.echo(json_text(told, indent=2))
        return
    for one, kind, said in found:
        t, q = said.table, said.by_question
        rows = [
            ("answer right", t.ok_right, t.failed_right),
            ("answer not right", t.ok_wrong, t.failed_wrong),
            ("share right", _share(said.pooled.p_right_ok), _share(said.pooled.p_right_failed)),
        ]
        title = f"{one.run}: {kind} ({said.n_without_calls} trajectories without calls left out)"
        console.print(table(("", "every call ok", "a call failed"), rows, title))
        console.print(f"pooled: {_association(said.pooled)}", highlight=False)
        console.print(f"within questions: {_stratified(q)}\n", highlight=False)


def correction(made: Made, format: Format) -> None:
    found = [(one, analyses.correction_funnel(one.attempts)) for _, each in made for one in each]
    if format is Format.JSON:
        typer.echo(json_text([{"run": r.run, **asdict(f)} for r, f in found], indent=2))
        return
    for one, f in found:
        ends = {
            "first try succeeded": f.first_ok,
            "first try failed": f.failed,
            **{f"  corrected at try {at}": ended for at, ended in f.corrected.items()},
            "  never corrected": f.never,
            "  abandoned: no action any more": f.abandoned,
            "  not tried again": f.untried,
        }
        rows = [
            (name, ended.n, _right(number_text(_of(ended.n, f.n_actions), "share")),
             ended.n_right, _right(number_text(_of(ended.n_right, ended.n), "share")))
            for name, ended in ends.items()
        ]  # fmt: skip
        names = ("actions", "n", "of all", "answer right", "of these")
        strategy = one.config.correction
        title = f"{one.run}: {f.n_actions} actions, {strategy.strategy}, N_corr {strategy.n_corr}"
        console.print(table(names, rows, title))
        console.print()


def sweep(made: Made, how: Settings, plot: Path | None, format: Format) -> None:
    found = [(one, {f.name: f for f in figures(one, how)}) for _, each in made for one in each]
    if format is Format.JSON:
        rows = [
            {"run": one.run, "correction": asdict(one.config.correction), "seed": one.config.seed,
             "figures": [_figure_json(f) for f in by_name.values()]}
            for one, by_name in found
        ]  # fmt: skip
        typer.echo(json_text(rows, indent=2))
    else:
        wanted = ("accuracy", "first-try call pass rate", "call pass rate", "retries",
                  "sampled tokens")  # fmt: skip
        listed = []
        for one, by_name in found:
            c = one.config.correction
            cells = [Text(f"{figure_text(by_name[w])} ({interval_text(by_name[w])})",
                          justify="right") for w in wanted]  # fmt: skip
            cut = c.l_suf if c.strategy == "suffix" else None
            tries = c.n_corr if c.strategy != "none" else None
            listed.append((one.run, c.strategy, tries, cut, *cells))
        console.print(table(("run", "strategy", "N_corr", "L_suf", *wanted), listed))
    if plot is not None:
        points = [(one.run, f["accuracy"], f["sampled tokens"]) for one, f in found]
        try:
            plot.write_bytes(plots.sweep(points))
        except OSError as error:
            what = f"the plot cannot be written: {error.strerror or error}"
            raise InputError(what, where=f"--plot {plot}") from error


def registry(format: Format) -> None:
    rows = [(b.name, b.title, b.kind, b.source, ", ".join(b.files)) for b in REGISTRY.values()]
    names = ("name", "benchmark", "kind", "from", "or, in --data, a file of")
    if format is Format.JSON:
        typer.echo(json_text([dict(zip(names, row, strict=True)) for row in rows], indent=2))
    else:
        console.print(table(names, rows))


# ---- pieces ---------------------------------------------------------------------------------


def _context(one: Results, how: Settings) -> Any:
    rows = [(Text(name, style="dim"), Text(visible(value))) for name, value in context(one, how)]
    return table(("", ""), rows, one.config.benchmark.title or one.config.benchmark.name)


def _json(name: str, each: list[Results], how: Settings) -> dict[str, Any]:
    return {
        "evaluation": name,
        "runs": [
            {
                "run": one.run,
                "context": dict(context(one, how)),
                "config": one.config.model_dump(mode="json"),
                "fingerprint": one.config.fingerprint,
                "n_questions": len(one.questions),
                "n_attempts": len(one.attempts),
                "failures": dict(one.failures),
                "seconds": one.seconds,
                "figures": [_figure_json(f) for f in figures(one, how)],
            }
            for one in each
        ],
        "average": _figure_json(average(each, how)) if len(each) > 1 else None,
    }


def _figure_json(figure: Figure) -> dict[str, Any]:
    return {"name": figure.name, "unit": figure.unit, "about": figure.about,
            **asdict(figure.interval)}  # fmt: skip


def _pair_json(one: Pairing) -> dict[str, Any]:
    return {
        "a": one.a.run,
        "b": one.b.run,
        "differences": list(one.differences),
        "n_common": one.n_common,
        "unmatched": one.unmatched,
        "figures": [{"name": c.name, "unit": c.unit, **asdict(c.comparison)} for c in one.figures],
    }


def _pair_row(unit: str, name: str, c: Any) -> tuple[Any, ...]:
    scale = 100 if unit == "share" else 1
    signed = "-" if c.difference is None else f"{scale * c.difference:+.2f}"
    between = "" if c.low is None else f"{scale * c.low:+.2f} to {scale * c.high:+.2f}"
    return (name, _right(number_text(c.a, unit)), _right(number_text(c.b, unit)), _right(signed),
            _right(between), _right(p_text(c.p)), _right(f"{c.n_different}/{c.n}"))  # fmt: skip


def _association(a: analyses.Association) -> str:
    if a.chi2 is None or a.phi is None or a.odds_ratio is None:
        return "no association can be computed: a margin is empty"
    return f"chi2 {a.chi2:.1f}, p {p_text(a.p)}, phi {a.phi:.2f}, odds ratio {a.odds_ratio:.2f}"


def _stratified(q: analyses.Stratified) -> str:
    if q.chi2 is None or q.odds_ratio is None:
        return "no question has both kinds of trajectories and both kinds of answers"
    between = f" (95 %: {q.low:.2f} to {q.high:.2f})" if q.low is not None else ""
    return (f"chi2 {q.chi2:.2f}, p {p_text(q.p)}, odds ratio {q.odds_ratio:.2f}{between}; "
            f"{q.n_informative} of {q.n_questions} questions have a say")  # fmt: skip


def _share(found: tuple[float, float, float] | None) -> Text:
    if found is None:
        return _right("-")
    value, low, high = (100 * x for x in found)
    return _right(f"{value:.1f} % ({low:.1f} to {high:.1f})")


def _of(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def _right(text: str) -> Text:
    return Text(text, justify="right")
