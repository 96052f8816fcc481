"""Our configuration in Megatron-Core's terms: with `layer.py` the adapter that an upgrade of core touches."""

from typing import Any

import torch
from megatron.core.transformer import TransformerConfig

from megatron_m1.config.layout import head_chunk_tokens, head_parts
from megatron_m1.config.schema import Config, ModelConfig

__all__ = ["M1TransformerConfig", "core_config"]


class M1TransformerConfig(TransformerConfig):
    """Core's TransformerConfig which also carries the M1 architecture, for our own modules to read."""

    m1: ModelConfig
    context_lightning: str
    context_softmax: str
    head_chunk_tokens: int
    head_parts: int
    lightning_strategy: str


def core_config(config: Config) -> M1TransformerConfig:
    """Core configuration for the model, its layout and its precision."""
    model, moe, parallel, training = config.model, config.moe, config.parallel, config.training
    dtype = torch.float32 if training.precision == "fp32" else torch.bfloat16
    modes: dict[str, dict[str, Any]] = {
        "none": {},
        "selective": {"recompute_granularity": "selective", "recompute_modules": list(training.recompute_modules)},
        "full": {
            "recompute_granularity": "full",
            "recompute_method": "uniform",
            "recompute_num_layers": training.recompute_layers,
        },
    }
    core = M1TransformerConfig(
        num_layers=model.num_hidden_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_key_value_heads,
        kv_channels=model.head_dim,
        ffn_hidden_size=model.intermediate_size,
        moe_ffn_hidden_size=model.intermediate_size,
        num_moe_experts=model.num_local_experts,
        moe_router_topk=model.num_experts_per_tok,
        moe_router_pre_softmax=False,
        moe_router_dtype="fp32",
        moe_router_load_balancing_type="none",
        moe_aux_loss_coeff=0.0,
        moe_expert_capacity_factor=moe.capacity_factor,
        moe_token_dispatcher_type=moe.dispatcher,
        normalization="RMSNorm",
        layernorm_epsilon=model.rms_norm_eps,
        add_bias_linear=False,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bias_dropout_fusion=False,
        bias_activation_fusion=False,
        perform_initialization=False,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        pipeline_dtype=dtype,
        autocast_dtype=dtype,
        tensor_model_parallel_size=parallel.tensor,
        sequence_parallel=parallel.tensor > 1 if parallel.sequence is None else parallel.sequence,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None,
        num_layers_in_last_pipeline_stage=parallel.last_stage_layers,
        context_parallel_size=parallel.context,
        expert_model_parallel_size=parallel.expert,
        expert_tensor_parallel_size=parallel.tensor if parallel.expert_tensor is None else parallel.expert_tensor,
        variable_seq_lengths=False,
        batch_p2p_comm=False,
        gradient_accumulation_fusion=False,
        deterministic_mode=training.deterministic,
        calculate_per_token_loss=True,
        hetereogenous_dist_checkpoint=True,
        **modes[training.recompute],
    )
    core.m1 = model
    core.context_lightning, core.context_softmax = parallel.context_lightning, parallel.context_softmax
    core.head_chunk_tokens, core.head_parts = head_chunk_tokens(config), head_parts(config)
    core.lightning_strategy = training.lightning_strategy
    return core
