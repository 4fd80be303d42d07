"""Decontamination: copies, embedded copies and rewordings fall with evidence; neighbours stay."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest

from shared.errors import InputError
from tests.curated import world
from tirgen.curation import chain
from tirgen.curation.base import Decision, Example, Given, OfExample
from tirgen.curation.decontaminate import Decontaminate

# A benchmark of our own, with rewordings as a person would write them.
ITEMS = {
    "bus": "A bus leaves the depot with 18 passengers. At the first stop 7 people get off and 12 "
    "get on. At the second stop half of the passengers get off. How many are left on the bus?",
    "garden": "Farmer Ruth plants 14 rows of carrots with 23 carrots in each row. Rabbits eat 57 "
    "of the carrots. She sells the rest in bunches of 5. How many bunches can she sell?",
    "triangle": r"Let $ABC$ be a triangle with $AB = 13$, $BC = 14$ and $CA = 15$. Find the radius "
    r"of the circle inscribed in triangle $ABC$.",
    "polynomial": r"The polynomial $x^3 - 6x^2 + kx - 24$ has three positive integer roots that "
    r"form an arithmetic sequence with difference $9$. Find $k$.",
    "train": "A train travels 240 km at a constant speed of 80 km per hour, stops for 25 minutes "
    "and then goes on for another 90 km at 60 km per hour. How long does the trip take?",
}
REWORDED = {
    "bus": "There are 18 passengers on a bus when it leaves the depot. Seven people get off at the "
    "first stop, and 12 get on. Half of all passengers get off at the second stop. How many "
    "passengers remain on the bus?",
    "garden": "Ruth is a farmer who plants carrots: 14 rows, each with 23 carrots. 57 carrots are "
    "eaten by rabbits, and the rest is sold in bunches of five. What number of bunches can Ruth "
    "sell?",
    "triangle": r"In triangle $ABC$ the sides are $AB=13$, $BC=14$, $CA=15$. What is the radius of "
    r"its inscribed circle?",
    "train": "At a constant speed of 80 km per hour a train travels 240 km. It then stops for 25 "
    "minutes before it goes on at 60 km per hour for another 90 km. How long is the trip?",
}
BOILERPLATE = (
    " The answer can be written as m/n where m and n are relatively prime positive integers; give "
    "m + n."
)

Decide = Callable[[list[str]], list[Decision]]


def benchmark(path: Path, items: dict[str, str]) -> str:
    rows = [{"id": name, "problem": text} for name, text in items.items()]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def decided(filter: Decontaminate, problems: list[str]) -> list[Decision]:
    rows = [Given(problem=text).row(i) for i, text in enumerate(problems)]
    sieve = filter.sieve(OfExample(Example(rows=(Given(),))))
    for start in range(0, len(rows), 50):
        sieve.survey(rows[start : start + 50])
    return [d for start in range(0, len(rows), 50) for d in sieve.decide(rows[start : start + 50])]


@pytest.fixture
def against(tmp_path: Path) -> Callable[..., Decontaminate]:
    def make(items: dict[str, str] = ITEMS, **keys: object) -> Decontaminate:
        source = benchmark(tmp_path / "bench.jsonl", items)
        return Decontaminate.model_validate({"benchmarks": [source], **keys})

    return make


Against = Callable[..., Decontaminate]
CLEAN = [one.text for one in world(200)]


def other_numbers(text: str, rng: Random) -> str:
    return re.sub(r"\d+", lambda match: str(int(match[0]) + rng.randint(1, 9)), text)


# ---- what falls ---------------------------------------------------------------------------------


def test_a_copy_falls_whatever_its_typesetting(against: Against) -> None:
    copies = [
        ITEMS["bus"].upper().replace(". ", ".\n\n"),
        r"Let \(ABC\) be a triangle with \(AB=13\), \(BC=14\), and \(CA=15\). Find the radius of "
        r"the circle inscribed in triangle \(ABC\).",
    ]
    found = decided(against(), [*CLEAN, copies[0]])[-1]
    assert found.passed is False
    assert {k: found.evidence[k] for k in ("method", "benchmark", "item", "score")} == {
        "method": "exact", "benchmark": "bench.jsonl", "item": "bus", "score": 1.0,
    }  # fmt: skip
    assert found.evidence["span"].startswith("a bus leaves the depot with 18 passengers")
    assert found.evidence["text"] == ITEMS["bus"]
    assert decided(against(), [*CLEAN, copies[1]])[-1].passed is False


def test_a_copy_inside_a_longer_problem_falls_with_the_span(against: Against) -> None:
    longer = f"You are a careful tutor. Solve this for 3 of your pupils: {ITEMS['garden']} Explain."
    found = decided(against(), [*CLEAN, longer])[-1]
    assert (found.passed, found.evidence["method"], found.evidence["item"]) == (
        False, "ngram", "garden",
    )  # fmt: skip
    assert found.evidence["score"] == 1.0
    assert "14 rows of carrots with 23 carrots in each row" in found.evidence["span"]


@pytest.mark.parametrize("name", REWORDED)
def test_a_rewording_falls_with_its_score(against: Against, name: str) -> None:
    found = decided(against(), [*CLEAN, REWORDED[name]])[-1]
    assert found.passed is False
    assert (found.evidence["method"], found.evidence["item"]) == ("near", name)
    assert found.evidence["score"] >= 0.7
    assert found.evidence["span"], "the longest run of words that both have"


def test_all_trajectories_of_a_contaminated_problem_fall(against: Against) -> None:
    found = decided(against(), [ITEMS["bus"], *CLEAN, ITEMS["bus"]])
    assert found[0] == found[-1]
    assert found[0].passed is False


# ---- what stays ---------------------------------------------------------------------------------


def test_the_template_of_an_item_with_other_numbers_stays(against: Against) -> None:
    rng = Random(1)
    neighbours = [other_numbers(text, rng) for text in (*ITEMS.values(), *REWORDED.values())]
    found = decided(against(), [*CLEAN, *neighbours])
    assert [d.passed for d in found] == [True] * len(found)
    named = [d.evidence["other_numbers"]["item"] for d in found[-len(neighbours) :]
             if "other_numbers" in d.evidence]  # fmt: skip
    assert len(named) >= len(ITEMS), "they were seen, and why they stay is written down"


def test_boilerplate_that_many_problems_share_is_no_contamination(against: Against) -> None:
    """With the control: where it is rare, the same run of words is one."""
    items = {"dice": "Some dice are thrown." + BOILERPLATE}
    clean = [text + BOILERPLATE for text in CLEAN[:30]]
    loose = {"near": 1, "near_few": 1, "coverage": 0.3}
    found = decided(against(items, **loose), clean)
    assert all(d.passed and d.evidence["template_runs"] > 0 for d in found)
    assert not any(d.passed for d in decided(against(items, **loose), clean[:5]))
    assert not any(d.passed for d in decided(against(items, template=30, **loose), clean))


def test_short_items_are_compared_exactly_only(against: Against) -> None:
    items = {"short": "Compute 17 + 28."}
    found = decided(against(items), ["Compute 28 + 17.", "Compute $17+28$", "Compute 17 * 28."])
    assert [d.passed for d in found] == [True, False, True]


def test_of_nanos_world_only_true_copies_fall(tmp_path: Path) -> None:
    """Half of 400 problems of 18 templates are the benchmark, the other half are its neighbours."""
    made = world(400, seed=5)
    items = {str(i): one.text for i, one in enumerate(made[:200])}
    filter = Decontaminate(benchmarks=(benchmark(tmp_path / "world.jsonl", items),))
    found = decided(filter, [one.text for one in (*made[200:], *made[:200])])
    assert not any(d.passed for d in found[200:])
    answers = {str(i): one.answer for i, one in enumerate(made)}
    wrong = [
        i
        for i, d in enumerate(found[:200], start=200)
        if not d.passed and answers[d.evidence["item"]] != answers[str(i)]
    ]
    assert len(wrong) <= 4, "what falls of the neighbours is the same question in other words"


# ---- files --------------------------------------------------------------------------------------


def test_a_benchmark_that_cannot_be_read_fails_before_anything_is_done(tmp_path: Path) -> None:
    text = '[[filters]]\nfilter = "decontaminate"\nbenchmarks = ["bench.jsonl"]'
    (tmp_path / "mine.toml").write_text(text)
    with pytest.raises(InputError, match="no such file"):
        chain.load(tmp_path / "mine.toml")
    (tmp_path / "bench.jsonl").write_text('{"id": "a", "question_text": "What is it?"}\n')
    with pytest.raises(InputError, match="line 1") as caught:
        chain.load(tmp_path / "mine.toml")
    assert "question_text" in str(caught.value)


def test_its_version_is_of_the_benchmarks_content(tmp_path: Path) -> None:
    """Columns of other names are mapped; moving the file changes nothing, a changed item does."""

    def version(folder: str, question: str) -> str:
        home = tmp_path / folder
        home.mkdir()
        (home / "bench.jsonl").write_text(json.dumps({"q": question}))
        (home / "mine.toml").write_text(
            '[[filters]]\nfilter = "decontaminate"\nbenchmarks = ["bench.jsonl"]\n'
            'fields = {problem = "q"}'
        )
        return chain.load(home / "mine.toml").filters[0].version(0)

    assert version("a", "What is it?") == version("b", "What is it?")
    assert version("c", "What was it?") != version("d", "What is it?")
