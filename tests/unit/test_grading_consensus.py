"""Consensus: clusters by equality, the same for any order, and nobody joined who was not equal."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

from hypothesis import given
from hypothesis import strategies as st

from shared.grading.consensus import Consensus, consensus

Equal = Callable[[str, str], bool]


def by_value(one: str, other: str) -> bool:
    return Fraction(one) == Fraction(other)


def never(one: str, other: str) -> bool:
    return False


class Counting:
    """An equality that says which pairs it was asked for."""

    def __init__(self, equal: Equal) -> None:
        self.equal = equal
        self.asked: list[frozenset[str]] = []

    def __call__(self, one: str, other: str) -> bool:
        self.asked.append(frozenset((one, other)))
        return self.equal(one, other)


spellings = st.sampled_from(["1/2", "0.5", "2/4", "3", "3.0", "6/2", "7"])
samples = st.lists(st.none() | spellings, max_size=12)
edges = st.sets(st.frozensets(st.sampled_from("abcdef"), min_size=2, max_size=2))


def groups(found: Consensus, answers: list[str | None]) -> list[list[str | None]]:
    """The clusters' answers, without the samples' order."""
    return sorted(sorted(answers[i] or "" for i in c.samples) for c in found.clusters)  # type: ignore[misc]


def test_spellings_of_one_value_vote_together_where_strings_would_tie() -> None:
    answers = ["1/2", "0.5", "3", "3", "2/4", None]
    found = consensus(answers, by_value)
    assert [c.samples for c in found.clusters] == [(0, 1, 4), (2, 3)]
    assert found.majority is not None
    assert found.majority.answer == "0.5", "of equally common spellings the shortest, then by text"
    assert set(found.majority.spellings) == {"0.5", "1/2", "2/4"}
    assert found.share == 3 / 6, "a sample without an answer has a vote, and gives it to nobody"
    assert (found.n_answers, found.n_samples) == (5, 6)
    by_text = consensus(answers, never)
    assert by_text.majority is not None
    assert by_text.majority.answer == "3", "the control: strings elect another answer"


def test_a_tie_is_named_and_elects_nobody() -> None:
    found = consensus(["1", "2", "1", "2", "3"], by_value)
    assert [c.answer for c in found.leaders] == ["1", "2"]
    assert found.majority is None
    assert found.share == 2 / 5


def test_without_an_answer_there_is_no_consensus() -> None:
    for answers in ([], [None, None], ["", "  "]):
        found = consensus(answers, by_value)
        assert (found.clusters, found.leaders, found.majority, found.share) == ((), (), None, None)
        assert found.n_samples == len(answers)


@given(samples, st.randoms(use_true_random=False))
def test_the_order_of_the_samples_does_not_matter(
    answers: list[str | None], random: object
) -> None:
    shuffled = answers.copy()
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    one, other = consensus(answers, by_value), consensus(shuffled, by_value)
    assert groups(one, answers) == groups(other, shuffled)
    assert [c.answer for c in one.clusters] == [c.answer for c in other.clusters]
    assert one.share == other.share


@given(st.permutations("abcdef"), edges)
def test_clusters_are_the_transitive_closure_of_an_equality_that_is_not_transitive(
    answers: list[str], pairs: set[frozenset[str]]
) -> None:
    """The grader's equality need not be: 30 is 30 degrees, which is pi/6, which is not 30."""
    found = consensus(answers, lambda a, b: frozenset((a, b)) in pairs)
    reached = {text: {text} for text in answers}
    for _ in answers:
        for one, other in map(sorted, pairs):
            joined = reached[one] | reached[other]
            for text in joined:
                reached[text] = reached[text] | joined
    control = sorted({tuple(sorted(part)) for part in reached.values()})
    assert [tuple(part) for part in groups(found, list(answers))] == control


@given(samples)
def test_nobody_is_in_two_clusters_and_undecided_joins_nothing(answers: list[str | None]) -> None:
    found = consensus(answers, never)
    indices = [i for cluster in found.clusters for i in cluster.samples]
    assert sorted(indices) == [i for i, answer in enumerate(answers) if answer is not None]
    assert len(found.clusters) == len({answer for answer in answers if answer is not None})


@given(samples)
def test_equal_texts_are_not_compared_and_no_pair_is_compared_twice(
    answers: list[str | None],
) -> None:
    equal = Counting(by_value)
    consensus(answers, equal)
    assert len(equal.asked) == len(set(equal.asked))
    assert all(len(pair) == 2 for pair in equal.asked)


def test_those_who_are_joined_already_are_not_compared() -> None:
    equal = Counting(by_value)
    consensus(["3", "3.0", "6/2", "9/3"] * 5, equal)
    assert len(equal.asked) == 3, "not the 6 pairs of 4 texts, still less the 190 of 20 samples"
