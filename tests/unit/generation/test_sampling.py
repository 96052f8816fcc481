"""Choice of tokens against the definition, written out over Python numbers."""

import math

import pytest
import torch

from megatron_m1.generation.sampling import request_generator, sample

LOGITS = torch.tensor([[0.3, 2.0, -1.0, 2.0, 1.1], [-4.0, 0.0, 0.5, 0.25, 0.1]])


def allowed(row: list[float], temperature: float, top_p: float) -> dict[int, float]:
    """Token -> probability after temperature and top-p, by sorting and adding up."""
    weights = [math.exp((x - max(row)) / temperature) for x in row]
    probabilities = [w / sum(weights) for w in weights]
    kept, mass = {}, 0.0
    for token in sorted(range(len(row)), key=lambda t: (-probabilities[t], t)):
        kept[token] = probabilities[token]
        mass += probabilities[token]
        if mass >= top_p:
            break
    return {token: p / mass for token, p in kept.items()}


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 0.8), (1.5, 0.5), (1.0, 0.01), (3.0, 0.999)])
def test_draws_have_the_distribution(temperature, top_p):
    draws = 20_000
    uniform = (torch.arange(draws, dtype=torch.float64) + 0.5) / draws
    for row in LOGITS:
        tokens = sample(row.expand(draws, -1), uniform, temperature=temperature, top_p=top_p)
        shares = torch.bincount(tokens, minlength=len(row)) / draws
        expected = allowed(row.tolist(), temperature, top_p)
        assert {t for t, share in enumerate(shares.tolist()) if share} == set(expected)
        assert all(abs(shares[t].item() - p) < 2 / draws for t, p in expected.items())


def test_temperature_zero_takes_the_first_of_the_likeliest():
    assert sample(LOGITS, torch.tensor([0.99, 0.99]), temperature=0.0, top_p=1.0).tolist() == [1, 2]


def test_low_temperature_is_finite_and_greedy():
    distinct = LOGITS + torch.arange(5) * 1e-3
    tokens = sample(distinct, torch.tensor([0.5, 0.999999]), temperature=1e-30, top_p=0.9)
    assert tokens.tolist() == distinct.argmax(-1).tolist()


def test_largest_uniform_number_stays_inside_the_cut():
    logits = torch.zeros(1, 1000)
    token = sample(logits, torch.tensor([1 - 2**-53], dtype=torch.float64), temperature=1.0, top_p=0.1)
    assert token.item() in range(99, 102)


def test_rows_do_not_influence_each_other():
    torch.manual_seed(0)
    logits, uniform = torch.randn(9, 50), torch.rand(9, dtype=torch.float64)
    together = sample(logits, uniform, temperature=0.9, top_p=0.9)
    alone = [sample(logits[i : i + 1], uniform[i : i + 1], temperature=0.9, top_p=0.9).item() for i in range(9)]
    assert together.tolist() == alone


def test_generators_depend_on_seed_and_index():
    def first(seed: int, index: int) -> float:
        return torch.rand(1, generator=request_generator(seed, index)).item()

    assert first(3, 5) == first(3, 5)
    assert len({first(seed, index) for seed in range(4) for index in range(4)}) == 16
