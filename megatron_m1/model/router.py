"""Top-k router: fp32 softmax over the chosen experts, balance statistics that do not depend on the layout."""

import contextlib
from collections.abc import Iterator

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_utils import apply_router_token_dropping, topk_routing_with_score_function
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

from megatron_m1.config.schema import MoEConfig
from megatron_m1.model.transformer_config import M1TransformerConfig

__all__ = ["M1Router", "load_balancing_loss"]


class _AddToLoss(torch.autograd.Function):
    """Identity on `output` whose backward pass also differentiates `extra`, as if it had been added to the loss."""

    @staticmethod
    def forward(ctx, output: Tensor, extra: Tensor) -> Tensor:  # type: ignore[override]
        return output.view_as(output)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return grad, torch.ones((), dtype=torch.float32, device=grad.device)


def load_balancing_loss(probabilities: Tensor, counts: Tensor, tokens: Tensor, *, top_k: int, form: str) -> Tensor:
    """Balance loss of one layer, scalar fp32, before its coefficient.

    probabilities: [n, E] fp32, full softmax of this rank's tokens (zero rows where a token is padding).
    counts: [E] tokens routed to each expert and tokens: [] number of tokens, both over the WHOLE statistics group, so that the
    sum of this value over the group is the loss.
    With f_e = counts / (tokens * top_k) and m_e = mean probability: `megatron` E * sum f m (1 at balance), `minimax`
    1/E * sum f m (1/E^2 at balance; MiniMax-01 report, section 2.1), `hf` top_k times `megatron` (per layer, where
    transformers pools the layers first).
    """
    experts = probabilities.shape[-1]
    scale = {"megatron": experts, "minimax": 1.0 / experts, "hf": experts * top_k}[form]
    tokens = tokens.clamp(min=1)
    return scale * (counts / (tokens * top_k) * probabilities.sum(dim=0) / tokens).sum()


class M1Router(TopKRouter):
    """logits = gate(y) in fp32; the top-k renormalised to sum 1 (softmax over the chosen logits).

    Core's TopKRouter with its gate, top-k and token drop; the balance and z losses are ours, because core's scale
    with a local token count (wrong under uneven padding) and keep running averages over micro-batches. So is the replay of recorded
    choices: core's (moe/router_replay.py, 0.19.2) keeps every router of the process in one global list and the choices of the
    micro-batches under way in a queue per router, which a forward pass without a backward one leaves full.
    The losses are means over the micro-batches of a step: `loss_scale` is 1 / (micro-batches running one after the other,
    over all data-parallel ranks for `micro_batch` statistics).
    """

    def __init__(
        self,
        *,
        moe: MoEConfig,
        config: M1TransformerConfig,
        pg_collection: ProcessGroupCollection,
        is_mtp_layer: bool = False,
    ) -> None:
        super().__init__(config=config, pg_collection=pg_collection, is_mtp_layer=is_mtp_layer)
        self.moe = moe
        self.weight.data = self.weight.data.float()
        # The gate sees a shard of the sequence on each tensor-parallel rank, whatever the rest of the layer does.
        self.weight.sequence_parallel = pg_collection.tp.size() > 1  # type: ignore[attr-defined]
        self.statistics_group = pg_collection.tp_dp_cp if moe.aux_loss == "global" else pg_collection.tp_cp
        self.tokens_per_expert = torch.zeros(config.num_moe_experts, dtype=torch.float32)
        self.aux_loss_sum = torch.zeros(())
        self.z_loss_sum = torch.zeros(())
        self.loss_scale = 1.0
        self.replay_counts = torch.zeros(2, dtype=torch.float64)
        """Tokens with replayed experts, and those of them for which the gate would now choose others."""
        self._recorded: Tensor | None = None

    @contextlib.contextmanager
    def replaying(self, experts: Tensor | None) -> Iterator[None]:
        """Tokens go to `experts` [s, b, top_k] (-1: to those of the gate's choice) while the context is open; their weights are still
        the gate's, so that it learns. None: all as the gate chooses."""
        self._recorded = experts
        try:
            yield
        finally:
            self._recorded = None

    def reset_statistics(self, *, micro_batches: int) -> None:
        """Start a step of `micro_batches` per data-parallel rank: zero the counts, set the scale of the losses."""
        device = self.weight.device
        self.tokens_per_expert = torch.zeros(self.num_experts, dtype=torch.float32, device=device)
        self.aux_loss_sum = torch.zeros((), device=device)
        self.z_loss_sum = torch.zeros((), device=device)
        replicas = self.tp_dp_cp_group.size() // self.statistics_group.size()
        self.loss_scale = 1.0 / (micro_batches * replicas)

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(probabilities [n, E] of the chosen experts, else 0; routing map [n, E] bool) for logits [s, b, E].

        padding_mask: [s, b] bool, True where a token is padding and takes no part in the statistics.
        """
        logits = logits.view(-1, self.num_experts)
        valid = None if padding_mask is None else ~padding_mask.reshape(-1, 1)
        probs, routing_map = topk_routing_with_score_function(
            logits,
            self.topk,
            use_pre_softmax=False,
            score_function="softmax",
            precomputed_indices=None if self._recorded is None else self._replayed(logits, self._recorded),
        )
        if self.training and torch.is_grad_enabled():
            probs = self._with_losses(probs, logits, routing_map, valid)
        if self.config.moe_expert_capacity_factor is not None:
            probs, routing_map = apply_router_token_dropping(
                probs, routing_map, router_topk=self.topk, capacity_factor=self.config.moe_expert_capacity_factor
            )
        return probs, routing_map

    @torch.no_grad()
    def _replayed(self, logits: Tensor, recorded: Tensor) -> Tensor:
        """Experts [n, top_k]: the recorded ones where there are any."""
        recorded = recorded.reshape(-1, self.topk).long()
        chosen = logits.topk(self.topk, dim=-1).indices
        known = recorded[:, 0] >= 0
        differs = known & (recorded.sort(dim=-1).values != chosen.sort(dim=-1).values).any(dim=-1)
        self.replay_counts = self.replay_counts.to(logits.device) + torch.stack([known.sum(), differs.sum()])
        return torch.where(known.unsqueeze(-1), recorded, chosen)

    def _with_losses(self, probs: Tensor, logits: Tensor, routing_map: Tensor, valid: Tensor | None) -> Tensor:
        moe = self.moe
        local = (routing_map if valid is None else routing_map & valid).sum(dim=0).float()
        self.tokens_per_expert += local
        if moe.aux_loss == "none" and moe.z_loss_coefficient == 0.0:
            return probs
        statistics = torch.cat([local, local.sum(dim=0, keepdim=True) / self.topk])
        if self.statistics_group.size() > 1:
            dist.all_reduce(statistics, group=self.statistics_group)
        counts, tokens = statistics[:-1], statistics[-1]
        extra = torch.zeros((), device=logits.device)
        if moe.aux_loss != "none" and moe.aux_loss_coefficient != 0.0:
            scores = logits.softmax(dim=-1, dtype=torch.float32)
            scores = scores if valid is None else scores * valid
            loss = load_balancing_loss(scores, counts, tokens, top_k=self.topk, form=moe.aux_loss_form)
            self.aux_loss_sum += loss.detach() * self.loss_scale
            extra = extra + moe.aux_loss_coefficient * loss
        if moe.z_loss_coefficient != 0.0:
            squares = logits.float().logsumexp(dim=-1, keepdim=True).square()
            z_loss = (squares if valid is None else squares * valid).sum() / tokens.clamp(min=1)
            self.z_loss_sum += z_loss.detach() * self.loss_scale
            extra = extra + moe.z_loss_coefficient * z_loss
        return _AddToLoss.apply(probs, extra * self.loss_scale)
