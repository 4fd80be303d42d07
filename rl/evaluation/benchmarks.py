"""Benchmarks by name: where each one lives, what its columns are called, how it is judged.

    math500                  from the Hugging Face Hub, or DATA/math500.jsonl with --data DATA
    math500=my/file.jsonl    that file instead (JSON lines, Parquet or CSV)
    my/file.jsonl            any file of problems, called by its stem
    aime24@16                with a number of samples of its own

Math files are read as `tirgen generate` reads them (`shared/problems.py`), with the same errors.
Nothing is packaged but `nano`. Benchmarks are for measuring only: a snapshot refuses their
trajectories unless it is told to take them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Literal

from rl.evaluation import code
from shared import rows
from shared.config import choose
from shared.errors import InputError
from shared.problems import NANO, load_problems
from shared.trajectory import Problem, content_hash

Kind = Literal["math", "code"]
SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".parquet", ".csv", ".csv.gz")

_NAME = re.compile(r"[A-Za-z0-9][\w.+-]*", re.ASCII)


@dataclass(frozen=True, slots=True)
class Benchmark:
    """`source`: a dataset as ORG/NAME[:CONFIG]:SPLIT, a file, or `nano`.

    fields: where its columns have none of the usual names. files: stems under which a folder of
    data may hold it. tests: of a code benchmark, how its rows say what a solution must do.
    """

    name: str
    title: str
    source: str
    fields: Mapping[str, str] = field(default_factory=dict)
    files: tuple[str, ...] = ()
    tests: code.Style | None = None
    samples: int | None = None

    @property
    def kind(self) -> Kind:
        return "math" if self.tests is None else "code"


@dataclass(frozen=True, slots=True)
class Loaded:
    """`digest` is over the problems in their order; `left_out` counts rows that could not count."""

    benchmark: Benchmark
    problems: tuple[Problem, ...]
    left_out: Mapping[str, int]

    @property
    def digest(self) -> str:
        return content_hash([problem.key for problem in self.problems])[:16]


def _math(name: str, title: str, source: str, *files: str, **fields: str) -> Benchmark:
    return Benchmark(name, title, source, fields, (name, *files))


def _code(name: str, title: str, source: str, tests: code.Style, *files: str) -> Benchmark:
    return Benchmark(name, title, source, {}, (name, *files), tests)


REGISTRY: Mapping[str, Benchmark] = {
    benchmark.name: benchmark
    for benchmark in (
        Benchmark(NANO, "nano, held out", NANO),
        _math("math500", "MATH-500", "HuggingFaceH4/MATH-500:test", "math_500", id="unique_id"),
        _math("aime24", "AIME 2024", "HuggingFaceH4/aime_2024:train", "aime_2024"),
        _math("aime25", "AIME 2025", "math-ai/aime25:test", "aime_2025"),
        _math("amc23", "AMC 2023", "math-ai/amc23:test", "amc_2023"),
        _math("minerva", "Minerva Math", "math-ai/minervamath:test", "minerva_math"),
        _math("olympiadbench", "OlympiadBench", "zkshan2002/olympiad_bench:test"),
        _math("gsm8k", "GSM8K", "openai/gsm8k:main:test", "gsm8k_test"),
        _code("humaneval+", "HumanEval+", "evalplus/humanevalplus:test", "humaneval",
              "humanevalplus"),
        _code("mbpp+", "MBPP+", "evalplus/mbppplus:test", "mbpp", "mbppplus"),
        _code("livecodebench", "LiveCodeBench v6", "lighteval/code_generation_lite:v6:test",
              "livecodebench", "livecodebench_v6"),
    )
}  # fmt: skip


def find(text: str, data: Path | None = None, fields: Mapping[str, str] | None = None) -> Benchmark:
    """The benchmark that `text` names. `data`: a folder to look in before the Hub; `fields`: over
    the benchmark's own.

    Raises ConfigError for an unknown name.
    """
    text, at, samples = text.rpartition("@") if re.search(r"@\d+$", text) else (text, "", "")
    name, equals, path = text.partition("=")
    if equals and name in REGISTRY:
        found = _from_file(REGISTRY[name], path)
    elif text in REGISTRY:
        found = REGISTRY[text]
        local = _in_folder(found, data) if data is not None else None
        found = found if local is None else _from_file(found, str(local))
    elif "/" in text or Path(text).exists() or text.endswith(SUFFIXES):
        stem = re.split(r"[.:]", Path(text).name)[0]
        label = stem if _NAME.fullmatch(stem) else "file"
        found = Benchmark(label, label, text)
    else:
        choose(name, REGISTRY, "benchmark", "--benchmark")
        found = REGISTRY[name]
    if fields:
        found = replace(found, fields={**found.fields, **fields})
    return replace(found, samples=int(samples)) if at else found


def load(benchmark: Benchmark, limit: int | None = None) -> Loaded:
    """The first `limit` of its problems. Raises InputError for what is not as it should be."""
    if benchmark.tests is not None:
        problems = tuple(islice(_tasks(benchmark), limit))
        if not problems:
            raise InputError("it is empty", where=benchmark.source)
        return Loaded(benchmark, problems, {})
    stream = load_problems(benchmark.source, limit, benchmark.fields)
    problems = tuple(replace(p, source=benchmark.name) for p in stream)
    left_out = {"duplicates": stream.n_duplicates, "without answer": stream.n_unanswered}
    return Loaded(benchmark, problems, {why: n for why, n in left_out.items() if n})


def _tasks(benchmark: Benchmark) -> Iterator[Problem]:
    assert benchmark.tests is not None
    found, unit = rows.read(benchmark.source, code.columns(benchmark.tests))
    seen = set()
    for number, row in found:
        where = f"{benchmark.source}, {unit} {number}"
        problem = code.problem(row, benchmark.tests, benchmark.name, where)
        if problem.key not in seen:
            seen.add(problem.key)
            yield problem


def _in_folder(benchmark: Benchmark, folder: Path) -> Path | None:
    paths = (folder / f"{stem}{suffix}" for stem in benchmark.files for suffix in SUFFIXES)
    return next((path for path in paths if path.exists()), None)


def _from_file(benchmark: Benchmark, path: str) -> Benchmark:
    """A copy of one's own may have the usual columns rather than the Hub's."""
    return replace(benchmark, source=path, fields={})
