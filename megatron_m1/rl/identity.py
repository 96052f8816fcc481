"""How far the log-probabilities of generation are from those of training, as statistics that can be merged over ranks."""

from dataclasses import astuple, dataclass

import torch
from torch import Tensor

__all__ = ["IdentityStats"]


@dataclass(frozen=True)
class IdentityStats:
    """Sufficient statistics over sampled tokens; x: rollout probability, y: training probability, d: log y - log x.

    Co-moments are central and merged pairwise (Chan et al., 1979), so Pearson loses no digits to cancellation.
    """

    tokens: float = 0.0
    mean_x: float = 0.0
    mean_y: float = 0.0
    moment_xx: float = 0.0
    moment_yy: float = 0.0
    moment_xy: float = 0.0
    k3_sum: float = 0.0
    not_bit_equal: float = 0.0
    max_abs_diff: float = 0.0

    @classmethod
    def of(cls, rollout_logp: Tensor, training_logp: Tensor, mask: Tensor) -> "IdentityStats":
        """From log-probabilities in nats of the sampled tokens; three tensors of one shape, mask bool (True: counted).

        Raises ValueError if the dtypes differ (bit equality would be meaningless), FloatingPointError if a counted value is not
        finite.
        """
        if rollout_logp.dtype != training_logp.dtype:
            raise ValueError(
                f"rollout_logp is {rollout_logp.dtype}, training_logp {training_logp.dtype}; compare one dtype."
            )
        rollout, training = rollout_logp.detach()[mask], training_logp.detach()[mask]
        if rollout.numel() == 0:
            return cls()
        if not bool((torch.isfinite(rollout) & torch.isfinite(training)).all()):
            raise FloatingPointError(
                "a log-probability of a sampled token is not finite; lower optimizer.lr or resume from an earlier checkpoint"
            )
        bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[rollout.element_size()]
        differ = (rollout.contiguous().view(bits) != training.contiguous().view(bits)).sum()
        difference = training.double() - rollout.double()
        x, y = rollout.double().exp(), training.double().exp()
        dx, dy = x - x.mean(), y - y.mean()
        return cls(
            tokens=float(x.numel()),
            mean_x=x.mean().item(),
            mean_y=y.mean().item(),
            moment_xx=dx.square().sum().item(),
            moment_yy=dy.square().sum().item(),
            moment_xy=(dx * dy).sum().item(),
            k3_sum=(torch.expm1(difference) - difference).sum().item(),
            not_bit_equal=float(differ.item()),
            max_abs_diff=difference.abs().max().item(),
        )

    def merge(self, other: "IdentityStats") -> "IdentityStats":
        """Statistics of both sets of tokens together."""
        tokens = self.tokens + other.tokens
        if tokens == 0:
            return self
        dx, dy = other.mean_x - self.mean_x, other.mean_y - self.mean_y
        share = other.tokens / tokens
        cross = self.tokens * share
        return IdentityStats(
            tokens=tokens,
            mean_x=self.mean_x + dx * share,
            mean_y=self.mean_y + dy * share,
            moment_xx=self.moment_xx + other.moment_xx + dx * dx * cross,
            moment_yy=self.moment_yy + other.moment_yy + dy * dy * cross,
            moment_xy=self.moment_xy + other.moment_xy + dx * dy * cross,
            k3_sum=self.k3_sum + other.k3_sum,
            not_bit_equal=self.not_bit_equal + other.not_bit_equal,
            max_abs_diff=max(self.max_abs_diff, other.max_abs_diff),
        )

    def to_tensor(self) -> Tensor:
        """[9] float64 (CPU), to be gathered over ranks; `from_tensors` merges what was gathered."""
        return torch.tensor(astuple(self), dtype=torch.float64)

    @classmethod
    def from_tensors(cls, gathered: Tensor) -> "IdentityStats":
        """Merge of [ranks, 9] float64 in the order of the ranks, so every rank gets the same bits."""
        merged = cls()
        for row in gathered.tolist():
            merged = merged.merge(cls(*row))
        return merged

    def report(self) -> dict[str, float]:
        """The figures to log; all NaN without tokens.

        pearson: correlation of the probabilities (M1 report, section 3.2 and Figure 3: 0.987 -> 0.997 with an fp32 head);
            NaN if one side is constant. max_abs_diff: of log-probabilities, nats. not_bit_equal_share: of tokens.
        k3_kl: mean of exp(d) - 1 - d, the k3 estimate of KL(rollout || training) from tokens sampled by the rollout
            (Schulman, "Approximating KL divergence", 2020), nats per token.
        """
        if self.tokens == 0:
            return dict.fromkeys(("pearson", "max_abs_diff", "not_bit_equal_share", "k3_kl"), float("nan"))
        scale = (self.moment_xx * self.moment_yy) ** 0.5
        return {
            "pearson": max(-1.0, min(1.0, self.moment_xy / scale)) if scale > 0 else float("nan"),
            "max_abs_diff": self.max_abs_diff,
            "not_bit_equal_share": self.not_bit_equal / self.tokens,
            "k3_kl": self.k3_sum / self.tokens,
        }
