"""The model: embedding, hybrid stack, final norm, fp32 head."""

from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import gather_from_tensor_model_parallel_region
from megatron.core.transformer.enums import ModelType
from megatron.core.transformer.transformer_block import (
    TransformerBlock,
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch import Tensor

from megatron_m1.config.schema import MoEConfig
from megatron_m1.model.cache import AttentionCache
from megatron_m1.model.head import VocabHead
from megatron_m1.model.layer import layer_spec
from megatron_m1.model.norm import RMSNorm
from megatron_m1.model.softmax import rotary_table
from megatron_m1.model.transformer_config import M1TransformerConfig

__all__ = ["M1Model"]


class M1Model(LanguageModule):
    """The pipeline stage (chunk) of MiniMax-M1 that this rank holds, on core's parts.

    Our own class because GPTModel is deprecated upstream and its successor HybridModel needs Transformer Engine.
    """

    def __init__(
        self,
        config: M1TransformerConfig,
        *,
        moe: MoEConfig,
        pg_collection: ProcessGroupCollection,
        pre_process: bool = True,
        post_process: bool = True,
        vp_stage: int | None = None,
    ) -> None:
        super().__init__(config=config, pg_collection=pg_collection)
        m1 = config.m1
        self.pre_process, self.post_process, self.vp_stage = pre_process, post_process, vp_stage
        self.model_type = ModelType.encoder_or_decoder
        self.share_embeddings_and_output_weights = False
        pp_rank = pg_collection.pp.rank()
        first = get_transformer_layer_offset(config, vp_stage, pp_rank)
        count = get_num_layers_to_build(config, vp_stage, pp_rank)
        kinds = m1.layer_types()[first : first + count]

        if pre_process:
            self.embedding = LanguageModelEmbedding(
                config=config,
                vocab_size=m1.vocab_size,
                max_sequence_length=m1.max_position_embeddings,
                position_embedding_type="rope",
                tp_group=pg_collection.tp,
            )
        self.decoder = TransformerBlock(
            config=config,
            spec=TransformerBlockSubmodules(layer_specs=[layer_spec(kind, moe) for kind in kinds], layer_norm=RMSNorm),
            pre_process=pre_process,
            post_process=post_process,
            pg_collection=pg_collection,
            vp_stage=vp_stage,
        )
        if post_process:
            self.output_layer = VocabHead(config, pg_collection)
        self.setup_embeddings_and_output_layer()

    def set_input_tensor(self, input_tensor: list[Tensor] | Tensor) -> None:
        """Take the activations of the previous pipeline stage (called by core's schedules)."""
        self.decoder.set_input_tensor(input_tensor[0] if isinstance(input_tensor, list) else input_tensor)

    def forward(
        self,
        tokens: Tensor,
        position_ids: Tensor,
        *,
        labels: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        padding_mask: Tensor | None = None,
        inference_context: AttentionCache | None = None,
    ) -> Tensor:
        """Per-token negative log-likelihood [b, s] fp32 if labels [b, s] are given, else logits [b, s, V] fp32 (gathered over the
        tensor-parallel group); on a pipeline stage before the last, the activations [s, b, h].

        tokens, position_ids: [b, s] int64 (b = 1 with packed_seq_params); padding_mask: [b, s] bool, True where padding.
        inference_context: tokens [1, n] continue the sequences it holds; this rank's logits of the rows it names [1, m, V/TP].
        """
        m1 = self.config.m1
        hidden = self.embedding(tokens, position_ids) if self.pre_process else None
        if padding_mask is not None and self.config.sequence_parallel:
            padding_mask = padding_mask.chunk(self.tp_group.size(), dim=1)[self.tp_group.rank()]
        hidden = self.decoder(
            hidden,
            attention_mask=None,
            rotary_pos_emb=rotary_table(position_ids, m1.rotary_dim, m1.rope_theta),
            packed_seq_params=packed_seq_params,
            padding_mask=padding_mask,
            inference_context=inference_context,
        )
        if not self.post_process:
            return hidden
        if inference_context is not None:
            return self.output_layer(inference_context.predicting(hidden)).transpose(0, 1)
        if labels is not None:
            return self.output_layer(hidden, labels)
        logits = gather_from_tensor_model_parallel_region(self.output_layer(hidden), group=self.tp_group)
        return logits.transpose(0, 1).contiguous()
