"""transformers' MiniMaxForCausalLM made to compute MiniMax-M1, by data alone: its code runs unchanged in float32.

Where it differs from the released model and how that is corrected here:
- rotary: it turns channel pairs (j, j + D/2) of all D channels; M1 turns (j, j + R/2) of the first R. Its frequency buffer
  gets M1's R/2 frequencies and zeros, and the rows of q_proj and k_proj are reordered so that M1's pairs lie D/2 apart;
  scores do not depend on the order of channels, and the reordering is undone on gradients.
- slopes: 1 - l/(L-1+1e-5) + 1e-5 instead of 1 - l/(L-1) + 1e-5, and no ALiBi interpolation when H is no power of two: the
  decay buffers are rebuilt from M1's slopes.
- the lightning norm's eps is 1e-6 there as in M1; it is set from the configuration all the same.
In float64 three modules are replaced as well, because upstream casts inside them to float32 (see "float64 modules").
"""

import math

import torch
from torch import Tensor, nn
from transformers import MiniMaxConfig, MiniMaxForCausalLM
from transformers.models.minimax import modeling_minimax

from megatron_m1.config.schema import ModelConfig

__all__ = ["build_hf", "hf_config", "hf_gradients", "load_released_weights", "set_m1_rotary", "set_m1_slopes"]


def build_hf(
    model: ModelConfig,
    weights: dict[str, Tensor],
    *,
    dtype: torch.dtype = torch.float32,
    correct_rotary: bool = True,
    correct_slopes: bool = True,
) -> MiniMaxForCausalLM:
    """MiniMaxForCausalLM in training mode with `weights` (released names) in `dtype`, float32 or float64.

    correct_rotary, correct_slopes: False leaves that part as transformers has it. Raises ValueError for what transformers
    lacks: `postnorm: false` and the shared expert.
    """
    module = MiniMaxForCausalLM._from_config(hf_config(model), attn_implementation="sdpa", dtype=dtype)
    module.set_experts_implementation("eager")
    if dtype == torch.float64:
        use_float64_modules(module)
    if correct_rotary:
        set_m1_rotary(module, model)
    if correct_slopes:
        set_m1_slopes(module, model)
    for layer in module.model.layers:
        if isinstance(layer.self_attn, modeling_minimax.MiniMaxLightningAttention):
            layer.self_attn.norm.variance_epsilon = model.lightning_norm_eps
    load_released_weights(module, model, weights, reorder_rotary=correct_rotary)
    return module.train()


def hf_config(model: ModelConfig) -> MiniMaxConfig:
    """The MiniMaxConfig of `model`: its alphas, betas and layer types under the names that transformers reads."""
    if not model.postnorm:
        raise ValueError("transformers' MiniMax has no `postnorm: false`")
    if model.shared_intermediate_size:
        raise ValueError("transformers' MiniMax has no shared expert")
    return MiniMaxConfig(
        vocab_size=model.vocab_size,
        hidden_size=model.hidden_size,
        intermediate_size=model.intermediate_size,
        num_hidden_layers=model.num_hidden_layers,
        num_attention_heads=model.num_attention_heads,
        num_key_value_heads=model.num_key_value_heads,
        head_dim=model.head_dim,
        max_position_embeddings=model.max_position_embeddings,
        rms_norm_eps=model.rms_norm_eps,
        use_cache=False,
        num_experts_per_tok=model.num_experts_per_tok,
        num_local_experts=model.num_local_experts,
        rope_parameters={"rope_type": "default", "rope_theta": model.rope_theta},
        layer_types=["full_attention" if kind else "linear_attention" for kind in model.layer_types()],
        block_size=16,
        full_attn_alpha_factor=model.layernorm_full_attention_alpha,
        full_attn_beta_factor=model.layernorm_full_attention_beta,
        linear_attn_alpha_factor=model.layernorm_linear_attention_alpha,
        linear_attn_beta_factor=model.layernorm_linear_attention_beta,
        mlp_alpha_factor=model.layernorm_mlp_alpha,
        mlp_beta_factor=model.layernorm_mlp_beta,
    )


# --- corrections -----------------------------------------------------------------------------------------------------


def set_m1_rotary(module: MiniMaxForCausalLM, model: ModelConfig) -> None:
    """Give the rotary buffer M1's rotary_dim/2 frequencies, then zeros; q_proj and k_proj rows must be reordered to match."""
    inv_freq = torch.zeros(model.head_dim // 2, dtype=torch.float64)
    exponents = torch.arange(0, model.rotary_dim, 2, dtype=torch.float64) / model.rotary_dim
    inv_freq[: model.rotary_dim // 2] = model.rope_theta**-exponents
    buffer = module.model.rotary_emb.inv_freq
    module.model.rotary_emb.inv_freq = inv_freq.to(buffer.dtype)


def rotary_row_order(model: ModelConfig) -> Tensor:
    """Permutation of one head's D channels that puts M1's pairs (j, j + R/2) at (j, j + D/2)."""
    half_head, half_rotary = model.head_dim // 2, model.rotary_dim // 2
    untouched = list(range(model.rotary_dim, model.head_dim))
    first = list(range(half_rotary)) + untouched[: half_head - half_rotary]
    second = list(range(half_rotary, model.rotary_dim)) + untouched[half_head - half_rotary :]
    return torch.tensor(first + second)


def set_m1_slopes(module: MiniMaxForCausalLM, model: ModelConfig) -> None:
    """Rebuild the decay buffers of every lightning layer from M1's slopes."""
    base = torch.tensor(interpolated_slopes(model.num_attention_heads), dtype=torch.float64)
    for index, layer in enumerate(module.model.layers):
        attention = layer.self_attn
        if not isinstance(attention, modeling_minimax.MiniMaxLightningAttention):
            continue
        slope = (base * (1 - index / (model.num_hidden_layers - 1) + 1e-5))[:, None, None]
        decays = attention.decay_factors(slope)
        for name, value in zip(
            ["slope_rate", "query_decay", "key_decay", "diagonal_decay"], [slope, *decays], strict=True
        ):
            getattr(attention, name).copy_(value)


def interpolated_slopes(num_heads: int) -> list[float]:
    """The released get_slopes: a geometric sequence for powers of two, else interleaved from its two neighbours."""

    def geometric(n: int) -> list[float]:
        ratio = 2 ** (-(2 ** -(math.log2(n) - 3)))
        return [ratio ** (index + 1) for index in range(n)]

    closest = 1 << (num_heads.bit_length() - 1)
    if closest == num_heads:
        return geometric(num_heads)
    return geometric(closest) + geometric(2 * closest)[::2][: num_heads - closest]


# --- weights ---------------------------------------------------------------------------------------------------------


def load_released_weights(
    module: MiniMaxForCausalLM, model: ModelConfig, weights: dict[str, Tensor], *, reorder_rotary: bool
) -> None:
    """Copy every tensor of `weights` in place; raises KeyError if a parameter of `module` gets none."""
    order = rotary_row_order(model) if reorder_rotary else torch.arange(model.head_dim)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.endswith("experts.gate_up_proj"):
                gate, up = expert_stack(name, weights, model, "w1"), expert_stack(name, weights, model, "w3")
                parameter.copy_(torch.cat([gate, up], dim=1))
            elif name.endswith("experts.down_proj"):
                parameter.copy_(expert_stack(name, weights, model, "w2"))
            elif name.endswith(("q_proj.weight", "k_proj.weight")):
                parameter.copy_(reorder_rows(weights[name], order))
            else:
                parameter.copy_(weights[released_name(name)])


def hf_gradients(module: MiniMaxForCausalLM, model: ModelConfig, *, reorder_rotary: bool = True) -> dict[str, Tensor]:
    """Gradients of every parameter under the released names and in the released layout."""
    order = rotary_row_order(model) if reorder_rotary else torch.arange(model.head_dim)
    gradients = {}
    for name, parameter in module.named_parameters():
        if name.endswith("experts.gate_up_proj"):
            for expert, gate_up in enumerate(parameter.grad):
                gate, up = gate_up.chunk(2)
                gradients[expert_name(name, expert, "w1")] = gate
                gradients[expert_name(name, expert, "w3")] = up
        elif name.endswith("experts.down_proj"):
            for expert, down in enumerate(parameter.grad):
                gradients[expert_name(name, expert, "w2")] = down
        elif name.endswith(("q_proj.weight", "k_proj.weight")):
            gradients[name] = reorder_rows(parameter.grad, order.argsort())
        else:
            gradients[released_name(name)] = parameter.grad
    return gradients


def released_name(name: str) -> str:
    return name.replace(".mlp.", ".block_sparse_moe.")


def expert_name(name: str, expert: int, matrix: str) -> str:
    return f"{released_name(name).rsplit('.', 1)[0]}.{expert}.{matrix}.weight"


def expert_stack(name: str, weights: dict[str, Tensor], model: ModelConfig, matrix: str) -> Tensor:
    return torch.stack([weights[expert_name(name, expert, matrix)] for expert in range(model.num_local_experts)])


def reorder_rows(weight: Tensor, order: Tensor) -> Tensor:
    return weight.unflatten(0, (-1, len(order)))[:, order].flatten(0, 1)


# --- float64 modules -------------------------------------------------------------------------------------------------


def use_float64_modules(module: nn.Module) -> None:
    """Replace the classes whose forward casts to float32 (norm, router, rotary tables) and widen the rotary buffer."""
    for child in module.modules():
        if type(child) in FLOAT64_CLASSES:
            child.__class__ = FLOAT64_CLASSES[type(child)]
        if isinstance(child, modeling_minimax.MiniMaxRotaryEmbedding):
            child.inv_freq = child.inv_freq.double()


class RMSNorm64(modeling_minimax.MiniMaxRMSNorm):
    def forward(self, hidden_states: Tensor) -> Tensor:
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
        return self.weight * (hidden_states * torch.rsqrt(variance + self.variance_epsilon))


class TopKRouter64(modeling_minimax.MiniMaxTopKRouter):
    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        router_logits = nn.functional.linear(hidden_states.reshape(-1, self.hidden_dim), self.weight)
        scores, indices = router_logits.softmax(dim=-1).topk(self.top_k, dim=-1)
        return router_logits, scores / scores.sum(dim=-1, keepdim=True), indices


class RotaryEmbedding64(modeling_minimax.MiniMaxRotaryEmbedding):
    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        angles = (position_ids[..., None] * self.inv_freq).repeat(1, 1, 2)
        return angles.cos(), angles.sin()


FLOAT64_CLASSES = {
    modeling_minimax.MiniMaxRMSNorm: RMSNorm64,
    modeling_minimax.MiniMaxTopKRouter: TopKRouter64,
    modeling_minimax.MiniMaxRotaryEmbedding: RotaryEmbedding64,
}
