"""RMSNorm over the hidden size, and over the heads of all tensor-parallel ranks."""

from functools import partial

import torch
from m1_kernels import gated_rms_norm, rms_norm
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor, nn

__all__ = ["GatedRMSNorm", "RMSNorm"]


class RMSNorm(nn.Module):
    """RMSNorm of the last dimension, in fp32, returned in the input's dtype.

    Core's own (torch_norm.py) refuses sequence parallelism; here the weight carries the mark by which core sums its
    gradient over the tensor-parallel ranks.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class GatedRMSNorm(nn.Module):
    """sigmoid(gate) * ONE RMSNorm over the channels of all heads, which are spread over the tensor-parallel group.

    forward(x, gate) with x, gate [..., channels / tp] gives the local channels in x's dtype; over `group` one all-reduce of the sum
    of squares (fp32, [..., 1]), and one of the rows' inner products in the backward pass.
    Source: MiniMax-01 report, section 2.2, and the released code.
    """

    def __init__(
        self, config: TransformerConfig, channels: int, eps: float, group: torch.distributed.ProcessGroup
    ) -> None:
        super().__init__()
        self.channels, self.eps, self.group = channels, eps, group
        self.weight = nn.Parameter(torch.ones(channels // group.size(), dtype=config.params_dtype))
        self.weight.tensor_model_parallel = True  # type: ignore[attr-defined]
        self.weight.partition_dim = 0  # type: ignore[attr-defined]
        self.weight.partition_stride = 1  # type: ignore[attr-defined]

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        if self.group.size() == 1:
            return gated_rms_norm(x, gate, self.weight, self.eps)
        all_reduce = partial(torch.distributed.all_reduce, group=self.group)
        return gated_rms_norm(x, gate, self.weight, self.eps, channels=self.channels, all_reduce=all_reduce)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> ShardedStateDict:
        assert metadata is not None, "core passes metadata with the data-parallel group"
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            {"weight": 0},
            sharded_offsets,
            tp_group=self.group,
            dp_cp_group=metadata["dp_cp_group"],
        )
