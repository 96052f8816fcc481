"""A micro-batch as the model takes it."""

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

__all__ = ["MicroBatch"]


@dataclass
class MicroBatch:
    """tokens, labels, position_ids [b, s] int64, loss_mask [b, s] fp32; with `packed` b is 1 and s all tokens of the micro-batch."""

    tokens: Tensor
    labels: Tensor
    loss_mask: Tensor
    position_ids: Tensor
    packed: PackedSeqParams | None = None
    padding_mask: Tensor | None = None
    """[b, s] bool, True where a token is padding."""

    @staticmethod
    def shape(batch: dict[str, Any]) -> tuple[int, int]:
        """(b, s) that `from_dict` gives to its tensors."""
        rows, length = batch["tokens"].shape
        return (1, rows * length) if batch.get("cu_seqlens") is not None else (rows, length)

    @classmethod
    def from_dict(cls, batch: dict[str, Any], device: torch.device) -> "MicroBatch":
        """From the data floor's dict (tensors [b, T], optionally cu_seqlens int32 [S+1] over the b*T tokens, padding_mask)."""
        tensors = {
            key: batch[key].to(device, non_blocking=True) for key in ("tokens", "labels", "loss_mask", "position_ids")
        }
        padding = batch.get("padding_mask")
        if padding is not None:
            tensors["padding_mask"] = padding.to(device, non_blocking=True)
        cu_seqlens = batch.get("cu_seqlens")
        if cu_seqlens is None:
            return cls(**tensors)
        cu_seqlens = cu_seqlens.to(device, non_blocking=True)
        packed = PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=cu_seqlens,
            cu_seqlens_kv=cu_seqlens,
            max_seqlen_q=int(batch["max_seqlen"]),
            max_seqlen_kv=int(batch["max_seqlen"]),
        )
        return cls(**{key: value.reshape(1, -1) for key, value in tensors.items()}, packed=packed)
