"""What the layers are told about the sequences of a micro-batch."""

from dataclasses import dataclass

from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megatron_m1.parallel.sequence_layout import SequenceLayout

__all__ = ["SequenceParams"]


@dataclass
class SequenceParams(PackedSeqParams):
    """Core's parameters of a pack, which its block hands on to every layer, and the layout over context-parallel ranks.

    Without a layout, the cu_seqlens are those of the documents in this rank's pack. With one, they are absent: the layout says
    where documents begin, also for dense batches (qkv_format "sbhd").

    routing: [b, s, layers of the model, top_k] int16, experts that the tokens of this context-parallel rank are sent to, whatever the
    router would choose now; -1 where it chooses. It travels here because core hands these parameters, and no others, to every layer
    again when it recomputes activations.
    """

    layout: SequenceLayout | None = None
    routing: Tensor | None = None
