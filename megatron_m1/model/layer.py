"""One decoder layer: post-norm residuals with a weight per branch."""

import copy
from functools import partial

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import checkpoint
from megatron.core.tensor_parallel.mappings import (
    gather_from_sequence_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor

from megatron_m1.config.schema import MoEConfig
from megatron_m1.model.cache import AttentionCache
from megatron_m1.model.experts import GroupedExperts, SharedExpert
from megatron_m1.model.lightning import LightningAttention
from megatron_m1.model.norm import RMSNorm
from megatron_m1.model.router import M1Router
from megatron_m1.model.softmax import SoftmaxAttention
from megatron_m1.model.transformer_config import M1TransformerConfig
from megatron_m1.parallel import SequenceParams

__all__ = ["M1Layer", "layer_spec"]

LIGHTNING, SOFTMAX = 0, 1


class M1Layer(TransformerLayer):
    """x = norm(h); h = alpha_attn * (x or h) + beta_attn * attention(x); y = norm(h); h = alpha_mlp * (y or h) + beta_mlp * moe(y)

    (x and y with `postnorm`, the released models' setting; h without.)  forward(hidden_states [s, b, h]) ->
    ([s, b, h], None). A subclass of core's layer so that its block, recomputation and checkpoints know it; core's
    bias-dropout-add cannot express these residuals, so forward is ours.
    """

    def __init__(
        self,
        config: M1TransformerConfig,
        submodules: TransformerLayerSubmodules,
        layer_number: int = 1,
        pg_collection: ProcessGroupCollection | None = None,
        vp_stage: int | None = None,
    ) -> None:
        super().__init__(
            config=config,
            submodules=submodules,
            layer_number=layer_number,
            pg_collection=pg_collection,
            vp_stage=vp_stage,
        )
        m1 = config.m1
        softmax = m1.layer_types()[self.layer_number - 1] == SOFTMAX
        kind = "full_attention" if softmax else "linear_attention"
        self.postnorm = m1.postnorm
        self.attention_alpha: float = getattr(m1, f"layernorm_{kind}_alpha")
        self.attention_beta: float = getattr(m1, f"layernorm_{kind}_beta")
        self.mlp_alpha, self.mlp_beta = m1.layernorm_mlp_alpha, m1.layernorm_mlp_beta
        self.shared_mlp = SharedExpert(config, pg_collection=pg_collection) if m1.shared_intermediate_size else None
        # Core would recompute inside the MoE layer, where the experts to replay cannot be told.
        self.recompute_experts, self.mlp.moe_layer_recompute = self.mlp.moe_layer_recompute, False
        # Core's experts want distinct tokens on each tensor-parallel rank; without sequence parallelism we scatter for them.
        self.scatter_for_experts = self.tp_group.size() > 1 and not config.sequence_parallel

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        context: Tensor | None = None,
        context_mask: Tensor | None = None,
        rotary_pos_emb: Tensor | None = None,
        rotary_pos_cos: Tensor | None = None,
        rotary_pos_sin: Tensor | None = None,
        rotary_pos_cos_sin: Tensor | None = None,
        attention_bias: Tensor | None = None,
        inference_context: AttentionCache | None = None,
        packed_seq_params: SequenceParams | None = None,
        sequence_len_offset: Tensor | None = None,
        padding_mask: Tensor | None = None,
    ) -> tuple[Tensor, None]:
        x = self.input_layernorm(hidden_states)
        out, _ = self.self_attention(
            x,
            rotary_pos_emb=rotary_pos_emb,
            packed_seq_params=packed_seq_params,
            inference_context=inference_context,
        )
        residual = x if self.postnorm else hidden_states
        hidden_states = _weighted_sum(residual, out, self.attention_alpha, self.attention_beta)

        y = self.pre_mlp_layernorm(hidden_states)
        recorded = self._recorded(packed_seq_params)

        def experts(y: Tensor) -> Tensor:
            with self.mlp.router.replaying(recorded):
                return self._experts(y, padding_mask)

        out = checkpoint(experts, False, y) if self.recompute_experts and self.training else experts(y)
        if self.shared_mlp is not None:
            out = self.shared_mlp(y, out)
        residual = y if self.postnorm else hidden_states
        return _weighted_sum(residual, out, self.mlp_alpha, self.mlp_beta), None

    def _recorded(self, packed: SequenceParams | None) -> Tensor | None:
        """Experts [s, b, top_k] recorded for the tokens that this rank's router sees, a shard of them under tensor parallelism."""
        if packed is None or packed.routing is None:
            return None
        recorded = packed.routing[:, :, self.layer_number - 1].transpose(0, 1)
        return recorded.chunk(self.tp_group.size())[self.tp_group.rank()]

    def _experts(self, y: Tensor, padding_mask: Tensor | None) -> Tensor:
        """padding_mask: [b, s], s as in y: local under sequence parallelism."""
        if not self.scatter_for_experts:
            return self.mlp(y, padding_mask=padding_mask)[0]
        if padding_mask is not None:
            padding_mask = padding_mask.chunk(self.tp_group.size(), dim=1)[self.tp_group.rank()]
        local = scatter_to_sequence_parallel_region(y, group=self.tp_group)
        out, _ = self.mlp(local, padding_mask=padding_mask)
        return gather_from_sequence_parallel_region(out, tensor_parallel_output_grad=False, group=self.tp_group)


def _weighted_sum(residual: Tensor, branch: Tensor, alpha: float, beta: float) -> Tensor:
    branch = branch if beta == 1.0 else branch * beta
    return torch.add(branch, residual, alpha=alpha)


def layer_spec(kind: int, moe: MoEConfig) -> ModuleSpec:
    """Core's specification of one layer; kind 0 lightning, 1 softmax."""
    attention = SoftmaxAttention if kind == SOFTMAX else LightningAttention
    return ModuleSpec(
        module=M1Layer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=RMSNorm,
            self_attention=ModuleSpec(module=attention),
            pre_mlp_layernorm=RMSNorm,
            mlp=partial(_moe_layer, moe=moe),
            sharded_state_dict_keys_map={"pre_mlp_layernorm.": "post_attention_layernorm."},
        ),
    )


def _moe_layer(
    *,
    moe: MoEConfig,
    config: M1TransformerConfig,
    pg_collection: ProcessGroupCollection,
    is_mtp_layer: bool,
    name: str | None = None,
) -> MoELayer:
    if pg_collection.tp.size() > 1 and not config.sequence_parallel:
        config = copy.copy(config)
        config.sequence_parallel = True
    return MoELayer(
        config=config,
        submodules=MoESubmodules(experts=GroupedExperts, router=partial(M1Router, moe=moe)),
        pg_collection=pg_collection,
        is_mtp_layer=is_mtp_layer,
    )
