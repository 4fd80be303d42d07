"""Filters by themselves: each does what its examples say, draws are exact and seeded."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

from shared.errors import ConfigError
from shared.nano.world import NAMES
from tests.curated import solution, world
from tirgen.curation import chain
from tirgen.curation.base import Example, Filter, Given, OfExample, Row, failures
from tirgen.curation.population import Balance, OnePerProblem
from tirgen.curation.words import agreement, grams, numbers, words

ALL = Path(__file__).parent.parent / "filters.toml"
CALL = "```python\nf({0})\n```\n```output\n{0}\n```\n"


def kept(one: Filter, rows: list[Row], seed: int = 0) -> list[int]:
    """Ids that pass, decided in batches of seven: batches must not matter."""
    sieve = one.sieve(OfExample(Example(rows=(Given(),)), seed))
    batches = [rows[i : i + 7] for i in range(0, len(rows), 7)]
    if sieve.surveys:
        for batch in batches:
            sieve.survey(batch)
    decided = [(r, d) for batch in batches for r, d in zip(batch, sieve.decide(batch), strict=True)]
    return [row.id for row, decision in decided if decision.passed]


# ---- examples -----------------------------------------------------------------------------------


@pytest.mark.parametrize("source", [*chain.PRESETS, ALL])
def test_every_filter_does_what_its_own_examples_say(source: str | Path) -> None:
    filters = chain.load(source).filters
    assert [failure for one in filters for failure in failures(one)] == []
    for one in filters:
        given = [row for example in one.examples for row in example.rows]
        drawn = any(example.n_kept is not None for example in one.examples)
        assert drawn or {row.keep for row in given} == {True, False}, one.called


def test_every_kind_of_filter_has_examples() -> None:
    kinds = {one.KIND for one in chain.load(ALL).filters}
    assert kinds | {"decontaminate"} == set(chain.FILTERS)


def test_an_example_that_is_not_met_is_reported() -> None:
    """The control: examples that say the opposite fail, each row by its own line."""
    text = ALL.read_text().replace("keep = true", "keep = X").replace("keep = false", "keep = true")
    turned = chain.parse(text.replace("keep = X", "keep = false"), "turned", "test")
    for one in turned.filters:
        rows = [row for example in one.examples for row in example.rows if row.keep is not None]
        assert len(list(failures(one))) == len(rows)


def test_a_wrong_count_of_kept_rows_is_reported() -> None:
    text = '[[filters]]\nfilter="answer"\nexamples=[{rows=[{}], n_kept=0}]'
    (one,) = chain.parse(text, "x", "x").filters
    assert list(failures(one)) == ["answer, example 1: 0 rows should be kept, 1 are"]


# ---- files --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("filters = 3", ["there is no [[filters]]"]),
        ("[[filter]]", ["unknown key 'filter'"]),
        ("[[filters]]", ['it has no filter = "KIND"', "x.toml, filter 1"]),
        ('[[filters]]\nfilter="lenght"', ["no filter 'lenght'", "did you mean 'length'"]),
        ('[[filters]]\nfilter="length"\nmin_token=3', ["min_token: unknown key", "'min_tokens'"]),
        ('[[filters]]\nfilter="length"\nmin_tokens=-1', ["min_tokens", "greater than or equal"]),
        ('[[filters]]\nfilter="answer"\n[[filters]]\nfilter="answer"', ["two filters", "name ="]),
        ("x = [", ["Not valid TOML"]),
        ('[[filters]]\nfilter="decontaminate"', ["benchmarks: Field required"]),
    ],
)
def test_a_chain_that_is_not_valid_is_refused_with_place_and_remedy(
    tmp_path: Path, text: str, said: list[str]
) -> None:
    path = tmp_path / "x.toml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        chain.load(path)
    assert all(part in str(caught.value) for part in said)


def test_a_chain_that_is_not_there_names_the_presets() -> None:
    with pytest.raises(ConfigError, match="did you mean 'paper'"):
        chain.load("papers")


def test_versions_follow_what_decides_and_nothing_else() -> None:
    """Parameters and, where something is drawn, the seed; neither examples nor names."""

    def version(text: str, seed: int = 0) -> str:
        (one,) = chain.parse(f"[[filters]]\n{text}", "x", "x").filters
        return one.version(seed)

    assert version('filter="length"') == version('filter="length"\nname="other"', seed=1)
    assert version('filter="length"') == version('filter="length"\nexamples=[{rows=[{}]}]')
    assert version('filter="length"') != version('filter="length"\nmin_tokens=1')
    assert version('filter="balance"') != version('filter="balance"', seed=1)


# ---- populations --------------------------------------------------------------------------------


def stratum(calls: int, n: int) -> list[Row]:
    text = "".join(CALL.format(i) for i in range(calls))
    return [Given(text=f"{calls}/{i}\n{text}").row(100 * calls + i) for i in range(n)]


def test_balance_keeps_exact_shares_and_caps_drawn_by_the_seed() -> None:
    rows = [*stratum(1, 41), *stratum(2, 9), *stratum(3, 20), *stratum(4, 5), *stratum(5, 6)]
    one = Balance(last=4, share={1: 0.5, 3: 0.25}, cap={3: 4, 4: 7})
    ids = kept(one, rows)
    # Half of 41, rounded up; all; the cap below the share; 4 and 5 calls are one stratum.
    by_calls = Counter(min(row.n_calls, 4) for row in rows if row.id in ids)
    assert by_calls == {1: 21, 2: 9, 3: 4, 4: 7}
    assert kept(one, rows) == ids
    assert sorted(kept(one, rows[::-1])) == ids, "the order of the candidates does not matter"
    assert kept(one, rows, seed=1) != ids


def test_balance_is_exact_among_equal_trajectories() -> None:
    """Copies draw the same number: a threshold alone would keep all of them or none."""
    rows = [Given(text=CALL.format(1)).row(1)] * 10
    assert len(kept(Balance(share={1: 0.3}), rows)) == 3


@pytest.mark.parametrize(
    ("prefer", "expected"),
    [("first", 1), ("shortest", 3), ("longest", 1), ("fewest_calls", 2), ("most_calls", 3)],
)
def test_one_trajectory_stands_for_its_problem(prefer: str, expected: int) -> None:
    """Of 1 (two calls, long), 2 (one call, long) and 3 (two calls, short), by policy."""
    two, one = CALL.format(1) + CALL.format(2), CALL.format(1)
    rows = [
        Given(text=two, n_tokens=90).row(1),
        Given(text=one, n_tokens=80).row(2),
        Given(text=two + "!", n_tokens=20).row(3),
        Given(problem="Another.", text=one).row(4),
    ]
    filter = OnePerProblem.model_validate({"prefer": prefer})
    assert kept(filter, rows) == [expected, 4]
    assert len(kept(filter.model_copy(update={"keep": 2}), rows)) == 3


def test_random_choice_is_seeded_and_near_even() -> None:
    rows = [Given(text=f"{i}", problem=f"{i % 200}").row(i) for i in range(400)]
    filter = OnePerProblem(prefer="random")
    draws = [kept(filter, rows, seed) for seed in range(3)]
    assert draws[0] == kept(filter, rows, 0)
    assert all(len(ids) == 200 for ids in draws)
    assert len({tuple(ids) for ids in draws}) == 3
    assert all(60 < sum(id < 200 for id in ids) < 140 for ids in draws)


# ---- near-duplicates ----------------------------------------------------------------------------


def nameless(text: str) -> str:
    return re.sub("|".join(NAMES), "X", text)


def test_a_planted_near_duplicate_falls_and_its_template_stays() -> None:
    """Among 300 problems of 18 templates, which differ by numbers and names, one is a rewording."""
    made = world(300)
    planted = made[17].text.replace("How many", "Exactly how many").replace("What is", "Find")
    assert planted != made[17].text
    rows = [solution(one).row(i) for i, one in enumerate(made)]
    rows.append(Given(problem=planted).row(1000))
    (one,) = chain.parse('[[filters]]\nfilter="near_duplicates"', "x", "x").filters
    sieve = one.sieve(OfExample(Example(rows=(Given(),))))
    decisions = sieve.decide(rows)
    assert decisions[-1].passed is False
    assert decisions[-1].evidence["trajectory"] == 17
    assert decisions[-1].evidence["pairs"][0]["score"] >= 0.7
    # Besides, only what differs by nothing but names.
    for problem, decision in zip(made, decisions, strict=False):
        if not decision.passed:
            assert nameless(problem.text) == nameless(made[decision.evidence["trajectory"]].text)


def test_near_duplicates_of_responses_and_of_problems_are_different_questions() -> None:
    said = "We count the pens and the books on the table and find that there are \\boxed{7}."
    rows = [Given(text=said).row(1), Given(text=said + " Yes.").row(2)]
    for of, ids in (("problem", [1, 2]), ("response", [1])):
        text = f'[[filters]]\nfilter="near_duplicates"\nof="{of}"'
        (one,) = chain.parse(text, "x", "x").filters
        assert kept(one, rows) == ids, "samples of one problem are no near-duplicate problems"


# ---- words --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (r"Compute $\dfrac{1}{2} + x^{2}$.", r"compute \[\frac{1}{2}+x^2\]"),
        ("He has 1,250 apples.", "he has  1250 APPLES"),
        (r"$\left( 3, 7 \right)$", "(3,7)"),
        ("three of twenty", "3 of 20"),
        ("ﬁve", "5"),
    ],
)
def test_typesetting_does_not_matter(one: str, other: str) -> None:
    assert words(one) == words(other)


def test_operators_and_numbers_matter() -> None:
    assert words("3 + 7") != words("3 - 7") != words("3 - 8")


def test_numbers_and_runs_of_words() -> None:
    found = words("2 pens, 2 books and 30.5 kg")
    assert numbers(found) == {"2": 2, "30.5": 1}
    assert agreement(numbers(found), numbers(words("2 of 30.5"))) == pytest.approx(2 / 3)
    assert grams(found, 3)[0] == "2 pens 2"
    assert grams(found, 99) == [" ".join(found)]
