"""avg@k and unbiased pass@k over prompts, with confidence intervals."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

__all__ = ["Estimate", "HeldOut", "avg_at_k", "mean_interval", "pass_at_k", "pass_at_k_of_prompt"]


@dataclass(frozen=True)
class Estimate:
    """A share in [0, 1] with its confidence interval over `prompts` prompts."""

    value: float
    low: float
    high: float
    prompts: int

    def __str__(self) -> str:
        return f"{self.value:.4f} [{self.low:.4f}, {self.high:.4f}] ({self.prompts} prompts)"


@dataclass(frozen=True)
class HeldOut:
    """An evaluation: avg@samples, and pass@k for each k, over the prompts that have k samples with a verdict."""

    samples: int
    average: Estimate
    passes: dict[int, Estimate]

    @classmethod
    def of(cls, results: Sequence[Sequence[bool]], *, samples: int, pass_at: Sequence[int]) -> "HeldOut":
        """results: as for `avg_at_k`.  pass_at: every k; none: `samples` alone. A k that no prompt has samples for is left out."""
        passes = {}
        for k in sorted(set(pass_at)) or [samples]:
            enough = [row for row in results if len(row) >= k]
            if enough:
                passes[k] = pass_at_k(enough, k=k)
        return cls(samples, avg_at_k(results), passes)

    def figures(self) -> dict[str, dict[str, float]]:
        """`held_out` and each `held_out_pass@k`, for the log."""
        named = {"held_out": self.average} | {f"held_out_pass@{k}": estimate for k, estimate in self.passes.items()}
        return {name: {"value": e.value, "low": e.low, "high": e.high} for name, e in named.items()}

    def __str__(self) -> str:
        passes = "".join(f", pass@{k} {estimate}" for k, estimate in self.passes.items())
        return f"avg@{self.samples} {self.average}{passes}"


def avg_at_k(results: Sequence[Sequence[bool]], *, confidence: float = 0.95) -> Estimate:
    """Mean over prompts of the share of right samples. results: per prompt, whether each of its k samples is right.

    Samples without a verdict (reward_error) are left out by the caller; every prompt needs at least one. See `mean_interval`.
    """
    return mean_interval([math.fsum(row) / len(row) for row in _rows(results, least=1)], confidence=confidence)


def pass_at_k(results: Sequence[Sequence[bool]], *, k: int, confidence: float = 0.95) -> Estimate:
    """Mean over prompts of the unbiased estimate that at least one of k samples is right. Every prompt needs n >= k samples."""
    values = [pass_at_k_of_prompt(len(row), sum(map(bool, row)), k=k) for row in _rows(results, least=k)]
    return mean_interval(values, confidence=confidence)


def pass_at_k_of_prompt(samples: int, right: int, *, k: int) -> float:
    """1 - C(n - c, k) / C(n, k): unbiased for 1 - (1 - p)^k (Chen et al. 2021, arXiv 2107.03374, Eq. 1); exact integers."""
    if not (0 <= right <= samples and 1 <= k <= samples):
        raise ValueError(f"right={right} must lie in [0, {samples}] and k={k} in [1, {samples}].")
    total = math.comb(samples, k)
    return (total - math.comb(samples - right, k)) / total


def mean_interval(values: Sequence[float], *, confidence: float = 0.95) -> Estimate:
    """Mean of per-prompt values in [0, 1] with a Wilson score interval at the effective sample size.

    The prompts are the independent units (samples of one prompt are not), so n_eff = m (1 - m) / (s^2 / n), with m the mean,
    s^2 the sample variance between prompts; but at least n, and n where s^2 = 0. For 0/1 values this is Wilson's interval.
    Why: unlike mean +- z s it stays in [0, 1] and has a width where all or no prompts pass; unlike the bootstrap it draws
    nothing and does not collapse there. It speaks of new prompts of the same kind, not of this very list.
    """
    n = len(values)
    if n == 0 or min(values) < 0 or max(values) > 1:
        raise ValueError("Values in [0, 1] of at least one prompt are needed.")
    mean = math.fsum(values) / n
    variance = math.fsum((value - mean) ** 2 for value in values) / (n - 1) if n > 1 else 0.0
    effective = max(n, mean * (1 - mean) * n / variance) if variance > 0 else n
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    centre = (mean + z * z / (2 * effective)) / (1 + z * z / effective)
    half = z / (1 + z * z / effective) * math.sqrt(mean * (1 - mean) / effective + z * z / (4 * effective**2))
    return Estimate(mean, max(0.0, min(mean, centre - half)), min(1.0, max(mean, centre + half)), n)


def _rows(results: Sequence[Sequence[bool]], *, least: int) -> Sequence[Sequence[bool]]:
    short = [i for i, row in enumerate(results) if len(row) < least]
    if short:
        raise ValueError(f"Prompt {short[0]} has {len(results[short[0]])} samples with a verdict; {least} are needed.")
    return results
