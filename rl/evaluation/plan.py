"""From what a user asks for to the evaluations that are made: names, configurations, problems.

`--model nano` is the packaged policy, with the prompts and the context that it was trained with.
Other folders say of themselves what they are (rl/folder.py).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

from rl.evaluation import benchmarks
from rl.evaluation.benchmarks import Loaded
from rl.evaluation.config import Budgets, EvaluationConfig, build
from rl.evaluation.engines import digest
from rl.folder import described, stored
from shared.config import merge
from shared.errors import ConfigError, InputError
from shared.problems import NANO, packaged_problems
from shared.trajectory import Problem

SWEPT = {"n_corr": "correction.n_corr", "l_suf": "correction.l_suf",
         "strategy": "correction.strategy", "calls": "budgets.calls", "seed": "seed",
         "temperature": "policy.temperature"}  # fmt: skip

NANO_SETTINGS: Mapping[str, Any] = {
    "policy": {"prompts": "compact", "dtype": "fp32", "temperature": 1.0, "top_k": -1},
    "budgets": {"tokens": 640, "context": 1000},
    "correction": {"l_suf": 6},  # about a quarter of the median thought
}


@dataclass(frozen=True, slots=True)
class Asked:
    """What the command line says; None where it says nothing."""

    model: str | None = None
    base_url: str | None = None
    served_model: str | None = None
    tokenizer: str | None = None
    text: bool = False
    judge_url: str | None = None
    judge_model: str | None = None
    values: Mapping[str, Any] = field(default_factory=dict)  # nested, as a file would have them
    file: Path | None = None
    settings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Planned:
    """One run to be made: `evaluation` is its name without the benchmark's."""

    evaluation: str
    config: EvaluationConfig
    problems: tuple[Problem, ...]
    left_out: Mapping[str, int]


def plan(
    evaluation: str,
    asked: Asked,
    chosen: Sequence[benchmarks.Benchmark],
    *,
    limit: int | None = None,
    sweep: Iterable[str] = (),
) -> list[Planned]:
    """Every run of an evaluation, benchmark by benchmark for each point of a sweep.

    Raises ConfigError and InputError, before anything is stored.
    """
    _check_name(evaluation)
    loaded = [benchmarks.load(benchmark, limit) for benchmark in chosen]
    names = [one.benchmark.name for one in loaded]
    doubled = next((name for name in names if names.count(name) > 1), None)
    if doubled is not None:
        raise ConfigError(f"the benchmark {doubled!r} is named twice", where="--benchmark")
    base = _values(asked)
    return [
        Planned(
            f"{evaluation}@{label}" if label else evaluation,
            _config(base, asked, one, settings),
            one.problems,
            one.left_out,
        )
        for label, settings in points(sweep)
        for one in loaded
    ]


def points(sweep: Iterable[str]) -> list[tuple[str, tuple[str, ...]]]:
    """`n_corr=1,4` and `l_suf=20,100` as (label, settings), every combination."""
    axes = []
    for one in sweep:
        name, equals, listed = one.partition("=")
        if not equals or not listed:
            raise ConfigError(f"{one!r} is not NAME=VALUE,VALUE", where="--sweep")
        path = SWEPT.get(name, name)
        axes.append([(f"{name}={value}", f"{path}={value}") for value in listed.split(",")])
    return [
        (",".join(label for label, _ in point), tuple(setting for _, setting in point))
        for point in product(*axes)
    ]


def _config(
    base: Mapping[str, Any], asked: Asked, loaded: Loaded, settings: Sequence[str]
) -> EvaluationConfig:
    benchmark = loaded.benchmark
    values: dict[str, Any] = {}
    merge(values, json.loads(json.dumps(base)))
    values["benchmark"] = {
        "name": benchmark.name,
        "title": benchmark.title,
        "kind": benchmark.kind,
        "source": benchmark.source,
        "n": len(loaded.problems),
        "digest": loaded.digest,
    }
    if benchmark.samples is not None:
        values["samples"] = benchmark.samples
    return build(values, asked.file, (*asked.settings, *settings))


def _values(asked: Asked) -> dict[str, Any]:
    """What the policy says of itself < the command line."""
    values: dict[str, Any] = {}
    if (asked.model is None) == (asked.base_url is None):
        raise ConfigError(
            "an evaluation is of a folder or of a server",
            where="tirgen-rl eval",
            remedy="give --model DIR, or --base-url URL with --served-model NAME",
        )
    if asked.base_url is not None:
        engine = "text" if asked.text else "http"
        endpoint = {"base_url": asked.base_url, "model": asked.served_model or "default"}
        merge(values, {"policy": {"engine": engine, "endpoint": endpoint}})
        if asked.tokenizer is not None:
            path = _folder(asked.tokenizer)
            merge(values, _of_folder(path))
            merge(values, {"policy": {"tokenizer": str(path or asked.tokenizer)}})
    elif asked.model is not None:
        path = _folder(asked.model)
        merge(values, _of_folder(path))
        named = str(path) if path is not None else asked.model
        merge(values, {"policy": {"model": named, "weights": digest(path) if path else ""}})
    if asked.judge_url is not None:
        judge = {"base_url": asked.judge_url, "model": asked.judge_model or "default"}
        merge(values, {"judge": {"endpoint": judge}})
    merge(values, asked.values)
    return values


def _packaged() -> Path:
    return packaged_problems().parent / "weights"


def _folder(name: str) -> Path | None:
    """The folder that is meant; None for a name on the Hub."""
    if name == NANO:
        return _packaged()
    path = Path(name)
    if path.is_dir():
        return path.resolve()
    if path.exists() or name.startswith((".", "/")) or name.count("/") > 1:
        raise InputError(
            "there is no such folder",
            where=name,
            remedy="name a Hugging Face folder, ORG/NAME of the Hub, or nano",
        )
    return None


def _of_folder(path: Path | None) -> dict[str, Any]:
    """Settings that a folder asks for: those of nano, or what it says of itself."""
    if path is None:
        return {}
    if path.resolve() == _packaged().resolve():
        return json.loads(json.dumps(NANO_SETTINGS))  # type: ignore[no-any-return]
    values: dict[str, Any] = {"policy": described(path)}
    dtype, positions = stored(path)
    if dtype is not None:
        values["policy"]["dtype"] = dtype
    if positions is not None and positions < Budgets().context:
        values["budgets"] = {"context": positions}
    return values


def _check_name(name: str) -> None:
    if not name or "@" in name or name != name.strip():
        raise ConfigError(
            f"{name!r} is no name for an evaluation",
            where="--run",
            remedy="use any text without @, which marks the points of a sweep",
        )
