"""Decontamination: no problem that a benchmark asks, whether copied, embedded or reworded.

Three looks, best evidence first (method.md 9.2 no. 22; service.md 2f):

exact   the normalised texts are equal;
ngram   runs of `n` words of the benchmark item stand in the problem, and cover enough of the item.
        Runs that stand in more than `template` distinct problems are boilerplate ("... where m and
        n are relatively prime ...") and are passed over, counted in the evidence;
near    the cosine of the two bags of words, weighted by how rare each word is (TF-IDF), reaches
        `near`. This is what finds a paraphrase.

Both of the latter also ask for the item's numbers, `ngram` for all of them, `near` for most: a
template filled with others is another problem, which a benchmark does not ask. An item with few
numbers must agree more in its words.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field

from shared.problems import load_problems
from tirgen.curation.base import Context, Decision, Filter, Row, Sieve
from tirgen.curation.words import agreement, grams, numbers, stems, words

TELLING = 3  # numbers up to here are in every other problem
FEW = 2  # different telling numbers; with fewer, another problem may well have the same ones
EXCERPT = 300  # characters of a span or an item that a verdict holds


@dataclass(frozen=True, slots=True)
class Item:
    """One question of a benchmark; `name` is its id, or its place in the file."""

    benchmark: str
    name: str
    text: str
    words: tuple[str, ...]
    numbers: Counter[str]


class Decontaminate(Filter):
    """Drops trajectories of problems that are in any of the `benchmarks`, with the evidence."""

    KIND: ClassVar[str] = "decontaminate"

    benchmarks: tuple[str, ...] = Field(
        min_length=1, description="Files (JSONL, CSV, Parquet) or datasets; answers are not read."
    )
    fields: dict[str, str] = Field(
        default={}, description='Their columns, e.g. {problem = "question"}.'
    )
    n: int = Field(default=13, ge=3, description="Words in a row that are too many in common.")
    template: int = Field(
        default=5, ge=1, description="Runs that stand in more problems than these are boilerplate."
    )
    coverage: float = Field(
        default=0.5, ge=0, le=1, description="Share of the item's words that such runs must cover."
    )
    near: float = Field(default=0.7, gt=0, le=1, description="Cosine, for items with numbers.")
    near_few: float = Field(
        default=0.85, gt=0, le=1, description="The same for items whose numbers tell little."
    )
    same_numbers: float = Field(
        default=0.8,
        ge=0,
        le=1,
        description="near: share of the numbers of both that must be the same.",
    )
    min_words: int = Field(
        default=8, ge=1, description="Shorter items are compared exactly, and not otherwise."
    )

    def located(self, folder: Path) -> Decontaminate:
        paths = [str(folder / one) if _is_here(folder, one) else one for one in self.benchmarks]
        located = self.model_copy(update={"benchmarks": tuple(paths)})
        assert located.items  # read now: a benchmark that cannot be read is found before any work
        return located

    @cached_property
    def items(self) -> tuple[Item, ...]:
        """Every distinct question of all benchmarks. Raises InputError as `load_problems` does."""
        found = []
        for source in self.benchmarks:
            stream = load_problems(source, fields=self.fields, answers=False)
            for number, problem in enumerate(stream, start=1):
                name = problem.external_id or f"no. {number}"
                told = words(problem.text)
                label = Path(source).name
                found.append(Item(label, name, problem.text, told, numbers(told)))
        return tuple(found)

    def parameters(self) -> dict[str, Any]:
        """With the benchmarks by content: a changed file is another filter, a moved one is not."""
        texts = hashlib.sha256("\0".join(item.text for item in self.items).encode())
        files = dict(Counter(item.benchmark for item in self.items))
        return {
            **self.model_dump(mode="json", exclude={"name", "examples", "benchmarks", "fields"}),
            "benchmarks": files,
            "content": texts.hexdigest(),
        }

    def sieve(self, context: Context) -> Sieve:
        return _Compared(self)


@dataclass
class _Compared:
    """Holds the benchmarks, the words of all problems with their frequencies, 32 bytes of each
    distinct problem, and what was decided about it."""

    filter: Decontaminate
    surveys: bool = True
    seen: set[bytes] = field(default_factory=set)
    frequency: Counter[str] = field(default_factory=Counter)  # stem -> texts that have it
    common: Counter[str] = field(default_factory=Counter)  # n-gram of an item -> problems with it
    decided: dict[bytes, Decision] = field(default_factory=dict)

    def __post_init__(self) -> None:
        items, shortest = self.filter.items, self.filter.min_words
        self.exact: dict[tuple[str, ...], Item] = {}
        self.grams: dict[str, list[int]] = defaultdict(list)  # n-gram -> items that have it
        for number, item in enumerate(items):
            self.exact.setdefault(item.words, item)
            self.frequency.update(set(stems(item.words)))
            if len(item.words) >= max(self.filter.n, shortest):
                for gram in set(grams(item.words, self.filter.n)):
                    self.grams[gram].append(number)
        self.long = [i for i, item in enumerate(items) if len(item.words) >= shortest]
        self.index: _Index | None = None

    def survey(self, rows: Sequence[Row]) -> None:
        for row in rows:
            key = bytes.fromhex(row.problem_key)
            if key in self.seen:
                continue
            self.seen.add(key)
            found = words(row.problem)
            self.frequency.update(set(stems(found)))
            self.common.update(self.grams.keys() & set(grams(found, self.filter.n)))

    def decide(self, rows: Sequence[Row]) -> list[Decision]:
        keys = [bytes.fromhex(row.problem_key) for row in rows]
        new = {
            key: words(row.problem)
            for key, row in zip(keys, rows, strict=True)
            if key not in self.decided
        }
        near = self._near(list(new.values()))
        for (key, found), candidates in zip(new.items(), near, strict=True):
            self.decided[key] = self._decision(found, candidates)
        return [self.decided[key] for key in keys]

    def _decision(self, found: tuple[str, ...], near: Sequence[tuple[float, int]]) -> Decision:
        same = self.exact.get(found)
        if same is not None and found:
            return _hit("exact", same, 1.0, " ".join(found))
        shared, templates = self._shared(found)
        told = numbers(found)
        for item, coverage, span in shared:
            # It may stand inside a longer problem: what counts is that all of its numbers do.
            if coverage >= self.filter.coverage and item.numbers <= told:
                return _hit("ngram", item, coverage, span)
        for score, number in near:
            item = self.filter.items[number]
            few = sum(float(number) > TELLING for number in item.numbers) < FEW
            least = self.filter.near_few if few else self.filter.near
            if score >= least and agreement(told, item.numbers) >= self.filter.same_numbers:
                return _hit("near", item, score, _common_run(found, item.words))
        passed_over = {"template_runs": templates} if templates else {}
        closest = self._closest(near)
        return Decision(True, "in no benchmark", {**passed_over, **closest})

    def _shared(self, found: tuple[str, ...]) -> tuple[list[tuple[Item, float, str]], int]:
        """Items with n-grams in common: (item, share of its words in them, the longest run)."""
        hits: dict[int, list[int]] = defaultdict(list)
        templates = 0
        n = self.filter.n
        for position, gram in enumerate(grams(found, n)):
            items = self.grams.get(gram, ())
            if items and max(len(items), self.common[gram]) > self.filter.template:
                templates += 1
                continue
            for number in items:
                hits[number].append(position)
        ranked = []
        for number, positions in hits.items():
            covered = len({p + i for p in positions for i in range(n)})
            item = self.filter.items[number]
            coverage = min(covered / len(item.words), 1.0)
            ranked.append((item, coverage, _run(found, positions, n)))
        return sorted(ranked, key=lambda one: -one[1]), templates

    def _near(self, texts: Sequence[tuple[str, ...]]) -> list[list[tuple[float, int]]]:
        if not texts or not self.long:
            return [[] for _ in texts]
        if self.index is None:
            items = [self.filter.items[i].words for i in self.long]
            self.index = _Index(items, self.frequency, len(self.seen) + len(self.filter.items))
        found = self.index.above(texts, min(self.filter.near, self.filter.near_few))
        return [[(score, self.long[i]) for score, i in pairs] for pairs in found]

    def _closest(self, near: Sequence[tuple[float, int]]) -> dict[str, Any]:
        """The neighbour that has other numbers, if there is one."""
        if not near:
            return {}
        item = self.filter.items[near[0][1]]
        return {"other_numbers": {"benchmark": item.benchmark, "item": item.name,
                                  "score": round(near[0][0], 4)}}  # fmt: skip


class _Index:
    """Items by their words, weighted by rarity: cosines of many texts at once."""

    def __init__(
        self, items: Sequence[tuple[str, ...]], frequency: Mapping[str, int], n_texts: int
    ) -> None:
        from scipy.sparse import csr_array  # here: it would slow the start of every command

        self._array = csr_array
        self._weights = {w: 1 + math.log((1 + n_texts) / (1 + n)) for w, n in frequency.items()}
        self._numbers = {word: i for i, word in enumerate(self._weights)}
        self._items = self._matrix(items)

    def above(
        self, texts: Iterable[tuple[str, ...]], least: float
    ) -> list[list[tuple[float, int]]]:
        """Of each text, the items of at least that cosine, best first."""
        scores = (self._matrix(list(texts)) @ self._items.T).tocsr()
        found = []
        for row in range(scores.shape[0]):
            part = slice(scores.indptr[row], scores.indptr[row + 1])
            pairs = zip(scores.data[part].tolist(), scores.indices[part].tolist(), strict=True)
            found.append(sorted((p for p in pairs if p[0] >= least), key=lambda p: (-p[0], p[1])))
        return found

    def _matrix(self, texts: Sequence[tuple[str, ...]]) -> Any:
        """[texts, words], float64, rows of length one."""
        data: list[float] = []
        columns: list[int] = []
        ends = [0]
        for text in texts:
            counted = [(w, n) for w, n in stems(text).items() if w in self._numbers]
            values = [(1 + math.log(n)) * self._weights[w] for w, n in counted]
            length = math.sqrt(sum(v * v for v in values)) or 1.0
            data += [v / length for v in values]
            columns += [self._numbers[w] for w, _ in counted]
            ends.append(len(data))
        shape = (len(texts), len(self._numbers))
        return self._array((data, columns, ends), shape=shape)


def _is_here(folder: Path, name: str) -> bool:
    """Whether it is a path (FOLDER:SPLIT among them) rather than a dataset of the Hub."""
    head, colon, _ = name.rpartition(":")
    return (folder / name).exists() or bool(colon and (folder / head).is_dir())


def _hit(how: str, item: Item, score: float, span: str) -> Decision:
    evidence = {
        "method": how,
        "benchmark": item.benchmark,
        "item": item.name,
        "score": round(score, 4),
        "span": span[:EXCERPT],
        "text": item.text[:EXCERPT],
    }
    said = {"exact": "is", "ngram": "shares a run of words with", "near": "is a rewording of"}[how]
    return Decision(False, f"{said} {item.name} of {item.benchmark} ({score:.2f})", evidence)


def _run(found: Sequence[str], positions: Sequence[int], n: int) -> str:
    """The longest stretch of words that the n-grams at `positions` (ascending) cover."""
    start, end = best = positions[0], positions[0] + n
    for position in positions[1:]:
        start, end = (start, position + n) if position <= end else (position, position + n)
        best = max(best, (start, end), key=lambda run: run[1] - run[0])
    return " ".join(found[best[0] : best[1]])


def _common_run(one: Sequence[str], other: Sequence[str]) -> str:
    matcher = SequenceMatcher(None, one, other, autojunk=False)
    match = matcher.find_longest_match()
    return " ".join(one[match.a : match.a + match.size])
