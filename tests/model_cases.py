"""Small M1 configurations that make each property of the architecture visible, and random weights for them."""

import zlib
from dataclasses import replace
from math import sqrt

import torch
from torch import Tensor

from megatron_m1.config.schema import ModelConfig

__all__ = ["CASES", "ORACLE_ONLY_CASES", "SMALL_V_CASES", "random_batch", "random_weights", "weight_shapes"]

BASE = ModelConfig(
    vocab_size=67,
    hidden_size=48,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    intermediate_size=40,
    num_local_experts=4,
    attn_type_list=[0, 0, 0, 1],
    rotary_dim=8,
    layernorm_linear_attention_alpha=1.7,
    layernorm_linear_attention_beta=0.9,
    layernorm_full_attention_alpha=1.3,
    layernorm_full_attention_beta=1.1,
    layernorm_mlp_alpha=1.5,
    layernorm_mlp_beta=0.8,
)
M1_ALPHAS = dict.fromkeys(
    [f"layernorm_{part}_alpha" for part in ("linear_attention", "full_attention", "mlp")], 3.5565588200778455
) | dict.fromkeys([f"layernorm_{part}_beta" for part in ("linear_attention", "full_attention", "mlp")], 1.0)

CASES: dict[str, ModelConfig] = {
    "base": BASE,
    "m1_alphas": replace(BASE, hidden_size=64, num_local_experts=8, **M1_ALPHAS),
    "gqa_1": replace(BASE, num_key_value_heads=4, rotary_dim=16, attn_type_list=[0, 1, 0, 1]),
    "gqa_8": replace(BASE, hidden_size=96, num_attention_heads=8, num_key_value_heads=1, head_dim=8, rotary_dim=4),
    "heads_6": replace(
        BASE, num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=3, attn_type_list=[0, 1, 0]
    ),
    "heads_12_gqa_4": replace(
        BASE, num_attention_heads=12, num_key_value_heads=3, head_dim=8, rotary_dim=4,
        attn_type_list=[0, 0, 1, 0], rope_theta=1e4,
    ),
    "softmax_first": replace(BASE, num_hidden_layers=5, num_local_experts=6, attn_type_list=[1, 0, 0, 1, 0]),
    "softmax_only": replace(BASE, num_hidden_layers=3, attn_type_list=[1, 1, 1]),
    "lightning_only_top3": replace(
        BASE, num_hidden_layers=6, num_attention_heads=3, num_key_value_heads=1, attn_type_list=[0] * 6,
        num_local_experts=5, num_experts_per_tok=3,
    ),
    "small_lightning": replace(BASE, hidden_size=32, attn_type_list=[0, 0, 1, 0]),
    "small_lightning_heads_6": replace(BASE, num_attention_heads=6, num_key_value_heads=6, head_dim=8, rotary_dim=4),
}  # fmt: skip
"""Configurations that transformers has too."""

ORACLE_ONLY_CASES: dict[str, ModelConfig] = {
    "prenorm": replace(BASE, postnorm=False),
    "shared_expert": replace(BASE, shared_intermediate_size=24),
    "prenorm_shared_expert_heads_6": replace(
        BASE, postnorm=False, shared_intermediate_size=56, num_attention_heads=6, attn_type_list=[1, 0, 1, 0]
    ),
}

SMALL_V_CASES = {"small_lightning": 1e-3, "small_lightning_heads_6": 1e-3}
"""Factor on the v rows of the lightning qkv_proj: the mean square of o comes near the lightning norm's eps."""


def random_weights(
    model: ModelConfig, seed: int, dtype: torch.dtype = torch.float64, *, v_scale: float = 1.0
) -> dict[str, Tensor]:
    """Every tensor of the model under its released name, its values a function of (seed, name) alone.

    Matrices have unit gain; norm weights lie around 1; the router and the softmax layers' queries and keys are enlarged so
    that routing and positions matter. v_scale multiplies the v rows of the lightning layers.
    """
    weights = {}
    for name, shape in weight_shapes(model).items():
        generator = torch.Generator().manual_seed(seed * 1_000_003 + zlib.crc32(name.encode()))
        values = torch.randn(shape, generator=generator, dtype=torch.float64)
        if name.endswith("norm.weight"):
            values = 1 + 0.2 * values
        elif name != "model.embed_tokens.weight":
            values = values / sqrt(shape[-1]) * gain(name)
        if name.endswith("self_attn.qkv_proj.weight"):
            values.unflatten(0, (model.num_attention_heads, 3, model.head_dim))[:, 2] *= v_scale
        weights[name] = values.to(dtype)
    return weights


def gain(name: str) -> float:
    if name.endswith(("block_sparse_moe.gate.weight", "q_proj.weight", "k_proj.weight")):
        return 2.0
    return 1.0


def weight_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Released name -> shape, in the order of the layers."""
    h, D = model.hidden_size, model.head_dim
    q_rows, kv_rows = model.num_attention_heads * D, model.num_key_value_heads * D
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (model.vocab_size, h)}
    for layer, kind in enumerate(model.layer_types()):
        prefix = f"model.layers.{layer}."
        shapes[prefix + "input_layernorm.weight"] = (h,)
        if kind == 0:
            shapes[prefix + "self_attn.qkv_proj.weight"] = (3 * q_rows, h)
            shapes[prefix + "self_attn.output_gate.weight"] = (q_rows, h)
            shapes[prefix + "self_attn.norm.weight"] = (q_rows,)
            shapes[prefix + "self_attn.out_proj.weight"] = (h, q_rows)
        else:
            shapes[prefix + "self_attn.q_proj.weight"] = (q_rows, h)
            shapes[prefix + "self_attn.k_proj.weight"] = (kv_rows, h)
            shapes[prefix + "self_attn.v_proj.weight"] = (kv_rows, h)
            shapes[prefix + "self_attn.o_proj.weight"] = (h, q_rows)
        shapes[prefix + "post_attention_layernorm.weight"] = (h,)
        shapes[prefix + "block_sparse_moe.gate.weight"] = (model.num_local_experts, h)
        for expert in range(model.num_local_experts):
            for matrix in ("w1", "w3"):
                shapes[f"{prefix}block_sparse_moe.experts.{expert}.{matrix}.weight"] = (model.intermediate_size, h)
            shapes[f"{prefix}block_sparse_moe.experts.{expert}.w2.weight"] = (h, model.intermediate_size)
        if model.shared_intermediate_size:
            shapes[prefix + "shared_mlp.gate_proj.weight"] = (model.shared_intermediate_size, h)
            shapes[prefix + "shared_mlp.up_proj.weight"] = (model.shared_intermediate_size, h)
            shapes[prefix + "shared_mlp.down_proj.weight"] = (h, model.shared_intermediate_size)
            shapes[prefix + "coefficient.weight"] = (1, h)
    shapes["model.norm.weight"] = (h,)
    shapes["lm_head.weight"] = (model.vocab_size, h)
    return shapes


def random_batch(model: ModelConfig, seed: int, batch: int = 2, length: int = 37) -> tuple[Tensor, Tensor]:
    """token_ids and labels, int64 [batch, length]; labels are the next tokens."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(model.vocab_size, (batch, length + 1), generator=generator)
    return tokens[:, :-1], tokens[:, 1:]
