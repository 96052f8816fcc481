"""Which source gives sample i, and how many samples of that source came before it."""

import heapq
import math
from fractions import Fraction

import numpy as np

from megatron_m1.config.errors import ConfigError

__all__ = ["Blend"]

MAX_PERIOD = 1 << 16


class Blend:
    """blend.locate(i) -> (source, cursor): sample i is the cursor-th sample (from 0) taken from that source.

    A periodic pattern, so that any i is found at once and nothing depends on the length of a run.  At every prefix of
    the sequence each source has been taken within one sample of its share of `weights`.
    weights: [sources] Fractions that add up to 1.  These are the given weights exactly if they are multiples of
    1 / D with D <= 65,536 (after division by their sum), else rounded to multiples of 1 / 65,536, and at least that.
    Raises ConfigError for weights that are not positive and finite.
    """

    def __init__(self, weights: list[float] | list[int]) -> None:
        bad = [weight for weight in weights if not (math.isfinite(weight) and weight > 0)]
        if bad or not weights:
            raise ConfigError(f"weights {weights} must be positive numbers; leave out the sources that are not wanted.")
        if len(weights) > MAX_PERIOD:
            raise ConfigError(f"{len(weights)} sources are more than {MAX_PERIOD}; join some of them.")
        self.counts = _integer_counts(weights)
        self.period = sum(self.counts)
        self.weights = [Fraction(count, self.period) for count in self.counts]
        self._source = _spread(self.counts)
        self._before = np.empty(self.period, np.int64)
        for source, count in enumerate(self.counts):
            self._before[self._source == source] = np.arange(count)

    def locate(self, index: int) -> tuple[int, int]:
        """(source, samples of that source before sample `index`)."""
        block, within = divmod(index, self.period)
        source = int(self._source[within])
        return source, block * self.counts[source] + int(self._before[within])


def _integer_counts(weights: list[float] | list[int]) -> list[int]:
    """Samples of each source in one period."""
    # The decimal digits, not the binary value: 0.1 means one tenth.
    exact = [Fraction(str(weight)) for weight in weights]
    total = sum(exact)
    shares = [weight / total for weight in exact]
    period = math.lcm(*(share.denominator for share in shares))
    if period <= MAX_PERIOD:
        return [int(share * period) for share in shares]
    # Largest remainders, after one sample for every source.
    spare = MAX_PERIOD - len(shares)
    ideal = [share * spare for share in shares]
    counts = [1 + math.floor(value) for value in ideal]
    by_remainder = sorted(range(len(shares)), key=lambda source: (math.floor(ideal[source]) - ideal[source], source))
    for source in by_remainder[: MAX_PERIOD - sum(counts)]:
        counts[source] += 1
    return counts


def _spread(counts: list[int]) -> np.ndarray:
    """int32 [sum(counts)]: sources spread evenly.

    Sample j of a source with share w may stand in slots floor(j / w) to ceil((j + 1) / w) - 1: there, and only there,
    its count stays within one of its share.  Earliest deadline first fills every slot in time (a schedule exists:
    Tijdeman, The chairman assignment problem, 1980).
    """
    period = sum(counts)
    pattern = np.empty(period, np.int32)
    released: list[list[tuple[int, int]]] = [[] for _ in range(period)]
    taken = [0] * len(counts)
    released[0] = [(_deadline(0, count, period), source) for source, count in enumerate(counts)]
    ready: list[tuple[int, int]] = []
    for slot in range(period):
        for entry in released[slot]:
            heapq.heappush(ready, entry)
        deadline, source = heapq.heappop(ready)
        assert deadline >= slot, "no schedule within one sample of the shares"
        pattern[slot] = source
        taken[source] += 1
        j, count = taken[source], counts[source]
        if j < count:
            entry = (_deadline(j, count, period), source)
            release = j * period // count
            if release <= slot:
                heapq.heappush(ready, entry)
            else:
                released[release].append(entry)
    return pattern


def _deadline(j: int, count: int, period: int) -> int:
    return -(-(j + 1) * period // count) - 1
