"""The figures of an evaluation, each with its interval and what it is a figure of.

A figure is a ratio over questions (rl/evaluation/intervals.py), so that one interval and one
comparison serve them all. Which ones there are depends on the number of attempts per question,
which never changes silently: where questions have different numbers, k-figures are over those that
have enough, and the count says so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rl.evaluation.attempts import Attempt
from rl.evaluation.config import EvaluationConfig
from rl.evaluation.intervals import (
    Comparison,
    Interval,
    Ratio,
    compare,
    interval,
    ratio,
)
from rl.evaluation.metrics import (
    Candidate,
    NoCode,
    best_of_k,
    maj_at_k,
    pass_at_k,
    pass_hat_k,
)
from rl.evaluation.results import Question, Results
from shared import seeds
from shared.grading.consensus import Cluster
from shared.trajectory import End


@dataclass(frozen=True, slots=True)
class Figure:
    """`unit`: "share" (printed as a percentage), or what is counted. `about`: in one line."""

    name: str
    unit: str
    about: str
    ratio: Ratio
    interval: Interval

    @property
    def value(self) -> float | None:
        return self.interval.value


@dataclass(frozen=True, slots=True)
class Settings:
    """How figures are computed: none of it changes what was measured."""

    seed: int = 0
    level: float = 0.95
    resamples: int = 2000
    no_code: NoCode = "below-all-pass"


# (name, unit, about, attempts of a question -> (numerator, denominator))
_PerAttempt = Callable[[Attempt], tuple[float, float]]
_COUNTS: tuple[tuple[str, str, str, _PerAttempt], ...] = (
    ("first-try call pass rate", "share", "calls that succeed at the first try",
     lambda a: (sum(c.first_ok for c in a.calls), len(a.calls))),
    ("call pass rate", "share", "calls that stand, after self-correction, and succeeded",
     lambda a: (a.n_ok, a.n_calls)),
    ("code ratio", "share", "attempts with a call that stands", lambda a: (a.n_calls > 0, 1)),
    ("calls", "per attempt", "calls that stand", lambda a: (a.n_calls, 1)),
    ("retries", "per attempt", "calls that self-correction took back", lambda a: (a.n_retries, 1)),
    ("sampled tokens", "per attempt", "sampled by the policy, those of retries included",
     lambda a: (a.n_generated, 1)),
    ("response tokens", "per attempt", "of the response that stands, observations included",
     lambda a: (a.n_tokens, 1)),
    ("no answer", "share", "attempts without an answer", lambda a: (not a.boxed, 1)),
    ("cut by length", "share", "attempts that a length budget ended",
     lambda a: (a.end is End.LENGTH_BUDGET, 1)),
    ("undecided", "share", "answers that the rules could not decide (counted as not right)",
     lambda a: (a.right is None, 1)),
    ("seconds of generation", "per attempt", "waiting for the engine, others alongside",
     lambda a: (a.seconds_generate or 0, a.seconds_generate is not None)),
    ("seconds of tool", "per attempt", "waiting for the sandbox",
     lambda a: (a.seconds_tool or 0, a.seconds_tool is not None)),
)  # fmt: skip


def figures(results: Results, settings: Settings = Settings()) -> list[Figure]:
    """Every figure of a run, in the order of a table."""
    questions = results.questions
    named = {name: (unit, about, made) for name, unit, about, made in ratios(questions, settings)}
    return [
        Figure(name, unit, about, made, _interval(made, settings))
        for name, (unit, about, made) in named.items()
    ]


def _interval(made: Ratio, settings: Settings) -> Interval:
    return interval(made, seed=settings.seed, level=settings.level, resamples=settings.resamples)


def ratios(
    questions: Sequence[Question], settings: Settings = Settings()
) -> list[tuple[str, str, str, Ratio]]:
    """(name, unit, about, ratio) of every figure, question by question in their order."""
    most = max((len(q.attempts) for q in questions), default=0)
    made = [("accuracy", "share", f"avg@{most}: right by the rules", _means(questions, _right))]
    if any(a.judged is not None for q in questions for a in q.attempts):
        about = f"avg@{most}: right in the judge's opinion"
        made.append(("accuracy by judge", "share", about, _means(questions, _judged)))
    for k in _ks(most):
        about = "at least one of k is right, unbiased"
        made.append((f"pass@{k}", "share", about, _of_k(questions, k, _pass_at)))
    if most > 1:
        about = "all of k are right"
        made.append((f"pass^{most}", "share", about, _of_k(questions, most, _pass_hat)))
    if most > 1 and any(q.agreement is not None for q in questions):
        about = "the majority is right; answers are equal by the grader, ties are shared"
        made += [(f"maj@{k}", "share", about, _of_k(questions, k, majority)) for k in _ks(most)]
    if most > 1:
        about = "the one with the best call pass rate is right (self-rewarded)"
        made += [
            (f"best-of-{k}", "share", about, _of_k(questions, k, _best(settings)))
            for k in _ks(most)
        ]
    for name, unit, about, count in _COUNTS:
        made.append((name, unit, about, _pooled(questions, count, unit)))
    return made


def _ks(n: int) -> list[int]:
    """2, 4, 8, ... and n."""
    powers = [1 << i for i in range(1, n.bit_length())]
    return sorted({k for k in (*powers, n) if 1 < k <= n})


def _right(one: Attempt) -> float:
    return float(one.right is True)


def _judged(one: Attempt) -> float:
    return float(one.judged is True)


def _means(questions: Sequence[Question], value: Callable[[Attempt], float]) -> Ratio:
    """Mean of questions' means, so that a question with more attempts does not count more."""
    return ratio((sum(map(value, q.attempts)) / len(q.attempts) for q in questions), is_share=True)


def _of_k(questions: Sequence[Question], k: int, value: Callable[[Question, int], float]) -> Ratio:
    enough = [len(q.attempts) >= k for q in questions]
    top = [value(q, k) if e else 0.0 for q, e in zip(questions, enough, strict=True)]
    return ratio(top, enough, is_share=True)


def _pass_at(question: Question, k: int) -> float:
    n = len(question.attempts)
    return pass_at_k(n, sum(a.right is True for a in question.attempts), k)


def _pass_hat(question: Question, k: int) -> float:
    n = len(question.attempts)
    return pass_hat_k(n, sum(a.right is True for a in question.attempts), k)


def majority(question: Question, k: int) -> float:
    """maj@k; an answer is right if the attempts that spell it as most do are."""
    if question.agreement is None:
        return 0.0
    clusters = question.agreement.clusters
    right = [_is_right(question, cluster) for cluster in clusters]
    return maj_at_k([c.votes for c in clusters], right, len(question.attempts), k)


def _is_right(question: Question, cluster: Cluster) -> bool:
    spelled = (question.attempts[i] for i in cluster.samples)
    return any(a.right is True for a in spelled if a.answer and a.answer.strip() == cluster.answer)


def _best(settings: Settings) -> Callable[[Question, int], float]:
    def value(question: Question, k: int) -> float:
        right = [a.right is True for a in question.attempts]
        seed = seeds.derive(settings.seed, question.key, "best-of")
        return best_of_k(candidates(question), right, k, seed, settings.no_code)

    return value


def candidates(question: Question) -> list[Candidate]:
    """What best-of-N may look at. Without an agreement (code), every answer is its own."""
    of_sample: dict[int, int] = {}
    if question.agreement is None:
        of_sample = {i: i for i, a in enumerate(question.attempts) if a.boxed}
    else:
        for number, cluster in enumerate(question.agreement.clusters):
            of_sample |= dict.fromkeys(cluster.samples, number)
    return [
        Candidate(a.n_calls, a.n_ok, of_sample.get(i), a.n_tokens)
        for i, a in enumerate(question.attempts)
    ]


def _pooled(questions: Sequence[Question], count: _PerAttempt, unit: str) -> Ratio:
    """Sums over all attempts of a question, above and below."""
    sums = [tuple(map(sum, zip(*map(count, q.attempts), strict=True))) or (0, 0) for q in questions]
    return ratio((top for top, _ in sums), (bottom for _, bottom in sums),
                 is_share=unit == "share")  # fmt: skip


# ---- several benchmarks ---------------------------------------------------------------------


def average(results: Sequence[Results], settings: Settings = Settings()) -> Figure:
    """Mean accuracy over benchmarks, each counting alike; questions are drawn within theirs."""
    top, bottom, strata = [], [], []
    for number, one in enumerate(results):
        weight = 1 / (len(results) * max(1, len(one.questions)))
        means = _means(one.questions, _right).top_Q
        top += [weight * mean for mean in means]
        bottom += [weight] * len(means)
        strata += [number] * len(means)
    made = ratio(top, bottom, strata)
    about = f"mean over {len(results)} benchmarks"
    return Figure("average accuracy", "share", about, made, _interval(made, settings))


# ---- two evaluations ------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Compared:
    """`unmatched`: questions that only one of the two has; they are left out."""

    name: str
    unit: str
    comparison: Comparison


@dataclass(frozen=True, slots=True)
class Pairing:
    a: Results
    b: Results
    n_common: int
    unmatched: int
    figures: tuple[Compared, ...]
    differences: tuple[str, ...]  # settings in which the two were measured differently


def pair(a: Results, b: Results, differences: Sequence[str], settings: Settings) -> Pairing:
    """B against A on the questions of one benchmark that both have."""
    of_a, of_b = ({q.key: q for q in r.questions} for r in (a, b))
    keys = [key for key in of_a if key in of_b]
    made_a = {m[0]: m for m in ratios([of_a[key] for key in keys], settings)}
    made_b = {m[0]: m for m in ratios([of_b[key] for key in keys], settings)}
    compared = [
        Compared(
            name, unit,
            compare(one, made_b[name][3], seed=settings.seed, level=settings.level,
                    resamples=settings.resamples),
        )
        for name, unit, _, one in made_a.values()
        if name in made_b
    ]  # fmt: skip
    unmatched = len(of_a) + len(of_b) - 2 * len(keys)
    return Pairing(a, b, len(keys), unmatched, tuple(compared), tuple(differences))


# ---- what every figure is printed with ------------------------------------------------------


def context(results: Results, settings: Settings = Settings()) -> list[tuple[str, str]]:
    """k, seeds, judge, context, budgets, interval: what a figure means nothing without."""
    config: EvaluationConfig = results.config
    counts = sorted({len(q.attempts) for q in results.questions})
    k = "-".join(str(n) for n in sorted({counts[0], counts[-1]})) if counts else "0"
    c, p, b = config.correction, config.policy, config.budgets
    corrected = "none"
    if c.strategy != "none":
        cut = f", L_suf {c.l_suf}" if c.strategy == "suffix" else ""
        shown = ", feedback" if c.feedback else ""
        corrected = f"{c.strategy}{cut}, N_corr {c.n_corr} a step, {c.n_corr_total} in all{shown}"
    failed = ", ".join(f"{n} {why}" for why, n in results.failures.items())
    top_k = "off" if p.top_k in (None, -1) else p.top_k
    served = f" at {p.endpoint.base_url}" if p.endpoint else ""
    judge = config.judge.endpoint.model if config.judge else "none"
    return [
        ("benchmark", f"{config.benchmark.name} ({len(results.questions)} of {config.benchmark.n} "
         f"questions, digest {config.benchmark.digest})"),
        ("policy", f"{p.label}{served}, {p.engine} engine, prompts {p.prompts}, "
         f"thinking {'on' if p.thinking else 'off'}"),
        ("k", f"{k} attempts a question"),
        ("seeds", f"run seed {config.seed}; each attempt's from (seed, question, sample)"),
        ("sampling", f"temperature {p.temperature:g}, top-p {p.top_p:g}, top-k {top_k}"),
        ("budgets", f"{b.calls} calls, {b.tokens} tokens of response, {b.context} of context, "
         f"{config.tool.timeout:g} s CPU a call"),
        ("self-correction", corrected),
        ("judge", f"rules {', '.join(results.graders) or 'none'}; model: {judge}"),
        ("intervals", f"{100 * settings.level:g} %, bootstrap over questions, "
         f"{settings.resamples} resamples, seed {settings.seed}"),
        ("without an attempt", failed or "none"),
        ("code", ", ".join(results.code_versions) or "-"),
    ]  # fmt: skip
