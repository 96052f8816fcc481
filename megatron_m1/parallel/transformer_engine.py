"""Transformer Engine's softmax attention over context-parallel ranks, where asked for.

Never run by this project's tests, which have no Transformer Engine: they hold the arguments against its documented interface
(`transformer_engine.pytorch.DotProductAttention`, 2.2 and later) and that a missing package is refused.
"""

import itertools
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_m1 import platform
from megatron_m1.config.errors import ConfigError
from megatron_m1.config.schema import ParallelConfig
from megatron_m1.parallel.sequence_layout import SequenceLayout
from megatron_m1.platform.streams import side_stream
from megatron_m1.platform.transfer import upload

__all__ = ["TransformerEngineAttention", "constructor_arguments", "layout_arguments", "refuse_if_missing"]


def refuse_if_missing(parallel: ParallelConfig) -> None:
    """Raises ConfigError where parallel.context_softmax asks for Transformer Engine and this process cannot use it. Core wraps what its
    modules raise, so this comes before they are built."""
    found = platform.probe().transformer_engine
    if parallel.context > 1 and parallel.context_softmax == "transformer_engine" and not found.present:
        raise ConfigError(
            f"parallel.context_softmax=transformer_engine needs Transformer Engine, which is {found.reason}; install "
            "transformer-engine[pytorch] 2.2 or later, or use auto, ring or all_gather."
        )


class TransformerEngineAttention:
    """Causal softmax attention of one layer by Transformer Engine's ring ("p2p") over `group`.

    heads, key_heads: of this tensor-parallel rank. Plain Python: no module whose extra state would enter checkpoints.
    """

    def __init__(self, *, heads: int, key_heads: int, head_dim: int, scale: float, group: dist.ProcessGroup) -> None:
        from transformer_engine.pytorch import DotProductAttention

        arguments = constructor_arguments(heads=heads, key_heads=key_heads, head_dim=head_dim, scale=scale)
        self._attention = DotProductAttention(
            **arguments,
            cp_group=group,
            cp_global_ranks=dist.get_process_group_ranks(group),
            cp_stream=side_stream(),
            cp_comm_type="p2p",
        )

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, layout: SequenceLayout) -> Tensor:
        """o [B, T/W, Hq, D] of this rank's tokens, as `ring_attention`."""
        arguments = layout.memo(("transformer_engine", q.device), lambda: layout_arguments(layout, q.device))
        q, k, v = (x[0].contiguous() if layout.packed else x.contiguous() for x in (q, k, v))
        o = self._attention(q, k, v, **arguments).view(q.shape)
        return o.unsqueeze(0) if layout.packed else o


def constructor_arguments(*, heads: int, key_heads: int, head_dim: int, scale: float) -> dict[str, Any]:
    """What DotProductAttention is made with, but for the group; tensor parallelism is none of its business: it gets local heads."""
    return {
        "num_attention_heads": heads,
        "num_gqa_groups": key_heads,
        "kv_channels": head_dim,
        "attention_dropout": 0.0,
        "softmax_scale": scale,
        "attn_mask_type": "causal",
        "qkv_format": "bshd",
    }


def layout_arguments(layout: SequenceLayout, device: torch.device) -> dict[str, Any]:
    """What DotProductAttention's forward is told of the sequences. It cuts dense rows as we do, and packs document by document; it
    wants the documents' borders in the whole pack, and divides by the ranks itself.

    Raises ValueError for a pack that is cut as a whole.
    """
    if not layout.packed:
        return {"qkv_format": "bshd", "attn_mask_type": "causal"}
    pieces = layout.local_pieces
    if any(piece.document_length != 2 * layout.world * piece.length for piece in pieces):
        raise ValueError("Transformer Engine takes packs laid out by SequenceLayout.per_document only")
    lengths = [piece.document_length for piece in pieces if piece.chunk == layout.rank]
    edges = upload([0, *itertools.accumulate(lengths)], device, dtype=torch.int32)
    arguments: dict[str, Any] = {"qkv_format": "thd", "attn_mask_type": "padding_causal", "pad_between_seqs": False}
    for side in ("q", "kv"):
        # Padding is part of its document: what is padded and what is not have the same borders.
        arguments |= {f"cu_seqlens_{side}": edges, f"cu_seqlens_{side}_padded": edges}
        arguments[f"max_seqlen_{side}"] = max(lengths, default=0)
    return arguments
