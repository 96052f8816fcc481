"""A micro-batch as the model takes it."""

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_m1.parallel import Padding, SequenceLayout, SequenceParams, pad_documents

__all__ = ["MicroBatch"]

FILLS = {"padding_mask": True, "routing": -1}
"""What a tensor holds at padding between documents; 0 for all others."""


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
    places: Tensor | None = None
    """int64, where the caller's tokens lie among the s of all context-parallel ranks; None: all of them are the caller's."""

    @staticmethod
    def shape(batch: dict[str, Any]) -> tuple[int, int]:
        """(b, s) of all context-parallel ranks together."""
        rows, length = batch["tokens"].shape
        return (1, rows * length) if batch.get("cu_seqlens") is not None else (rows, length)

    @classmethod
    def padded_tokens(cls, batch: dict[str, Any], *, unit: int) -> int:
        """Tokens of a pack whose documents are padded to multiples of `unit`, of all context-parallel ranks together."""
        return pad_documents(batch["cu_seqlens"].tolist(), tokens=cls.shape(batch)[1], unit=unit).tokens

    @classmethod
    def from_dict(
        cls,
        batch: dict[str, Any],
        device: torch.device,
        *,
        context_rank: int = 0,
        context_size: int = 1,
        padded_tokens: int | None = None,
    ) -> "MicroBatch":
        """This rank's part of the data floor's dict, which is the same on all context-parallel ranks.

        batch: tensors [b, T], optionally cu_seqlens int32 [S+1] over the b*T tokens, padding_mask, per_token (a dict of tensors),
        routing [b, T, layers, top_k] (see SequenceParams).
        Under context parallelism a pack is cut as a whole (`SequenceLayout.pack`), rows of a dense batch one by one; b*T, or T, must
        be a multiple of 2 * context_size.
        padded_tokens: a multiple of 2 * context_size; every document of a pack is then cut by itself (`SequenceLayout.per_document`),
        padded to such multiples, and the pack to `padded_tokens`.
        """
        keys = ["tokens", "labels", "loss_mask", "position_ids"]
        if batch.get("padding_mask") is not None:
            keys.append("padding_mask")
        shape = cls.shape(batch)
        per_token = batch.get("per_token", {})
        tensors = {key: value.reshape(shape) for key, value in ({k: batch[k] for k in keys} | per_token).items()}
        if batch.get("routing") is not None:
            tensors["routing"] = batch["routing"].reshape(*shape, *batch["routing"].shape[2:])
        padding = None
        if padded_tokens is not None:
            tensors.setdefault("padding_mask", torch.zeros(shape, dtype=torch.bool))
            keys = list(dict.fromkeys([*keys, "padding_mask"]))
            cu_seqlens, unit = batch["cu_seqlens"].tolist(), 2 * context_size
            padding = pad_documents(cu_seqlens, tokens=shape[1], unit=unit, length=padded_tokens)
            tensors = {key: padding.apply(value, FILLS.get(key, 0)) for key, value in tensors.items()}
        if context_size > 1:
            layout = _layout(batch, shape, padding, context_rank, context_size)
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
            places=None if padding is None else padding.places().to(device, non_blocking=True),
        )

    def gather(self, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        """x [b, s] of all ranks of the context-parallel group as one [b, T] in the order of the caller's tokens (T of a pack: b*T)."""
        if group.size() == 1:
            return x
        assert self.packed is not None and self.packed.layout is not None
        parts = [torch.empty_like(x) for _ in range(group.size())]
        dist.all_gather(parts, x.contiguous(), group=group)
        whole = self.packed.layout.unpartition(torch.cat(parts, dim=1), 1)
        return whole if self.places is None else whole.index_select(1, self.places)


def _layout(
    batch: dict[str, Any], shape: tuple[int, int], padding: Padding | None, rank: int, world: int
) -> SequenceLayout:
    rows, tokens = shape
    if padding is not None:
        return SequenceLayout.per_document(world=world, rank=rank, cu_seqlens=padding.cu_seqlens)
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
