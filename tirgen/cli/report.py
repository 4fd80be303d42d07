"""What became of a run, as a page to read."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.console import RenderableType
from rich.text import Text

from shared.sandbox.result import Outcome
from shared.store import ItemState
from shared.terminal import line, percent, share, table, visible
from tirgen.agreement import Summary
from tirgen.stats import RunStats, wilson

BAR = 24  # characters
STYLES = {ItemState.VETTED: "green", ItemState.REJECTED: "yellow", ItemState.FAILED: "red"}


def page(stats: RunStats) -> Iterator[RenderableType]:
    run = stats.funnel
    yield Text.assemble(
        (f"Run {line(run.name)}", "bold"), f"  {run.state}, begun {run.created_at:%Y-%m-%d %H:%M}"
    )
    yield Text()
    yield table(("stage", "items", "share", ""), _funnel(stats))
    yield _reconciled(stats)
    if stats.curation is not None:
        chain = stats.curation
        when = f"seed {chain.seed}, {chain.applied_at:%Y-%m-%d %H:%M}"
        head = ("after filter", "left", "of the run", "")
        yield table(head, _curated(stats), f"\nCurated by {line(chain.name)} ({when})")
    if stats.examples:
        failed = [(one.error_class, one.item, brief(one.text)) for one in stats.examples]
        yield table(("error", "item", "for example"), failed, "\nFailed (--failures lists all)")
    yield Text()
    yield from _rates(stats)
    if any(subject is not None for subject in stats.subjects):
        names = ("subject", "items", "vetted", "rejected", "failed", "yield")
        yield table(names, _subjects(stats), "\nBy subject")
    if stats.consensus.n_problems:
        yield Text()
        yield from agreed(stats.consensus)
    if stats.usage:
        yield table(*_used(stats), "\nModel calls, failed attempts included")


def _used(stats: RunStats) -> tuple[list[str], list[list[Any]]]:
    """With costs, if anybody has said what a token costs."""
    names = ["role", "model", "requests", "retries", "prompt tokens", "completion tokens"]
    rows: list[list[Any]] = [
        [u.role, u.model, u.requests, u.retries, u.prompt_tokens, u.completion_tokens]
        for u in stats.usage
    ]
    if any(stats.costs):
        names.append("cost")
        rows = [[*row, cost] for row, cost in zip(rows, stats.costs, strict=True)]
    return names, rows


def agreed(shown: Summary) -> Iterator[RenderableType]:
    """What the samples of each problem agree on; nothing where nothing was compared."""
    if not shown.n_problems:
        return
    yield Text(
        f"{shown.n_majority} of {shown.n_problems} problems have a majority, {shown.n_tied} tie; "
        f"{shown.n_disagree} majorities differ from the reference, "
        f"{shown.n_undecided} cannot be compared with it"
    )
    if shown.queue:
        rows = [
            (q.problem_id, q.answer, q.reference, f"{q.votes}/{q.n_samples}") for q in shown.queue
        ]
        names = ("problem", "majority", "reference", "votes")
        yield table(names, rows, "\nMajorities that differ: is the reference wrong?")


def brief(text: str) -> Text:
    """An error message on a few lines: its end, where the cause stands."""
    return Text(visible(text.strip()[-400:]), overflow="fold")


def _funnel(stats: RunStats) -> Iterator[tuple[Any, ...]]:
    run = stats.funnel
    total = run.n_items

    def row(label: str, n: int, style: str) -> tuple[Any, ...]:
        bar = Text("█" * round(BAR * n / total) if total else "", style=style, no_wrap=True)
        return label, n, share(n, total), bar

    yield row("items", total, "white")
    for state, style in STYLES.items():
        yield row(state.value, run.items[state], style)
        parts = {ItemState.REJECTED: run.rejected, ItemState.FAILED: run.failed}.get(state, {})
        for name, n in parts.items():
            yield row(f"  {name}", n, f"dim {style}")
    for state in (ItemState.LEASED, ItemState.QUEUED, ItemState.CANCELLED):
        if run.items[state]:
            yield row(state.value, run.items[state], "white")


def _curated(stats: RunStats) -> Iterator[tuple[Any, ...]]:
    assert stats.curation is not None
    total = stats.trajectories.n
    counts = [(name, after) for name, _, after in stats.curation.stages]
    for name, n in [("(candidates)", stats.curation.stages[0][1]), *counts]:
        bar = Text("█" * round(BAR * n / total) if total else "", style="cyan", no_wrap=True)
        yield name, n, share(n, total), bar


def _reconciled(stats: RunStats) -> Text:
    wrong = stats.discrepancies()
    if wrong:
        return Text("The counts do NOT reconcile: " + "; ".join(wrong), style="bold red")
    parts = [f"{n} {state.value}" for state, n in stats.funnel.items.items() if n]
    return Text(
        f"The counts reconcile: {stats.funnel.n_items} items = {' + '.join(parts) or 0}",
        style="dim",
    )


def _rates(stats: RunStats) -> Iterator[Text]:
    made = stats.trajectories
    interval = wilson(stats.n_vetted, stats.n_finished)
    if interval is not None:
        low, high = (100 * bound for bound in interval)
        vetted = percent(stats.n_vetted, stats.n_finished)
        yield _fact("yield", f"{vetted} of finished items (95 % interval {low:.1f} to {high:.1f})")
    if stats.right[1]:
        right, of = stats.right
        yield _fact("right answers", f"{right} of {of} decided ones, {percent(right, of)}")
    if made.n:
        ends = ", ".join(f"{n} {line(end).replace('_', ' ')}" for end, n in stats.ends.items())
        yield _fact("trajectories", f"{made.n}, ended: {ends}")
        yield _fact("length", f"{made.n_tokens / made.n:.0f} tokens of the policy on average")
    if stats.n_attempts:
        ok = stats.outcomes.get(Outcome.OK, 0)
        kinds = ", ".join(f"{n} {kind.replace('_', ' ')}" for kind, n in stats.outcomes.items())
        yield _fact("tool calls", f"{sum(stats.outcomes.values())} that stand: {kinds}")
        yield _fact("", f"{percent(ok, stats.n_attempts)} of all {stats.n_attempts} tried were ok")
        yield _fact(
            "corrections",
            f"{made.n_corrections} failed calls taken back, in {made.n_with_correction} "
            f"trajectories; {made.n_with_failed_call} keep a failed call",
        )
    if stats.per_minute is not None and made.n:
        spoken = sum(u.completion_tokens for u in stats.usage) / stats.elapsed
        yield _fact(
            "throughput",
            f"{stats.per_minute:.1f} items/min over {stats.elapsed:.0f} s, "
            f"{spoken:.0f} completion tokens/s, {made.duration / made.n:.2f} s per trajectory",
        )


def _subjects(stats: RunStats) -> Iterator[tuple[Any, ...]]:
    for subject, states in stats.subjects.items():
        ended = [states[state] for state in STYLES]
        rate = share(states[ItemState.VETTED], sum(ended))
        yield subject or "(none)", sum(states.values()), *ended, rate


def _fact(label: str, text: str) -> Text:
    return Text.assemble((f"{label:14}", "cyan"), text)
