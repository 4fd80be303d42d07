"""What the samples of one problem agree on: answers in clusters by equality, and the largest.

Majority voting over strings splits 1/2 from 0.5 and loses votes. Here two samples vote for the same
answer where the grader calls their answers equal; what it cannot decide joins nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations


@dataclass(frozen=True, slots=True)
class Cluster:
    """Samples with equal answers. `answer`: their commonest spelling. `samples`: indices, sorted.

    `spellings`: every way in which they write it, the commonest first.
    """

    answer: str
    spellings: tuple[str, ...]
    samples: tuple[int, ...]

    @property
    def votes(self) -> int:
        return len(self.samples)


@dataclass(frozen=True, slots=True)
class Consensus:
    """`clusters`: most votes first. `n_samples` counts those without an answer too."""

    clusters: tuple[Cluster, ...]
    n_samples: int

    @property
    def n_answers(self) -> int:
        return sum(cluster.votes for cluster in self.clusters)

    @property
    def leaders(self) -> tuple[Cluster, ...]:
        """The clusters with most votes: one, or several where they tie, or none without answers."""
        return tuple(c for c in self.clusters if c.votes == self.clusters[0].votes)

    @property
    def majority(self) -> Cluster | None:
        """The cluster with most votes; None where there is a tie or no answer."""
        return self.leaders[0] if len(self.leaders) == 1 else None

    @property
    def share(self) -> float | None:
        """Votes of the leader, or of each that ties, per sample; None without any answer."""
        return self.clusters[0].votes / self.n_samples if self.clusters else None


def consensus(answers: Sequence[str | None], equal: Callable[[str, str], bool]) -> Consensus:
    """Cluster the samples' answers; None and blank are no answer.

    Clusters are the transitive closure of `equal` (union-find), hence the same for any order of the
    samples. Equal texts are never compared, and neither are two that are joined already: at most
    one comparison for each pair of different texts.
    """
    samples: dict[str, list[int]] = {}
    for i, answer in enumerate(answers):
        if answer is not None and answer.strip():
            samples.setdefault(answer.strip(), []).append(i)

    parent = {text: text for text in samples}

    def root(text: str) -> str:
        while parent[text] != text:
            parent[text] = parent[parent[text]]  # path halving
            text = parent[text]
        return text

    for one, other in combinations(sorted(samples), 2):
        if root(one) != root(other) and equal(one, other):
            parent[root(other)] = root(one)

    members: dict[str, list[str]] = {}
    for text in samples:
        members.setdefault(root(text), []).append(text)
    clusters = []
    for texts in members.values():
        texts.sort(key=lambda text: (-len(samples[text]), len(text), text))
        found = sorted(i for text in texts for i in samples[text])
        clusters.append(Cluster(texts[0], tuple(texts), tuple(found)))
    clusters.sort(key=lambda cluster: (-cluster.votes, cluster.answer))
    return Consensus(tuple(clusters), len(answers))
