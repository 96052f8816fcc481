"""Floating-point operations of the hybrid, for rates."""

from megatron_m1.config.schema import ModelConfig

__all__ = ["train_flops_per_token"]


def train_flops_per_token(model: ModelConfig, seq_length: int) -> float:
    """Matrix-product FLOPs of forward and backward per token, without recomputation.

    Counts what the mathematics needs, not what an implementation spends: top-k experts only, the causal half of softmax
    attention, lightning attention in its recurrent form (4 D^2 per head and token).
    """
    h, D = model.hidden_size, model.head_dim
    query, key_value = model.num_attention_heads * D, model.num_key_value_heads * D
    lightning = 2 * h * (3 * query + query + query) + 4 * query * D
    softmax = 2 * h * (query + 2 * key_value + query) + 4 * query * (seq_length + 1) / 2
    expert = 2 * 3 * h * model.intermediate_size
    shared = 2 * (3 * h * model.shared_intermediate_size + h) if model.shared_intermediate_size else 0
    mlp = 2 * h * model.num_local_experts + model.num_experts_per_tok * expert + shared
    attention = sum(softmax if kind else lightning for kind in model.layer_types())
    forward = attention + model.num_hidden_layers * mlp + 2 * h * model.vocab_size
    return 3 * forward
