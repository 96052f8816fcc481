"""The language-model head: fp32 in training and inference, rows of the vocabulary spread over the tensor-parallel ranks."""

import copy

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor

from megatron_m1.model.split_products import split_linear
from megatron_m1.model.transformer_config import M1TransformerConfig
from megatron_m1.model.vocab_loss import vocab_parallel_nll

__all__ = ["VocabHead"]


class VocabHead(ColumnParallelLinear):
    """Logits, or the losses of given labels without the logits of all tokens at once.

    The loss is part of this module's call, not a function of its weight, because core's data-parallel wrapper waits for gathered
    weights in the forward pre-hooks of the modules that own them.
    """

    def __init__(self, config: M1TransformerConfig, pg_collection: ProcessGroupCollection) -> None:
        fp32 = copy.copy(config)
        fp32.params_dtype = torch.float32
        super().__init__(
            config.m1.hidden_size,
            config.m1.vocab_size,
            config=fp32,
            init_method=torch.nn.init.zeros_,
            bias=False,
            gather_output=False,
            tp_group=pg_collection.tp,
        )

    def forward(self, hidden: Tensor, labels: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """Negative log-likelihood [b, s] fp32 of `labels` [b, s], else this rank's logits [s, b, V/TP] fp32.

        hidden: [s, b, h], a sequence shard under sequence parallelism. training.head_chunk_tokens bounds the logits of the losses,
        training.head_products says how both are multiplied.
        """
        weight_parts = self.config.head_parts
        if labels is None and weight_parts == 1:
            return super().forward(hidden.float())[0]
        if labels is None:
            spread = (
                gather_from_sequence_parallel_region if self.sequence_parallel else copy_to_tensor_model_parallel_region
            )
            return split_linear(spread(hidden, group=self.tp_group), self.weight, weight_parts)
        return vocab_parallel_nll(
            hidden,
            self.weight,
            labels,
            group=self.tp_group,
            sequence_parallel=self.sequence_parallel,
            chunk_tokens=self.config.head_chunk_tokens,
            weight_parts=weight_parts,
        )
