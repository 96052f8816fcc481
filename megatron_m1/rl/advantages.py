"""Group-relative advantages (M1 report, Eq. 2), dynamic sampling and the soft length penalty (DAPO, arXiv 2503.14476)."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

__all__ = ["FilterReport", "group_advantages", "informative_samples", "overlong_penalty"]


def group_advantages(
    rewards: Tensor,
    groups: Tensor,
    *,
    std: Literal["population", "sample", "none"] = "population",
    valid: Tensor | None = None,
) -> Tensor:
    """Advantage [samples] float64 of each sample: (R_i - mean of its group) / std of its group, Eq. 2.

    rewards: [samples] float.  groups: [samples] int, the prompt each belongs to; order and group sizes are free.
    std: `population` divides by sqrt(mean square deviation), so a group's mean square advantage is 1; `sample` has G - 1 in
        it (torch.std's default); `none` leaves R_i - mean. The report does not say which; population is our choice.
    valid: [samples] bool, False for samples without a reward (reward_error): they count nowhere and get 0.
    A group whose rewards are all equal (or that has one sample) gets exactly 0; there is no epsilon in the division.
    Raises ValueError if a valid reward is not finite.
    """
    rewards = rewards.double()
    valid = torch.ones_like(rewards, dtype=torch.bool) if valid is None else valid
    if not bool(torch.isfinite(rewards[valid]).all()):
        raise ValueError("A reward is not finite; mark samples without a reward in `valid`.")
    rewards = torch.where(valid, rewards, 0.0)
    index, count, varied = _group_facts(rewards, groups, valid)
    mean = _group_sum(rewards, index, len(count)) / count.clamp(min=1)
    centred = torch.where(valid & varied[index], rewards - mean[index], 0.0)
    if std == "none":
        return centred
    degrees = count - (1 if std == "sample" else 0)
    deviation = torch.sqrt(_group_sum(centred.square(), index, len(count)) / degrees.clamp(min=1))
    return torch.where(centred != 0, centred / torch.where(deviation > 0, deviation, 1.0)[index], 0.0)


@dataclass(frozen=True)
class FilterReport:
    """Groups counted by dynamic sampling: all samples at the highest reward seen, all at one lower reward, and kept."""

    groups: int
    kept: int
    all_right: int
    all_equal_below: int

    def discard_rate(self) -> float:
        """Share of groups that teach nothing."""
        return 1.0 - self.kept / self.groups if self.groups else 0.0


def informative_samples(
    rewards: Tensor, groups: Tensor, *, right: float = 1.0, valid: Tensor | None = None
) -> tuple[Tensor, FilterReport]:
    """Dynamic sampling (DAPO, section 3.2): [samples] bool, True where the sample's group has rewards that differ.

    Pass the correctness reward, before length penalties: a group that is all right but of uneven length has nothing to teach.
    Samples that are not valid are False and do not count. right: the reward of a right answer, for the report only.
    """
    rewards = rewards.double()
    valid = torch.ones_like(rewards, dtype=torch.bool) if valid is None else valid
    index, count, varied = _group_facts(rewards, groups, valid)
    best = torch.full_like(count, -torch.inf).scatter_reduce_(
        0, index, torch.where(valid, rewards, -torch.inf), reduce="amax"
    )
    all_right = ~varied & (best >= right)
    report = FilterReport(
        groups=len(count),
        kept=int(varied.sum()),
        all_right=int(all_right.sum()),
        all_equal_below=int((~varied & ~all_right).sum()),
    )
    return valid & varied[index], report


def overlong_penalty(lengths: Tensor, *, max_length: int, cache_length: int) -> Tensor:
    """DAPO's soft length penalty [samples] float64 in [-1, 0], to be added to the reward (arXiv 2503.14476, Eq. 13).

    0 up to max_length - cache_length tokens, then falling linearly to -1 at max_length, -1 beyond it.
    Raises ValueError unless 0 < cache_length <= max_length.
    """
    if not 0 < cache_length <= max_length:
        raise ValueError(f"cache_length={cache_length} must lie in (0, max_length={max_length}].")
    return ((max_length - cache_length - lengths.double()) / cache_length).clamp(min=-1.0, max=0.0)


def _group_facts(rewards: Tensor, groups: Tensor, valid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Group of each sample [samples]; valid samples [groups] float64; whether a group's valid rewards differ [groups]."""
    unique, index = torch.unique(groups, return_inverse=True)
    count = _group_sum(valid.double(), index, len(unique))
    low = torch.full_like(count, torch.inf)
    low.scatter_reduce_(0, index, torch.where(valid, rewards, torch.inf), reduce="amin")
    high = torch.full_like(count, -torch.inf)
    high.scatter_reduce_(0, index, torch.where(valid, rewards, -torch.inf), reduce="amax")
    return index, count, high > low


def _group_sum(values: Tensor, index: Tensor, groups: int) -> Tensor:
    return torch.zeros(groups, dtype=torch.float64, device=values.device).index_add_(0, index, values)
