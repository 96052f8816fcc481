import math

import numpy as np
import pytest
import torch

from megatron_m1.rl.identity import IdentityStats


def pair(n: int, seed: int = 0, scale: float = 1e-3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    rollout = -torch.rand(n, generator=g) * 4
    noise = torch.randn(n, generator=g) * scale * (torch.rand(n, generator=g) > 0.3)
    return rollout, rollout + noise, torch.rand(n, generator=g) > 0.2


def test_figures_against_numpy():
    rollout, training, mask = pair(500)
    report = IdentityStats.of(rollout, training, mask).report()
    x, y = rollout[mask].double().numpy(), training[mask].double().numpy()
    assert report["pearson"] == pytest.approx(np.corrcoef(np.exp(x), np.exp(y))[0, 1], abs=1e-13)
    assert report["max_abs_diff"] == np.abs(x - y).max()
    assert report["not_bit_equal_share"] == (x != y).mean()
    assert report["k3_kl"] == pytest.approx(np.mean(np.exp(y - x) - 1 - (y - x)), abs=1e-15)


@pytest.mark.parametrize("parts", [1, 2, 7, 50])
def test_merged_parts_are_the_whole(parts):
    rollout, training, mask = pair(400, seed=1)
    whole = IdentityStats.of(rollout, training, mask)
    pieces = [IdentityStats.of(*piece) for piece in zip(*(t.tensor_split(parts) for t in (rollout, training, mask)))]
    merged = IdentityStats.from_tensors(torch.stack([IdentityStats().to_tensor(), *(p.to_tensor() for p in pieces)]))
    for name, value in whole.report().items():
        assert merged.report()[name] == pytest.approx(value, rel=1e-10, abs=1e-15), name


def test_pearson_survives_a_spread_that_raw_sums_lose():
    x = torch.log(0.5 + 1e-9 * torch.randn(1000, generator=torch.Generator().manual_seed(2), dtype=torch.float64))
    stats = [IdentityStats.of(p, p, torch.ones_like(p, dtype=torch.bool)) for p in x.chunk(8)]
    merged = IdentityStats.from_tensors(torch.stack([s.to_tensor() for s in stats]))
    assert merged.report()["pearson"] == pytest.approx(1.0, abs=1e-9)


def test_k3_estimates_the_divergence_it_names():
    p, q = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64), torch.tensor([0.4, 0.3, 0.3], dtype=torch.float64)
    counts = torch.tensor([7, 2, 1])
    tokens = torch.repeat_interleave(torch.arange(3), counts)
    seen = IdentityStats.of(p.log()[tokens], q.log()[tokens], torch.ones_like(tokens, dtype=torch.bool)).report()
    assert seen["k3_kl"] == pytest.approx((p * (p / q).log()).sum().item(), abs=1e-12)


def test_bit_equality_sees_one_ulp_and_the_sign_of_zero():
    a = torch.tensor([-1.0, -0.0, -2.0])
    b = torch.tensor([-1.0, 0.0, -2.0])
    b[0] = torch.nextafter(a[0], torch.tensor(0.0))
    assert IdentityStats.of(a, b, torch.ones(3, dtype=torch.bool)).not_bit_equal == 2
    assert IdentityStats.of(a, a, torch.ones(3, dtype=torch.bool)).report()["not_bit_equal_share"] == 0


def test_no_tokens_and_bad_input():
    rollout, training, mask = pair(10)
    assert all(math.isnan(value) for value in IdentityStats.of(rollout, training, mask & False).report().values())
    with pytest.raises(ValueError, match="dtype"):
        IdentityStats.of(rollout.double(), training, mask)
    with pytest.raises(FloatingPointError, match="finite"):
        IdentityStats.of(rollout * float("inf"), training, mask)
