"""What the layers are told about the sequences of a micro-batch."""

from dataclasses import dataclass

from megatron.core.packed_seq_params import PackedSeqParams

from megatron_m1.parallel.sequence_layout import SequenceLayout

__all__ = ["SequenceParams"]


@dataclass
class SequenceParams(PackedSeqParams):
    """Core's parameters of a pack, which its block hands on to every layer, and the layout over context-parallel ranks.

    Without a layout, the cu_seqlens are those of the documents in this rank's pack. With one, they are absent: the layout says
    where documents begin, also for dense batches (qkv_format "sbhd").
    """

    layout: SequenceLayout | None = None
