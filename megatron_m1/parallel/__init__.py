"""Process groups and sequence layouts. The only importer of megatron.core.parallel_state."""

from megatron_m1.parallel.groups import destroy_groups, group_sizes, init_groups
from megatron_m1.parallel.sequence_layout import Padding, Piece, SequenceLayout, pad_documents
from megatron_m1.parallel.sequence_params import SequenceParams

__all__ = [
    "Padding",
    "Piece",
    "SequenceLayout",
    "SequenceParams",
    "destroy_groups",
    "group_sizes",
    "init_groups",
    "pad_documents",
]
