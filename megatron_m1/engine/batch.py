"""A micro-batch as the model takes it."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from megatron_m1.parallel import SequenceLayout, SequenceParams

__all__ = ["MicroBatch"]


@dataclass
class MicroBatch:
    """tokens, labels, position_ids [b, s] int64, loss_mask [b, s] fp32: the tokens of this context-parallel rank.

    Of a pack b is 1 and s all tokens of the micro-batch, over the context-parallel ranks.
    """

    tokens: Tensor
    labels: Tensor
    loss_mask: Tensor
    position_ids: Tensor
    packed: SequenceParams | None = None
    padding_mask: Tensor | None = None
    """[b, s] bool, True where a token is padding."""
    per_token: dict[str, Tensor] = field(default_factory=dict)
    """What a stage's own loss reads, [b, s] each."""

    @staticmethod
    def shape(batch: dict[str, Any]) -> tuple[int, int]:
        """(b, s) of all context-parallel ranks together."""
        rows, length = batch["tokens"].shape
        return (1, rows * length) if batch.get("cu_seqlens") is not None else (rows, length)

    @classmethod
    def from_dict(
        cls, batch: dict[str, Any], device: torch.device, *, context_rank: int = 0, context_size: int = 1
    ) -> "MicroBatch":
        """This rank's part of the data floor's dict, which is the same on all context-parallel ranks.

        batch: tensors [b, T], optionally cu_seqlens int32 [S+1] over the b*T tokens, padding_mask, per_token (a dict of tensors),
        routing [b, T, layers, top_k] (see SequenceParams).
        Under context parallelism a pack is cut as a whole (`SequenceLayout.pack`), rows of a dense batch one by one; b*T, or T, must
        be a multiple of 2 * context_size.
        """
        keys = ["tokens", "labels", "loss_mask", "position_ids"]
        if batch.get("padding_mask") is not None:
            keys.append("padding_mask")
        shape = cls.shape(batch)
        per_token = batch.get("per_token", {})
        tensors = {key: value.reshape(shape) for key, value in ({k: batch[k] for k in keys} | per_token).items()}
        if batch.get("routing") is not None:
            tensors["routing"] = batch["routing"].reshape(*shape, *batch["routing"].shape[2:])
        if context_size > 1:
            layout = _layout(batch, shape, context_rank, context_size)
            params: SequenceParams | None = SequenceParams(qkv_format="thd" if layout.packed else "sbhd", layout=layout)
            tensors = {key: layout.partition(value, 1) for key, value in tensors.items()}
        else:
            params = _whole_pack(batch, device)
        tensors = {key: value.to(device, non_blocking=True) for key, value in tensors.items()}
        if "routing" in tensors:
            params = params or SequenceParams(qkv_format="sbhd")
            params.routing = tensors["routing"]
        return cls(
            **{key: tensors[key] for key in keys},
            packed=params,
            per_token={key: tensors[key] for key in per_token},
        )


def _layout(batch: dict[str, Any], shape: tuple[int, int], rank: int, world: int) -> SequenceLayout:
    rows, tokens = shape
    if batch.get("cu_seqlens") is None:
        return SequenceLayout.dense(world=world, rank=rank, rows=rows, tokens=tokens)
    return SequenceLayout.pack(world=world, rank=rank, cu_seqlens=batch["cu_seqlens"].tolist(), tokens=tokens)


def _whole_pack(batch: dict[str, Any], device: torch.device) -> SequenceParams | None:
    if batch.get("cu_seqlens") is None:
        return None
    cu_seqlens = batch["cu_seqlens"].to(device, non_blocking=True)
    longest = int(batch["max_seqlen"])
    return SequenceParams(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )
