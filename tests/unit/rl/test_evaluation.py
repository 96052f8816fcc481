import itertools
import math

import numpy as np
import pytest

from megatron_m1.rl.evaluation import HeldOut, avg_at_k, mean_interval, pass_at_k, pass_at_k_of_prompt


@pytest.mark.parametrize("n, c, k", [(5, 2, 1), (5, 2, 3), (6, 0, 2), (6, 6, 2), (7, 1, 7), (8, 3, 6)])
def test_pass_at_k_counts_all_subsets(n, c, k):
    subsets = list(itertools.combinations([True] * c + [False] * (n - c), k))
    assert pass_at_k_of_prompt(n, c, k=k) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-15)


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_pass_at_k_is_unbiased(p):
    n, k = 9, 4
    expected = math.fsum(
        math.comb(n, c) * p**c * (1 - p) ** (n - c) * pass_at_k_of_prompt(n, c, k=k) for c in range(n + 1)
    )
    assert expected == pytest.approx(1 - (1 - p) ** k, abs=1e-14)


def test_large_counts_stay_exact():
    assert pass_at_k_of_prompt(10_000, 1, k=1) == 1e-4
    assert pass_at_k_of_prompt(10_000, 5000, k=5000) == 1.0


def test_values_are_means_over_prompts():
    results = [[True, False, False, False], [True, True]]
    assert avg_at_k(results).value == 0.625
    assert pass_at_k(results, k=2).value == pytest.approx((0.5 + 1.0) / 2)
    assert str(pass_at_k(results, k=1)).startswith("0.6250 [")


def test_zero_one_values_have_wilsons_interval():
    seen = mean_interval([1.0] * 8 + [0.0] * 2)
    # Wilson's formula for 8 of 10 at z = 1.96, but for n_eff = n (the sample variance has n - 1)
    assert (seen.low, seen.high) == pytest.approx((0.4902, 0.9433), abs=2e-4)
    for value, low, high in ((1.0, 0.7225, 1.0), (0.0, 0.0, 0.2775)):
        edge = mean_interval([value] * 10)
        assert (edge.low, edge.high) == pytest.approx((low, high), abs=2e-4)


@pytest.mark.parametrize("spread, prompts, k", [(0.0, 40, 8), (0.3, 40, 4), (0.45, 100, 8), (0.5, 30, 1)])
def test_the_interval_covers_the_truth(spread, prompts, k):
    """Prompts with true rates 0.5 +- spread; 95% intervals must cover 0.5 about that often."""
    rng = np.random.default_rng(0)
    hits = widths = 0
    for _ in range(400):
        rates = 0.5 + spread * rng.choice([-1, 1], size=prompts)
        results = rng.random((prompts, k)) < rates[:, None]
        interval = avg_at_k(results.tolist())
        hits += interval.low <= 0.5 <= interval.high
        widths += interval.high - interval.low
    assert 0.92 <= hits / 400 <= 0.985
    assert widths / 400 < 4.4 * math.sqrt((spread**2 + (0.25 - spread**2) / k) / prompts)


def test_bad_input_is_refused():
    for call in (
        lambda: avg_at_k([]),
        lambda: avg_at_k([[True], []]),
        lambda: pass_at_k([[True]], k=2),
        lambda: pass_at_k_of_prompt(4, 5, k=1),
        lambda: mean_interval([1.5]),
    ):
        with pytest.raises(ValueError):
            call()


def test_an_evaluation_gives_every_k_that_the_samples_allow():
    results = [[True, False, False, False], [False] * 4, [True, True, True]]  # the last one lost a sample to an error
    held_out = HeldOut.of(results, samples=4, pass_at=[2, 1, 4])
    assert held_out.average.value == pytest.approx((0.25 + 0 + 1) / 3)
    assert {k: (e.value, e.prompts) for k, e in held_out.passes.items()} == {
        1: (pytest.approx((0.25 + 0 + 1) / 3), 3),
        2: (pytest.approx((0.5 + 0 + 1) / 3), 3),
        4: (pytest.approx(0.5), 2),
    }
    figures = held_out.figures()
    assert list(figures) == ["held_out", "held_out_pass@1", "held_out_pass@2", "held_out_pass@4"]
    assert figures["held_out_pass@4"]["low"] < 0.5 < figures["held_out_pass@4"]["high"]
    assert list(HeldOut.of(results[:2], samples=4, pass_at=[]).passes) == [4]
    assert HeldOut.of(results[2:], samples=4, pass_at=[]).passes == {}
