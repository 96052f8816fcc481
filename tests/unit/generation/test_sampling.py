"""Choice of tokens against the definition, written out over Python numbers."""

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_m1.generation import sampling as module
from megatron_m1.generation.requests import Sampling
from megatron_m1.generation.sampling import SamplingPlan, uniform

LOGITS = torch.tensor([[0.3, 2.0, -1.0, 2.0, 1.1], [-4.0, 0.0, 0.5, 0.25, 0.1]])


class OneRank:
    """What the sampler asks of a process group of one."""

    def size(self) -> int:
        return 1

    def rank(self) -> int:
        return 0


def sample(logits: Tensor, numbers: Tensor, rows: list[Sampling], group: Any) -> Tensor:
    return module.sample(logits, numbers, SamplingPlan(rows, logits.device), group)


def draw(logits: Tensor, numbers: Tensor, temperature: float = 1.0, top_p: float = 1.0, top_k: int = 0) -> Tensor:
    how = Sampling(max_new_tokens=1, temperature=temperature, top_p=top_p, top_k=top_k)
    return sample(logits, numbers, [how] * len(logits), OneRank())


def allowed(row: list[float], temperature: float, top_p: float, top_k: int) -> dict[int, float]:
    """Token -> probability after temperature, top-k and top-p, by sorting and adding up."""
    order = sorted(range(len(row)), key=lambda t: (-row[t], t))[: top_k or None]
    weights = {token: math.exp((row[token] - max(row)) / temperature) for token in order}
    total = sum(weights.values())
    kept, mass = {}, 0.0
    for token in order:
        kept[token] = weights[token] / total
        mass += kept[token]
        if mass >= top_p:
            break
    return {token: p / mass for token, p in kept.items()}


CASES = [(1.0, 1.0, 0), (0.7, 0.8, 0), (1.5, 0.5, 0), (1.0, 0.01, 0), (3.0, 0.999, 0), (1.0, 1.0, 3), (2.0, 0.6, 4)]


@pytest.mark.parametrize("candidates", [2, 256])
@pytest.mark.parametrize(("temperature", "top_p", "top_k"), CASES)
def test_draws_have_the_distribution(temperature, top_p, top_k, candidates, monkeypatch):
    """With two candidates to begin with, the sampler has to come back for more."""
    monkeypatch.setattr(module, "CANDIDATES", candidates)
    draws = 20_000
    numbers = (torch.arange(draws, dtype=torch.float64) + 0.5) / draws
    for row in LOGITS:
        tokens = draw(row.expand(draws, -1), numbers, temperature, top_p, top_k)
        shares = torch.bincount(tokens, minlength=len(row)) / draws
        expected = allowed(row.tolist(), temperature, top_p, top_k)
        assert {t for t, share in enumerate(shares.tolist()) if share} == set(expected)
        assert all(abs(shares[t].item() - p) < 2 / draws for t, p in expected.items())


def test_temperature_zero_takes_the_first_of_the_likeliest():
    assert draw(LOGITS, torch.tensor([0.99, 0.99]), temperature=0.0).tolist() == [1, 2]


@pytest.mark.parametrize(("top_p", "top_k"), [(1.0, 0), (0.9, 0), (1.0, 2)])
def test_low_temperature_is_finite_and_greedy(top_p, top_k):
    distinct = LOGITS + torch.arange(5) * 1e-3
    numbers = torch.tensor([0.5, 0.999999], dtype=torch.float64)
    for temperature in (1e-30, 1e-50):
        assert draw(distinct, numbers, temperature, top_p, top_k).tolist() == distinct.argmax(-1).tolist()


@pytest.mark.parametrize(("top_p", "largest"), [(0.1, (99, 102)), (1.0, (999, 1000))])
def test_largest_number_stays_inside_the_cut(top_p, largest):
    numbers = torch.tensor([1 - 2**-53], dtype=torch.float64)
    assert draw(torch.zeros(1, 1000), numbers, top_p=top_p).item() in range(*largest)


def test_equals_at_the_end_of_the_candidates_keep_the_lower_id():
    """topk may return any of equals; the cut must not depend on which."""
    logits = torch.zeros(1, 4000)
    logits[0, 3999] = 1.0
    numbers = torch.tensor([1 - 1e-9], dtype=torch.float64)
    assert draw(logits, numbers, top_k=3).item() == 1


def mixed_rows() -> tuple[Tensor, Tensor, list[Sampling]]:
    torch.manual_seed(0)
    kinds = [(0.0, 1.0, 0), *CASES]
    rows = [Sampling(max_new_tokens=1, temperature=t, top_p=p, top_k=k) for t, p, k in kinds for _ in range(12)]
    logits = torch.randn(len(rows), 1200) * 2
    logits[::5] = logits[::5].round()  # many equals
    return logits, torch.rand(len(rows), dtype=torch.float64), rows


def test_rows_do_not_influence_each_other():
    logits, numbers, rows = mixed_rows()
    together = sample(logits, numbers, rows, OneRank())
    alone = [sample(logits[i : i + 1], numbers[i : i + 1], rows[i : i + 1], OneRank()).item() for i in range(len(rows))]
    assert together.tolist() == alone


def sample_a_slice(rank: int, world: int, candidates: int) -> list[int]:
    module.CANDIDATES = candidates
    logits, numbers, rows = mixed_rows()
    return sample(logits.chunk(world, dim=-1)[rank].contiguous(), numbers, rows, dist.group.WORLD).tolist()


@pytest.mark.parametrize("candidates", [2, 256])
def test_a_vocabulary_in_slices_gives_the_same_tokens(ranks, candidates):
    logits, numbers, rows = mixed_rows()
    want = sample(logits, numbers, rows, OneRank()).tolist()
    assert ranks(4, sample_a_slice, candidates) == [want] * 4


def test_random_numbers_are_uniform_and_depend_on_seed_and_position():
    numbers = [uniform(seed, position) for seed in range(40) for position in range(50)]
    assert len(set(numbers)) == 2000 and numbers[:50] == [uniform(0, position) for position in range(50)]
    ordered = sorted(numbers)
    assert ordered[0] >= 0 and ordered[-1] < 1
    assert max(abs(x - (i + 0.5) / 2000) for i, x in enumerate(ordered)) < 0.04
    assert abs(sum((a - 0.5) * (b - 0.5) for a, b in pairwise(numbers)) / 2000) < 0.006
