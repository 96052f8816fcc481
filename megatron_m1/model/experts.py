"""Routed experts as grouped matrix products, and the optional shared expert."""

import contextlib
from collections.abc import Iterable, Iterator

import torch
from m1_kernels import swiglu
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from torch import Tensor, nn
from torch.nn.functional import grouped_mm, silu

from megatron_m1.model.lightning import column_linear, row_linear
from megatron_m1.model.transformer_config import M1TransformerConfig

__all__ = ["EXACT_ROWS", "GroupedExperts", "SharedExpert", "exact_experts"]

EXACT_ROWS = 8
"""In fp32 on CPU a row of a product of 4 or more rows has the same bits whatever the other rows; of 1 to 3 it has others."""


class GroupedExperts(MegatronModule):
    """The SwiGLU experts of this rank: forward(tokens, tokens_per_expert, probs) -> (out, None).

    tokens [n, h] sorted by local expert, tokens_per_expert [E_local] ints, probs [n] weights applied before w2; out [n, h],
    partial sums over the expert-tensor-parallel group (core's dispatcher reduces them).
    fc1 [E_local, 2, F / etp, h] holds w1 (gate) and w3 (up), fc2 [E_local, h, F / etp] holds w2.
    Core's own grouped experts need Transformer Engine; its SequentialMLP loops in Python.
    """

    def __init__(
        self,
        num_local_experts: int,
        config: M1TransformerConfig,
        *,
        pg_collection: ProcessGroupCollection,
        name: str | None = None,
    ) -> None:
        super().__init__(config=config)
        self.ep_group, self.etp_group = pg_collection.ep, pg_collection.expt_tp
        self.expert_dp_group = pg_collection.expt_dp
        self.num_local_experts = num_local_experts
        self.exact = False
        hidden, width = config.m1.hidden_size, config.m1.intermediate_size // self.etp_group.size()
        device = torch.get_default_device()
        make = {"dtype": config.params_dtype, "device": device}
        self.fc1 = nn.Parameter(torch.empty(num_local_experts, 2, width, hidden, **make))
        self.fc2 = nn.Parameter(torch.empty(num_local_experts, hidden, width, **make))
        for weight in (self.fc1, self.fc2):
            # Always: core then keeps two optimizers in every layout, so that checkpoints load across layouts.
            weight.allreduce = False  # type: ignore[attr-defined]
            # No rank of the tensor-parallel group holds a duplicate: all of them count in the gradient norm.
            weight.tensor_model_parallel = True  # type: ignore[attr-defined]

    def forward(self, tokens: Tensor, tokens_per_expert: Tensor, probs: Tensor) -> tuple[Tensor, None]:
        ends = torch.cumsum(tokens_per_expert, dim=0, dtype=torch.int32).to(tokens.device)
        if self.exact:
            return self._exact(tokens, ends, probs), None
        return self._product(tokens, ends, probs), None

    def _exact(self, tokens: Tensor, ends: Tensor, probs: Tensor) -> Tensor:
        """Each group padded with zeros to a multiple of EXACT_ROWS, so that no row's bits depend on the size of its group."""
        counts = ends.diff(prepend=ends.new_zeros(1))
        padded_ends = ((counts + EXACT_ROWS - 1) // EXACT_ROWS * EXACT_ROWS).cumsum(0, dtype=torch.int32)
        shift = torch.cat([padded_ends.new_zeros(1), padded_ends[:-1]]) - (ends - counts)
        row = torch.arange(len(tokens), device=tokens.device)
        place = row + shift[torch.searchsorted(ends, row.to(ends.dtype), right=True)]
        rows = (-(-len(tokens) // EXACT_ROWS) + self.num_local_experts) * EXACT_ROWS
        padded_ends[-1] = rows
        spread = [x.new_zeros(rows, *x.shape[1:]).index_copy(0, place, x) for x in (tokens, probs)]
        return self._product(spread[0], padded_ends, spread[1]).index_select(0, place)

    def _product(self, tokens: Tensor, ends: Tensor, probs: Tensor) -> Tensor:
        gate_up = grouped_mm(tokens, self.fc1.flatten(1, 2).transpose(1, 2), offs=ends)
        return grouped_mm(swiglu(gate_up, probs), self.fc2.transpose(1, 2), offs=ends)

    def backward_dw(self) -> None:
        """Part of core's interface for delayed weight gradients, which these experts do not use."""

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> ShardedStateDict:
        ep, etp = (self.ep_group.rank(), self.ep_group.size()), (self.etp_group.rank(), self.etp_group.size())
        replica = (0, 0, self.expert_dp_group.rank())
        axes = {"fc1": 2, "fc2": 2}
        return {
            f"{prefix}{key}": ShardedTensor.from_rank_offsets(
                f"{prefix}{key}", getattr(self, key), (0, *ep), (axis, *etp), replica_id=replica
            )
            for key, axis in axes.items()
        }


@contextlib.contextmanager
def exact_experts(models: Iterable[nn.Module]) -> Iterator[None]:
    """Every token's output of the routed experts has, in fp32 on CPU, the same bits whatever tokens go with it, while the context is
    open; forward and backward cost up to EXACT_ROWS rows more per expert."""
    experts = [module for model in models for module in model.modules() if isinstance(module, GroupedExperts)]
    for module in experts:
        module.exact = True
    try:
        yield
    finally:
        for module in experts:
            module.exact = False


class SharedExpert(MegatronModule):
    """blend(y, routed) = routed * (1 - c) + down(silu(gate(y)) * up(y)) * c with c = sigmoid(coefficient(y)) in fp32.

    y, routed: [s, b, h]; the width is spread over the tensor-parallel group.  Source: the released modeling code,
    `shared_moe` in mode `sigmoid`.
    """

    def __init__(self, config: M1TransformerConfig, *, pg_collection: ProcessGroupCollection) -> None:
        super().__init__(config=config)
        hidden, width = config.m1.hidden_size, config.m1.shared_intermediate_size
        self.gate_proj = column_linear(config, hidden, width, pg_collection.tp)
        self.up_proj = column_linear(config, hidden, width, pg_collection.tp)
        self.down_proj = row_linear(config, width, hidden, pg_collection.tp)
        self.coefficient = nn.Linear(hidden, 1, bias=False, dtype=config.params_dtype)
        self.coefficient.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, hidden_states: Tensor, routed: Tensor) -> Tensor:
        gate, _ = self.gate_proj(hidden_states)
        up, _ = self.up_proj(hidden_states)
        shared, _ = self.down_proj(silu(gate) * up)
        share = torch.sigmoid(nn.functional.linear(hidden_states.float(), self.coefficient.weight.float()))
        return (routed.float() * (1.0 - share) + shared.float() * share).to(routed.dtype)
