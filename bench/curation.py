"""Curation: what decontamination catches, what it takes with it, and how fast a chain is.

    python bench/curation.py [--data FOLDER] [--limit N]

Without `--data` the benchmark is one half of 800 problems of nano's world and the corpus the other:
18 templates, so that every problem has neighbours. With it, the corpus is FOLDER/problems/*.jsonl
and the benchmark FOLDER/benchmarks/*.jsonl. Into the corpus are planted, of 200 benchmark items:

copy       other typesetting, case and spaces
embedded   inside a longer text
reworded   words replaced by synonyms, sentences turned, small numbers spelled; by rule, so mildly
neighbour  every number another: not contaminated, and to be kept

The peer is the usual rule: any 13 words in a row that an item has, too, and nothing else. Then the
corpus goes through a whole chain in a database of its own; its funnel is counted in the verdicts.
One JSON object a line.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random

from sqlalchemy import func, select

from shared.fences import action, observation
from shared.nano.world import solved
from shared.problems import load_problems
from shared.sandbox.result import Outcome, RunResult, Tier
from shared.store import Completed, Database, EmbeddedPostgres, migrate
from shared.store.models import TrajectoryRow, VerdictRow
from shared.store.trajectories import import_problems, write_trajectories
from shared.trajectory import Check, End, Problem, Step, ToolCall, Trajectory, Verdict
from shared.work import items as work_items
from shared.work.runs import create_run
from tirgen.curation import chain
from tirgen.curation.base import PREFIX, Decision, Example, Given, OfExample
from tirgen.curation.decontaminate import Decontaminate
from tirgen.curation.words import grams, words
from tirgen.stats import wilson

PLANTED = 200
BATCH = 500
SYNONYMS = {
    "how many": "what number of", "find": "determine", "compute": "work out", "each": "every",
    "what is": "determine", "total": "overall", "has": "owns", "buys": "purchases",
    "let": "suppose that", "such that": "so that", "then": "afterwards", "also": "in addition",
    "positive integers": "positive whole numbers", "for every": "per", "there are": "we have",
    "gives": "hands", "people": "persons", "begins": "starts", "much": "great", "gets": "receives",
}  # fmt: skip
SPELLED = "zero one two three four five six seven eight nine ten eleven twelve".split()
CHAIN = """
[[filters]]
filter = "format"
[[filters]]
filter = "answer"
[[filters]]
filter = "repetition"
[[filters]]
filter = "language"
[[filters]]
filter = "one_per_problem"
[[filters]]
filter = "near_duplicates"
[[filters]]
filter = "decontaminate"
benchmarks = [{files}]
[[filters]]
filter = "balance"
share = {{ 1 = 0.5 }}
"""


def copy(text: str) -> str:
    return re.sub(r"\$([^$]+)\$", r"\\( \1 \\)", text).replace(". ", ".\n").upper()


def embedded(text: str) -> str:
    return f"Here is a task from my notebook, please solve it with care. {text} Show every step."


def reworded(text: str) -> str:
    for word, other in SYNONYMS.items():
        text = re.sub(rf"\b{word}\b", other, text, flags=re.IGNORECASE)
    parts = re.split(r"(\$[^$]*\$)", text)  # formulas stay as they are
    parts = [
        part if i % 2 else re.sub(r"\b\d\b", lambda m: SPELLED[int(m[0])], part)
        for i, part in enumerate(parts)
    ]
    *body, question = re.split(r"(?<=[.?!])\s+", "".join(parts).strip())
    return " ".join([question, *body])


def neighbour(text: str, random: Random) -> str:
    return re.sub(r"\d+", lambda m: str(int(m[0]) + random.randint(1, 9)), text)


def has_numbers(text: str) -> bool:
    return len(set(re.findall(r"\d+", text))) >= 2


def decided(filter: Decontaminate, texts: Sequence[str]) -> list[Decision]:
    rows = [Given(problem=text, text="").row(i) for i, text in enumerate(texts)]
    sieve = filter.sieve(OfExample(Example(rows=(Given(),))))
    batches = [rows[i : i + BATCH] for i in range(0, len(rows), BATCH)]
    for batch in batches:
        sieve.survey(batch)
    return [decision for batch in batches for decision in sieve.decide(batch)]


def plain(benchmark: Sequence[str], texts: Sequence[str], n: int = 13) -> list[bool]:
    """Whether a text shares n words in a row with any item."""
    seen = {g for text in benchmark if len(w := words(text)) >= n for g in grams(w, n)}
    return [not seen.isdisjoint(grams(words(text), n)) for text in texts]


def emit(metric: str, k: int, n: int, peer_k: int | None = None, **more: object) -> None:
    line: dict[str, object] = {"bench": "curation", "metric": metric, "value": k, "unit": f"of {n}"}
    low_high = wilson(k, n)
    if low_high is not None:
        line |= {"rate": round(k / n, 4), "interval": [round(x, 4) for x in low_high]}
    if peer_k is not None:
        line |= {"peer": "any common 13-gram", "peer_value": peer_k}
    print(json.dumps({**line, **more}), flush=True)


def speed(metric: str, value: float, unit: str) -> None:
    line = {"bench": "curation", "metric": metric, "value": round(value), "unit": unit}
    print(json.dumps(line), flush=True)


def recall(filter: Decontaminate, benchmark: list[str], corpus: list[str], random: Random) -> None:
    chosen = [text for text in benchmark if has_numbers(text)]
    chosen = random.sample(chosen, min(PLANTED, len(chosen)))
    planted = {
        "copy": [copy(text) for text in chosen],
        "embedded": [embedded(text) for text in chosen],
        "reworded": [reworded(text) for text in chosen],
        "neighbour": [neighbour(text, random) for text in chosen],
    }
    for kind, texts in planted.items():
        # Each kind by itself: together they would be templates of each other.
        found = decided(filter, [*corpus, *texts])[len(corpus) :]
        hits = [d for d in found if not d.passed]
        how = dict(Counter(str(d.evidence["method"]) for d in hits))
        emit(
            f"planted, dropped: {kind}",
            len(hits),
            len(texts),
            sum(plain(benchmark, texts)),
            how=how,
        )
    started = time.perf_counter()
    found = decided(filter, corpus)
    seconds = time.perf_counter() - started
    hits = [d for d in found if not d.passed]
    how = dict(Counter(str(d.evidence["method"]) for d in hits))
    emit("corpus dropped", len(hits), len(corpus), sum(plain(benchmark, corpus)), how=how)
    passed_over = sum("template_runs" in d.evidence for d in found if d.passed)
    emit("kept with boilerplate in common", passed_over, len(corpus))
    speed("decontamination", len(corpus) / seconds, "problems/s")


def example(problem: Problem, random: Random) -> Completed:
    result = RunResult(Outcome.OK, "42\n", "", None, Tier.A, 0.01, 0.01, 1 << 25, 0)
    code = f"import math\nprint(math.comb({random.randint(5, 99)}, 3))"
    calls = [ToolCall(code, "42", result)] * random.choice([1, 1, 1, 2, 3])
    said = " ".join(random.choices(words(problem.text) or ("x",), k=120))
    steps = [Step(f"We go on: {said}.", call) for call in calls]
    text = "".join(s.thought + action(s.call.code) + observation("42") for s in steps if s.call)
    last = f"It is \\boxed{{{problem.answer.translate({ord(c): None for c in '{}'})} }}."
    made = Trajectory(
        problem.key, (*steps, Step(last)), text + last, End.ANSWERED, "42", False,
        random.getrandbits(30), 300,
    )  # fmt: skip
    return Completed(made, (Verdict(Check.ANSWER, True, "1", "equal"),), None, 1, "m", "m", "bench")


def fill(db: Database, problems: Sequence[Problem], samples: int, random: Random) -> None:
    with db.begin() as session:
        import_problems(session, problems)
        run_id = create_run(
            session, name="bench", kind="generate", config={}, fingerprint="f", code_version="c"
        )
        work_items.create_items(session, run_id, [p.key for p in problems], samples, "f")
    by_key = {problem.key: problem for problem in problems}
    while leased := work_items.lease(db, run_id, "bench", 200, 600.0):
        with db.begin() as session:
            made = [(one.id, example(by_key[one.problem.key], random)) for one in leased]
            write_trajectories(session, run_id, made)


def funnel(db: Database, filters: chain.Chain, n: int) -> Iterator[str]:
    """Apply the chain, twice; yields whatever does not reconcile."""
    candidates = select(TrajectoryRow.id)
    for attempt in ("first", "again"):
        started = time.perf_counter()
        curated = chain.apply(db, filters, candidates, seed=1)
        rate = n / (time.perf_counter() - started)
        speed(f"{len(curated.stages)} filters, {attempt}", rate, "trajectories/s")
    before = n
    for stage in curated.stages:
        with db.session() as session:
            mine = VerdictRow.check_name == PREFIX + stage.name
            count, passed = session.execute(
                select(func.count(), func.count().filter(VerdictRow.passed)).where(mine)
            ).one()
        if not (count == stage.before == before and passed == stage.after):
            yield f"{stage}: {count} verdicts, {passed} passed, {before} before"
        emit(f"after {stage.name}", stage.after, stage.before)
        before = stage.after
    if before != len(curated.kept):
        yield f"{before} passed, {len(curated.kept)} kept"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, help="a folder with problems/ and benchmarks/")
    parser.add_argument("--limit", type=int, help="only so many problems of the corpus")
    given = parser.parse_args()
    random = Random(1)
    with tempfile.TemporaryDirectory() as home:
        if given.data is None:
            rng = Random(5)
            made = list({(p := solved(rng).problem()).text: p for _ in range(1600)}.values())[:800]
            path = Path(home) / "world.jsonl"
            path.write_text("".join(json.dumps({"problem": p.text}) + "\n" for p in made[400:]))
            files, problems = [path], made[:400]
        else:
            files = sorted((given.data / "benchmarks").glob("*.jsonl"))
            sources = sorted((given.data / "problems").glob("*.jsonl"))
            problems = [p for source in sources for p in load_problems(str(source))]
            random.shuffle(problems)
        problems = problems[: given.limit]
        filter = Decontaminate(benchmarks=tuple(map(str, files)))
        recall(filter, [i.text for i in filter.items], [p.text for p in problems], random)
        server = EmbeddedPostgres(Path(home))
        db = Database(server.start())
        try:
            migrate.upgrade(db)
            fill(db, problems, 2, random)
            names = ", ".join(json.dumps(str(file)) for file in files)
            filters = chain.parse(CHAIN.format(files=names), "bench", "bench")
            wrong = list(funnel(db, filters, 2 * len(problems)))
            emit("stages that do not reconcile to the row", len(wrong), len(filters.filters))
            if wrong:
                raise SystemExit("\n".join(wrong))
        finally:
            db.close()
            server.stop()


if __name__ == "__main__":
    main()
