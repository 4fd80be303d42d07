"""eval, compare, analyze: what a policy can do, and how sure that is."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from rl.cli.common import open_database
from shared.errors import ConfigError
from shared.terminal import Format, console, errors

if TYPE_CHECKING:
    from rl.evaluation.figures import Settings
    from rl.evaluation.plan import Planned
    from rl.evaluation.results import Results
    from shared.store import Database
    from shared.store.queries import Funnel

app = typer.Typer(no_args_is_help=True, help="What stored evaluations say beyond their figures.")

COLUMNS = (
    SpinnerColumn(), TextColumn("{task.description}"), BarColumn(bar_width=24),
    MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
    TextColumn("{task.fields[facts]}"),
)  # fmt: skip

Seed = Annotated[int, typer.Option(help="Of the bootstrap; not of the attempts.")]
NoCode = Annotated[
    str,
    typer.Option(
        help="best-of-N: what an attempt without code is worth, a pass rate or below-all-pass."
    ),
]
OutFormat = Annotated[Format, typer.Option("--format", help="table or json.")]
Report = Annotated[Path | None, typer.Option(help="Write an HTML report into this folder.")]
Evaluations = Annotated[list[str], typer.Argument(help="Names of evaluations, or of their runs.")]


def evaluate(
    model: Annotated[
        str | None, typer.Option(help="A Hugging Face folder, a name on the Hub, or `nano`.")
    ] = None,
    base_url: Annotated[
        str | None, typer.Option(help="Instead: an OpenAI-compatible server, ending in /v1.")
    ] = None,
    served_model: Annotated[str | None, typer.Option(help="The model's name there.")] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="The server's tokenizer: a folder, a name, or `nano`.")
    ] = None,
    text: Annotated[
        bool, typer.Option("--text", help="The server takes texts, no token ids.")
    ] = False,
    benchmark: Annotated[
        list[str] | None,
        typer.Option(help="NAME, NAME=FILE or FILE, with @K for K samples; may be repeated."),
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="A folder that holds benchmarks' files.")
    ] = None,
    map: Annotated[
        list[str] | None, typer.Option("--map", help="Columns: problem=question,answer=final.")
    ] = None,
    run: Annotated[str | None, typer.Option(help="Name of the evaluation.")] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="k: attempts per question.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first N questions.")] = None,
    strategy: Annotated[
        str | None, typer.Option(help="Self-correction: none, action, suffix or replan.")
    ] = None,
    n_corr: Annotated[int | None, typer.Option(min=0, help="N_corr: tries per step.")] = None,
    l_suf: Annotated[int | None, typer.Option(min=0, help="L_suf: tokens taken back.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the attempts.")] = None,
    prompts: Annotated[str | None, typer.Option(help="As in training: full or compact.")] = None,
    thinking: Annotated[bool, typer.Option("--thinking", help="A thinking policy.")] = False,
    judge_url: Annotated[
        str | None, typer.Option(help="A server whose model judges answers too, beside the rules.")
    ] = None,
    judge_model: Annotated[str | None, typer.Option(help="Its name there.")] = None,
    config: Annotated[Path | None, typer.Option(help="TOML with more settings.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="key=value over all; may be repeated.")
    ] = None,
    sweep: Annotated[
        list[str] | None, typer.Option(help="NAME=V,V,...: one evaluation for each value.")
    ] = None,
    report: Report = None,
    detach: Annotated[
        bool, typer.Option("--detach", help="Leave it to `tirgen-rl worker --queue evaluate`.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the configuration and what it comes to.")
    ] = False,
    no_code: NoCode = "below-all-pass",
    bootstrap_seed: Seed = 0,
    format: OutFormat = Format.TABLE,
) -> None:
    """Evaluate a policy on benchmarks; the same command goes on with what was stopped.

    Attempts are trajectories of a run EVALUATION/BENCHMARK: `tirgen query 'run == "..."'` asks for
    them. Benchmarks: `tirgen-rl analyze benchmarks`.
    """
    from rl.cli import figures as show
    from rl.evaluation import benchmarks, runs, worker
    from rl.evaluation.plan import Asked
    from rl.evaluation.plan import plan as planned
    from shared.problems import field_map

    if not benchmark:
        remedy = (
            "name one: --benchmark nano, math500, gsm8k=FILE, ...; `tirgen-rl analyze benchmarks`"
        )
        raise ConfigError("there is no benchmark to evaluate on", remedy=remedy)
    chosen = [benchmarks.find(one, data, field_map(map or ())) for one in benchmark]
    asked = Asked(
        model=model, base_url=base_url, served_model=served_model, tokenizer=tokenizer, text=text,
        judge_url=judge_url, judge_model=judge_model, file=config, settings=tuple(settings or ()),
        values=_nested(
            samples=samples, seed=seed,
            policy={"prompts": prompts, "thinking": thinking or None},
            correction={"strategy": strategy, "n_corr": n_corr, "l_suf": l_suf},
        ),
    )  # fmt: skip
    name = run or f"eval-{datetime.now():%m%d-%H%M%S}"
    plans = planned(name, asked, chosen, limit=limit, sweep=sweep or ())
    how = _settings(bootstrap_seed, no_code)
    if dry_run:
        show.dry_run(plans, format)
        return
    db = open_database()
    ids = [runs.start(db, one.evaluation, one.config, one.problems) for one in plans]
    if detach:
        runs.hand_out(db, ids, 1)
        console.print(f"Left to the workers: tirgen-rl worker --queue {worker.KIND}; then")
        console.print(f"  tirgen-rl analyze show {name}", highlight=False)
        return
    _work(db, plans, ids)
    made = _made(db, [one.evaluation for one in plans])
    show.evaluations(made, how, format)
    _report(db, name, made, report, how)


def compare(
    a: Annotated[str, typer.Argument(help="An evaluation.")],
    b: Annotated[str, typer.Argument(help="Another, measured against it.")],
    no_code: NoCode = "below-all-pass",
    bootstrap_seed: Seed = 0,
    format: OutFormat = Format.TABLE,
) -> None:
    """B against A on the same questions, benchmark by benchmark, with intervals and p-values."""
    from rl.cli import figures as show

    db = open_database()
    how = _settings(bootstrap_seed, no_code)
    show.comparison(_load(db, a), _load(db, b), how, format)


@app.command("show")
def show_figures(
    names: Evaluations,
    report: Report = None,
    no_code: NoCode = "below-all-pass",
    bootstrap_seed: Seed = 0,
    format: OutFormat = Format.TABLE,
) -> None:
    """The figures of stored evaluations, finished or not."""
    from rl.cli import figures as show

    db = open_database()
    how = _settings(bootstrap_seed, no_code)
    made = _made(db, names)
    show.evaluations(made, how, format)
    _report(db, ", ".join(names), made, report, how)


@app.command()
def tool_success(names: Evaluations, format: OutFormat = Format.TABLE) -> None:
    """Do calls that succeed go with right answers: pooled, and within questions."""
    from rl.cli import figures as show

    db = open_database()
    show.tool_success(_made(db, names), format)


@app.command()
def correction(names: Evaluations, format: OutFormat = Format.TABLE) -> None:
    """What became of actions whose first try failed."""
    from rl.cli import figures as show

    db = open_database()
    show.correction(_made(db, names), format)


@app.command()
def sweep(
    names: Evaluations,
    plot: Annotated[
        Path | None, typer.Option(help="Draw accuracy against cost into a .png.")
    ] = None,
    bootstrap_seed: Seed = 0,
    format: OutFormat = Format.TABLE,
) -> None:
    """Evaluations side by side: accuracy, call pass rate and cost of each point of a sweep."""
    from rl.cli import figures as show

    db = open_database()
    listed = [point for name in names for point in _points(db, name)]
    show.sweep(_made(db, listed), _settings(bootstrap_seed), plot, format)


@app.command("benchmarks")
def list_benchmarks(format: OutFormat = Format.TABLE) -> None:
    """The benchmarks that have a name."""
    from rl.cli import figures as show

    show.registry(format)


def _nested(**values: Any) -> dict[str, Any]:
    """Without what was not said."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        inner = _nested(**value) if isinstance(value, dict) else value
        if inner is not None and inner != {}:
            found[key] = inner
    return found


def _settings(seed: int, no_code: str = "below-all-pass") -> Settings:
    from rl.evaluation.figures import Settings

    if no_code == "below-all-pass":
        return Settings(seed=seed)
    try:
        rate = float(no_code)
    except ValueError:
        rate = -1.0
    if not 0 <= rate <= 1:
        raise ConfigError(
            f"{no_code!r} is neither a rate nor below-all-pass",
            where="--no-code",
            remedy="write a number from 0 to 1",
        )
    return Settings(seed=seed, no_code=rate)


def _report(
    db: Database, title: str, made: list[tuple[str, list[Results]]], to: Path | None, how: Settings
) -> None:
    if to is not None:
        from rl.evaluation import report

        page = report.write(db, title, [one for _, each in made for one in each], to, how)
        errors.print(f"report: {page}", highlight=False, markup=False)


def _load(db: Database, name: str) -> list[Results]:
    from rl.evaluation import runs
    from rl.evaluation.results import load

    return [load(db, run) for run in runs.find(db, name)]


def _made(db: Database, names: Sequence[str]) -> list[tuple[str, list[Results]]]:
    return [(name, _load(db, name)) for name in dict.fromkeys(names)]


def _points(db: Database, name: str) -> list[str]:
    """The points of a sweep of that name, or the evaluation itself."""
    from rl.evaluation import runs

    return runs.points(db, name) or [name]


def _work(db: Database, plans: Sequence[Planned], ids: Sequence[int]) -> None:
    from rl.evaluation import runs
    from shared.store import RunState

    with _stoppable() as told, Progress(*COLUMNS, console=errors) as bars:
        for one, run_id in zip(plans, ids, strict=True):
            label = runs.name_of(one.evaluation, one.config.benchmark.name)
            total = len(one.problems) * one.config.samples
            task = bars.add_task(label, total=total, facts="")

            def advance(now: Funnel, task: Any = task) -> None:
                done = now.n_items - now.n_open
                bars.update(task, completed=done, total=now.n_items, facts=_facts(now, done))

            last = runs.work(db, run_id, stopping=lambda: bool(told), progress=advance)
            if told or last.state is RunState.CANCELLED:
                break
    if told or last.state is RunState.CANCELLED:
        errors.print("Stopped; the same command goes on with it.")
        raise typer.Exit(130 if told else 1)


def _facts(now: Funnel, done: int) -> str:
    from shared.store import ItemState

    right, failed = now.items[ItemState.VETTED], now.items[ItemState.FAILED]
    share = right / done if done else 0.0
    return f"right {share:.0%}" + (f"  failed {failed}" if failed else "")


@contextmanager
def _stoppable() -> Iterator[list[int]]:
    """What SIGINT and SIGTERM say: the first lets attempts under way end, a second ends at once."""
    told: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        if told:
            raise KeyboardInterrupt
        told.append(number)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield told
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
