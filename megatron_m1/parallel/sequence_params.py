"""What the layers are told about the sequences of a micro-batch."""

from dataclasses import dataclass, field

from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megatron_m1.parallel.sequence_layout import SequenceLayout

__all__ = ["KeptAttention", "SequenceParams"]


class KeptAttention:
    """Output and log-sum-exp of one layer's softmax attention, from the forward pass of a checkpoint until it is repeated."""

    def __init__(self) -> None:
        self._result: tuple[Tensor, Tensor] | None = None

    def put(self, o: Tensor, lse: Tensor) -> None:
        self._result = o, lse

    def take(self) -> tuple[Tensor, Tensor] | None:
        """What was put last, once."""
        result, self._result = self._result, None
        return result


@dataclass
class SequenceParams(PackedSeqParams):
    """Core's parameters of a pack, which its block hands on to every layer, and the layout over context-parallel ranks.

    Without a layout, the cu_seqlens are those of the documents in this rank's pack. With one, they are absent: the layout says
    where documents begin, also for dense batches (qkv_format "sbhd").

    routing: [b, s, layers of the model, top_k] int16, experts that the tokens of this context-parallel rank are sent to, whatever the
    router would choose now; -1 where it chooses. It travels here because core hands these parameters, and no others, to every layer
    again when it recomputes activations.
    attention: by number of the layer, for the same reason.
    """

    layout: SequenceLayout | None = None
    routing: Tensor | None = None
    attention: dict[int, KeptAttention] = field(default_factory=dict)
