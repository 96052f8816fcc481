"""Policy-gradient losses of the RL stage, all one function: M1 report (arXiv 2506.13585), Eq. 3-7.

    J = E[ sum_i n_i sum_t sg(w_it) A_it log pi_theta(o_it) M_it ]                            Eq. 6 (M = 1: CISPO, Eq. 4)
    w = clip(r, is_weight_floor, is_weight_cap),  r = pi_theta(o_it) / pi_old(o_it)           Eq. 5
    M = 0 where A > 0 and r > 1 + mask_eps_high, or A < 0 and r < 1 - mask_eps_low; else 1    Eq. 7

The report writes the bounds of Eq. 5 as 1 - eps_low and 1 + eps_high; here they are the absolute bounds themselves.
n_i is the normaliser of sample i (see `Normalizer`); the loss is -J. There is no KL term, as in the report.
"""

from dataclasses import dataclass
from math import inf, isfinite
from typing import Literal

import torch
from torch import Tensor

from megatron_m1.config.errors import ConfigError

__all__ = ["PRESETS", "LossOutput", "LossSettings", "LossStats", "Normalization", "Normalizer", "policy_loss"]

Normalization = Literal["per_group", "batch_token", "sample", "combined"]
NORMALIZATIONS = ("per_group", "batch_token", "sample", "combined")


@dataclass(frozen=True, kw_only=True)
class LossSettings:
    """What the loss does to the importance weights, and how it is normalised.

    is_weight_cap, is_weight_floor: absolute bounds of the importance weight (not 1 +- eps); None: no bound. M1 sets no
        floor and does not publish its cap; published reproductions settled on caps of 4 to 8.
    mask_eps_low, mask_eps_high: epsilons of the PPO mask of Eq. 7, relative to 1; None: that side is not masked.
    correction_cap: upper bound C of the truncated importance correction min(pi_old / pi_rollout, C), which multiplies every
        term; pi_rollout is what the generation engine said, pi_old what the trainer scored. None: off.
    sample_share: share of `sample` in the normalisation `combined`.
    Raises ConfigError for bounds that contradict each other.
    """

    is_weight_cap: float | None = None
    is_weight_floor: float | None = None
    mask_eps_low: float | None = None
    mask_eps_high: float | None = None
    correction_cap: float | None = None
    normalization: Normalization = "per_group"
    sample_share: float = 0.5

    def __post_init__(self) -> None:
        for name in ("is_weight_cap", "is_weight_floor", "mask_eps_low", "mask_eps_high", "correction_cap"):
            value = getattr(self, name)
            if value is not None and not (isfinite(value) and value >= 0):
                raise ConfigError(f"{name}={value} must be finite and at least 0; leave it empty for no bound.")
        if self.is_weight_cap == 0 or self.correction_cap == 0:
            raise ConfigError("is_weight_cap and correction_cap must be above 0: a cap of 0 removes every gradient.")
        floor, cap = self.interval()
        if floor > cap:
            raise ConfigError(
                f"is_weight_floor={floor} must not exceed is_weight_cap={cap}; both are absolute weights."
            )
        if self.normalization not in NORMALIZATIONS:
            raise ConfigError(f"normalization={self.normalization} must be one of {', '.join(NORMALIZATIONS)}.")
        if not 0 <= self.sample_share <= 1:
            raise ConfigError(f"sample_share={self.sample_share} must lie in [0, 1].")

    def interval(self) -> tuple[float, float]:
        """The interval that importance weights are clipped to: (0, inf) where there is no bound."""
        return self.is_weight_floor or 0.0, inf if self.is_weight_cap is None else self.is_weight_cap

    def describe(self) -> str:
        """One line for the start of a run: the effective interval, the mask, the normalisation."""
        floor, cap = self.interval()
        parts = [f"importance weight in [{floor:g}, {cap:g}{')' if cap == inf else ']'}"]
        if self.mask_eps_high is not None:
            parts.append(f"masked where A > 0 and r > {1 + self.mask_eps_high:g}")
        if self.mask_eps_low is not None:
            parts.append(f"masked where A < 0 and r < {1 - self.mask_eps_low:g}")
        if self.correction_cap is not None:
            parts.append(f"times min(pi_old / pi_rollout, {self.correction_cap:g})")
        share = f" ({self.sample_share:g} sample)" if self.normalization == "combined" else ""
        return "; ".join([*parts, f"normalisation {self.normalization}{share}"])

    def warnings(self, *, updates_per_batch: int) -> list[str]:
        """A sentence for every setting that cannot act, or acts on policy too; empty when all is well."""
        floor, cap = self.interval()
        found = []
        bounds = [name for name in ("is_weight_cap", "is_weight_floor") if getattr(self, name) is not None]
        masks = [name for name in ("mask_eps_low", "mask_eps_high") if getattr(self, name) is not None]
        if updates_per_batch == 1 and (bounds or masks) and not floor == cap == 1:
            found.append(
                f"{', '.join(bounds + masks)} cannot act: with one update per batch the ratio is 1 everywhere."
            )
        if cap < 1:
            found.append(
                f"is_weight_cap={cap:g} is below 1: it scales down even on-policy tokens; it is absolute, not an eps."
            )
        if floor > 1:
            found.append(
                f"is_weight_floor={floor:g} is above 1: it scales up even on-policy tokens; it is absolute, not an eps."
            )
        if self.mask_eps_low is not None and self.mask_eps_low >= 1:
            found.append(f"mask_eps_low={self.mask_eps_low:g} cannot act: no ratio is below {1 - self.mask_eps_low:g}.")
        if self.mask_eps_high is not None and 1 < cap < inf and cap >= 1 + self.mask_eps_high:
            found.append(
                f"is_weight_cap={cap:g} acts only where A < 0: with A > 0 the mask drops r > {1 + self.mask_eps_high:g}."
            )
        if self.mask_eps_low is not None and 0 < floor < 1 and floor <= 1 - self.mask_eps_low:
            found.append(
                f"is_weight_floor={floor:g} acts only where A > 0: with A < 0 the mask drops r < {1 - self.mask_eps_low:g}."
            )
        if self.correction_cap is not None and self.correction_cap < 1:
            found.append(
                f"correction_cap={self.correction_cap:g} is below 1: it scales down tokens both engines agree on."
            )
        return found


# CISPO Eq. 4; GRPO with clip 0.2 and the mean over samples of token means (arXiv 2402.03300, Eq. 3, without KL); DAPO
# with clip-higher and the token mean (arXiv 2503.14476, Eq. 8); REINFORCE with every weight 1; and Eq. 3, REINFORCE
# with importance weights that nothing bounds. M1's cap is not published; 5 is a choice.
PRESETS: dict[str, LossSettings] = {
    "cispo": LossSettings(is_weight_cap=5.0),
    "grpo": LossSettings(mask_eps_low=0.2, mask_eps_high=0.2, normalization="sample"),
    "dapo": LossSettings(mask_eps_low=0.2, mask_eps_high=0.28, normalization="batch_token"),
    "reinforce": LossSettings(is_weight_cap=1.0, is_weight_floor=1.0, normalization="sample"),
    "reinforce_corrected": LossSettings(normalization="sample"),
}


@dataclass(frozen=True)
class Normalizer:
    """The factor n_i [samples] float64 of every sample's tokens, fixed for the whole batch of one optimizer step.

    It is computed once from all samples, so the sum of the losses of any split of the batch (micro-batches, packs, ranks)
    is the loss of the batch: losses and gradients are summed, never averaged.
    """

    weights: Tensor

    @classmethod
    def for_batch(
        cls, lengths: Tensor, groups: Tensor, *, normalization: Normalization, sample_share: float = 0.5
    ) -> "Normalizer":
        """From all samples of one optimizer step, over all data-parallel ranks.

        lengths: [samples] int, loss tokens |o_i|.  groups: [samples] int, the prompt each belongs to.
        With P groups and N samples that have loss tokens (those without count nowhere and get 0):
            per_group    1 / (P * sum of |o_j| over the group of i)     Eq. 4 as printed, then the mean over prompts
            batch_token  1 / sum of all |o_j|                           one mean over all tokens
            sample       1 / (N * |o_i|)                                mean over samples of the mean over tokens
            combined     sample_share * sample + (1 - sample_share) * batch_token
        M1-80k "combines sample-level loss with token-level normalisation" without a formula; `combined` is our reading.
        Raises ValueError if no sample has a loss token.
        """
        lengths = lengths.double()
        present = lengths > 0
        if not bool(present.any()):
            raise ValueError("No sample of the batch has a loss token.")
        safe = lengths.clamp(min=1)
        if normalization == "per_group":
            unique, index = torch.unique(groups, return_inverse=True)
            totals = torch.zeros(len(unique), dtype=torch.float64, device=lengths.device).index_add_(0, index, lengths)
            weights = 1.0 / ((totals > 0).sum() * totals.clamp(min=1)[index])
        else:
            by_sample = 1.0 / (present.sum() * safe)
            by_token = torch.full_like(lengths, 1.0) / lengths.sum()
            share = {"sample": 1.0, "batch_token": 0.0, "combined": sample_share}[normalization]
            weights = share * by_sample + (1.0 - share) * by_token
        return cls(torch.where(present, weights, 0.0))

    def of_tokens(self, sample_index: Tensor) -> Tensor:
        """Factor of each token, float64, shaped as sample_index: int, the row of `lengths` that a token belongs to.

        Tokens of no sample (padding) may have any valid index; the loss does not read them.
        """
        return self.weights[sample_index]


@dataclass(frozen=True)
class LossStats:
    """Sums over loss tokens (float64 scalars), so statistics of parts of a batch are added, with + or an all-reduce."""

    tokens: Tensor
    capped: Tensor
    floored: Tensor
    ppo_masked: Tensor
    weight: Tensor
    corrected: Tensor
    off_policy: Tensor

    def __add__(self, other: "LossStats") -> "LossStats":
        return LossStats(*(self.as_tensor() + other.as_tensor()).unbind())

    def as_tensor(self) -> Tensor:
        """[7] float64 in the order of the fields; `LossStats(*tensor.unbind())` is the way back."""
        return torch.stack(
            [self.tokens, self.capped, self.floored, self.ppo_masked, self.weight, self.corrected, self.off_policy]
        )

    def means(self) -> dict[str, float]:
        """Shares of loss tokens, and the mean importance weight after clipping; off policy: the ratio is not exactly 1."""
        tokens = max(self.tokens.item(), 1.0)
        return {
            "capped_share": self.capped.item() / tokens,
            "floored_share": self.floored.item() / tokens,
            "ppo_masked_share": self.ppo_masked.item() / tokens,
            "mean_is_weight": self.weight.item() / tokens,
            "corrected_share": self.corrected.item() / tokens,
            "off_policy_share": self.off_policy.item() / tokens,
        }


@dataclass(frozen=True)
class LossOutput:
    """loss: scalar, summed (see Normalizer).  capped: bool, shaped as logp, tokens whose weight hit the cap."""

    loss: Tensor
    stats: LossStats
    capped: Tensor


def policy_loss(
    logp: Tensor,
    old_logp: Tensor,
    advantage: Tensor,
    token_weight: Tensor,
    mask: Tensor,
    *,
    settings: LossSettings,
    rollout_logp: Tensor | None = None,
) -> LossOutput:
    """The part of -J (Eq. 4-7) that these tokens contribute: a sum, differentiable in logp only.

    All tensors have one shape, [batch, seq] or [packed tokens], float32 or float64; logs in nats of the sampled tokens.
    old_logp: pi_old as scored by the trainer.  advantage: per token (a sample's advantage on each of its tokens).
    token_weight: `Normalizer.of_tokens`, any float dtype.  mask: bool, True on loss tokens; nothing else is read, so
    padding may hold anything.  rollout_logp: the generation engine's logs, needed with correction_cap and only then.
    Raises ValueError for half precision (the ratio would be rounded) and for shapes that differ.
    """
    if logp.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"logp is {logp.dtype}; pass float32 or float64.")
    if (rollout_logp is None) != (settings.correction_cap is None):
        raise ValueError("Pass rollout_logp exactly when correction_cap is set.")
    shapes = {tuple(tensor.shape) for tensor in (logp, old_logp, advantage, token_weight, mask)}
    if len(shapes) != 1:
        raise ValueError(f"Tensors of one shape are needed, got {sorted(shapes)}.")

    def on_mask(tensor: Tensor) -> Tensor:
        return torch.where(mask, tensor.to(logp.dtype), 0.0)

    logp, old, advantage, factor = on_mask(logp), on_mask(old_logp), on_mask(advantage), on_mask(token_weight)
    ratio = torch.exp(logp.detach() - old.detach())
    floor, cap = settings.interval()
    weight = ratio.clamp(min=floor, max=cap)
    capped, floored = mask & (ratio > cap), mask & (ratio < floor)
    dropped = _ppo_masked(ratio, advantage, settings) & mask
    corrected = torch.zeros_like(mask)
    if rollout_logp is not None:
        correction = torch.exp(old.detach() - on_mask(rollout_logp).detach())
        corrected = mask & (correction > settings.correction_cap)
        factor = factor * correction.clamp(max=settings.correction_cap)
    coefficient = torch.where(dropped, 0.0, factor * weight * advantage).detach()
    loss = -(coefficient * logp).sum()
    counted = (mask, capped, floored, dropped, weight * mask, corrected, mask & (ratio != 1))
    stats = LossStats(*(tensor.sum(dtype=torch.float64) for tensor in counted))
    return LossOutput(loss, stats, capped)


def _ppo_masked(ratio: Tensor, advantage: Tensor, settings: LossSettings) -> Tensor:
    """True where M of Eq. 7 is 0."""
    masked = torch.zeros_like(ratio, dtype=torch.bool)
    if settings.mask_eps_high is not None:
        masked |= (advantage > 0) & (ratio > 1 + settings.mask_eps_high)
    if settings.mask_eps_low is not None:
        masked |= (advantage < 0) & (ratio < 1 - settings.mask_eps_low)
    return masked
