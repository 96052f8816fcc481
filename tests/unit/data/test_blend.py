"""The blend's proportions at every prefix, and the permutation of the windows."""

import itertools
import math
import random
from collections import Counter
from fractions import Fraction

import pytest

from megatron_m1.config.errors import ConfigError
from megatron_m1.data.blend import MAX_PERIOD, Blend
from megatron_m1.data.permutation import Permutation


def check_prefixes(blend: Blend, length: int) -> None:
    """Every prefix within one sample of the weights, cursors without gaps."""
    taken = [0] * len(blend.weights)
    for index in range(length):
        source, cursor = blend.locate(index)
        assert cursor == taken[source]
        taken[source] += 1
        for count, weight in zip(taken, blend.weights, strict=True):
            # In integers: |count - weight * (index + 1)| < 1.
            assert abs(count * weight.denominator - weight.numerator * (index + 1)) < weight.denominator


@pytest.mark.parametrize(
    "weights",
    [[1.0], [0.5, 0.5], [0.7, 0.2, 0.1], [1, 1, 1], [3, 5, 7, 11, 13], [0.98, 0.01, 0.01], [1, 2, 3, 94, 400]],
)
def test_within_one_sample_of_the_weights_at_every_prefix(weights: list[float]) -> None:
    blend = Blend(weights)
    total = sum(Fraction(str(weight)) for weight in weights)
    assert blend.weights == [Fraction(str(weight)) / total for weight in weights]
    check_prefixes(blend, 3 * blend.period + 5)


def test_within_one_sample_for_random_weights() -> None:
    rng = random.Random(3)
    for _ in range(40):
        weights = [round(rng.random() ** rng.choice([1, 4]), 2) + 0.01 for _ in range(rng.randint(2, 8))]
        check_prefixes(Blend(weights), 700)


def test_weights_that_do_not_divide_are_rounded_to_the_period() -> None:
    weights = [7_969_123, 12_123_457, 3]
    blend = Blend(weights)
    assert blend.period == MAX_PERIOD
    for got, weight in zip(blend.weights, weights, strict=True):
        assert got > 0 and abs(got - Fraction(weight, sum(weights))) <= Fraction(2, MAX_PERIOD)
    check_prefixes(blend, 4000)
    far = 10**15 + 12345
    source, cursor = blend.locate(far)
    assert abs(cursor - blend.weights[source] * far) <= 1


@pytest.mark.parametrize("weights", [[0.5, 0.0], [1.0, -1.0], [math.nan], [math.inf, 1.0], []])
def test_bad_weights(weights: list[float]) -> None:
    with pytest.raises(ConfigError, match="positive"):
        Blend(weights)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 16, 17, 100, 1023, 1025, 4096])
def test_permutation_is_a_bijection(size: int) -> None:
    order = Permutation(size, "key")
    assert sorted(order[i] for i in range(size)) == list(range(size))
    with pytest.raises(IndexError):
        order[size]


def test_permutations_differ_by_key_and_look_shuffled() -> None:
    size = 1000
    first, second = Permutation(size, "1/0/0"), Permutation(size, "1/0/1")
    a, b = [first[i] for i in range(size)], [second[i] for i in range(size)]
    assert a != b and sum(x == y for x, y in zip(a, b, strict=True)) < 10
    assert sum(x == i for i, x in enumerate(a)) < 10
    mean = (size - 1) / 2
    correlation = sum((i - mean) * (x - mean) for i, x in enumerate(a)) / sum((i - mean) ** 2 for i in range(size))
    assert abs(correlation) < 0.12
    assert max(Counter(y - x for x, y in itertools.pairwise(a)).values()) < 12
