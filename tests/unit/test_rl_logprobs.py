"""Log-probabilities by chunks: the same values and gradients as by a loop over tokens."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from rl.logprobs import token_logprobs

N, H, V = 23, 8, 17


def inputs() -> tuple[Tensor, nn.Linear, Tensor]:
    torch.manual_seed(0)
    head = nn.Linear(H, V)
    return torch.randn(N, H, requires_grad=True), head, torch.randint(0, V, (N,))


def by_loop(hidden: Tensor, head: nn.Linear, labels: Tensor, temperature: float) -> list[Tensor]:
    """One token and one symbol at a time, from the definition."""
    out = []
    for h, label in zip(hidden, labels, strict=True):
        scores = [(head.weight[v] @ h + head.bias[v]) / temperature for v in range(V)]
        out.append(scores[label] - torch.stack([s.exp() for s in scores]).sum().log())
    return out


@pytest.mark.parametrize("chunk", [1, 5, 23, 1024])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_values_and_gradients_are_those_of_the_loop(chunk: int, temperature: float) -> None:
    hidden, head, labels = inputs()
    slopes = torch.randn(N, generator=torch.Generator().manual_seed(1))
    wanted = [hidden, head.weight, head.bias]
    expected = torch.stack(by_loop(hidden, head, labels, temperature))
    expected_gradients = torch.autograd.grad((slopes * expected).sum(), wanted)
    got = token_logprobs(hidden, head, labels, temperature=temperature, chunk=chunk)
    gradients = torch.autograd.grad((slopes * got.logp_N).sum(), wanted)
    assert (got.logp_N - expected).abs().max() < 1e-5
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        assert (ours - theirs).abs().max() < 1e-5


def test_a_forgotten_temperature_would_be_seen() -> None:
    """Control: at 0.7 the tempered policy is another one."""
    hidden, head, labels = inputs()
    plain = token_logprobs(hidden, head, labels).logp_N
    tempered = token_logprobs(hidden, head, labels, temperature=0.7).logp_N
    assert (plain - tempered).abs().max() > 1e-2


def test_no_more_than_a_chunk_of_logits_exists_at_once() -> None:
    hidden, head, labels = inputs()
    sizes = []

    def counting(h: Tensor) -> Tensor:
        sizes.append(len(h))
        return head(h)

    token_logprobs(hidden, counting, labels, chunk=5).logp_N.sum().backward()
    assert sizes[:5] == [5, 5, 5, 5, 3]
    assert max(sizes) == 5
    assert len(sizes) == 10  # once more for the backward pass, and never stored


def test_a_bigram_table_gives_its_own_log_probabilities() -> None:
    """The token at t is predicted from t - 1 and from nothing else: any shift would show."""
    table = torch.randn(V, V, generator=torch.Generator().manual_seed(2)).log_softmax(-1)
    ids = torch.arange(N) * 5 % V
    states = torch.eye(V)[ids[:-1]]
    got = token_logprobs(states, lambda h: h @ table, ids[1:]).logp_N
    expected = [table[a, b].item() for a, b in pairwise(ids)]
    assert got.tolist() == pytest.approx(expected, abs=1e-6)


def test_entropy_of_uniform_and_of_certain() -> None:
    scores = torch.stack([torch.zeros(V), torch.eye(V)[3] * 1000])
    got = token_logprobs(scores, lambda h: h, torch.tensor([0, 3]))
    assert got.entropy_N.tolist() == pytest.approx([math.log(V), 0.0], abs=1e-6)
    assert got.logp_N.tolist() == pytest.approx([-math.log(V), 0.0], abs=1e-6)
    assert not got.entropy_N.requires_grad


def test_half_precision_is_normalised_in_full() -> None:
    """Probabilities of a bfloat16 head still sum to one."""
    hidden, head, _ = inputs()
    half, row = head.bfloat16(), hidden[:1].bfloat16().expand(V, H)
    got = token_logprobs(row, half, torch.arange(V))
    assert got.logp_N.dtype is torch.float32
    assert got.logp_N.exp().sum().item() == pytest.approx(1.0, abs=1e-5)


def test_no_tokens_give_no_loss_and_reach_the_model() -> None:
    hidden, head, labels = inputs()
    got = token_logprobs(hidden[:0], head, labels[:0])
    assert got.logp_N.shape == (0,)
    got.logp_N.sum().backward()
    assert hidden.grad is not None
    assert (hidden.grad == 0).all()
    assert head.weight.grad is not None
    assert (head.weight.grad == 0).all()
