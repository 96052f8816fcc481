"""MiniMax-M1 from its formulas: the specification in code.

Plain torch, one small function per formula, slow, differentiable, in the dtype of the weights it is given (float64
for comparisons). It imports the configuration schema and nothing else of the project. Weights are a dict under the
names of the released checkpoint: `model.embed_tokens.weight`, `model.layers.0.self_attn.qkv_proj.weight`,
`model.layers.0.block_sparse_moe.experts.3.w1.weight`, ..., `model.norm.weight`, `lm_head.weight`; a shared expert is
`model.layers.0.{shared_mlp.gate_proj,shared_mlp.up_proj,shared_mlp.down_proj,coefficient}.weight`.

Letters: B sequences, T tokens, h hidden size, H query heads, G key-value heads, D channels per head, E experts,
K experts per token, L layers.
"""

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import silu

from megatron_m1.config.schema import ModelConfig

__all__ = ["RouterTrace", "m1_forward", "m1_logits", "m1_loss", "router_aux_loss", "router_z_loss"]

LIGHTNING, SOFTMAX = 0, 1
AuxLossForm = Literal["megatron", "minimax", "hf"]


@dataclass
class RouterTrace:
    """What one layer's router decided. logits, probs: [B, T, E], probs before the top-k; chosen: [B, T, K] expert ids."""

    logits: Tensor
    probs: Tensor
    chosen: Tensor


def m1_logits(model: ModelConfig, weights: dict[str, Tensor], token_ids: Tensor, cu_seqlens: Tensor | None = None):
    """Logits [B, T, vocab_size]; see m1_forward."""
    return m1_forward(model, weights, token_ids, cu_seqlens)[0]


def m1_loss(
    model: ModelConfig,
    weights: dict[str, Tensor],
    token_ids: Tensor,
    labels: Tensor,
    loss_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Mean over the tokens of loss_mask of -log p(label), a scalar in nats.

    token_ids, labels: [B, T]; labels[:, t] is the token after token_ids[:, t]. loss_mask: [B, T] bool; None: every token.
    """
    log_probs = m1_logits(model, weights, token_ids, cu_seqlens).log_softmax(dim=-1)
    nll = -log_probs.gather(-1, labels[..., None])[..., 0]
    return nll.mean() if loss_mask is None else nll[loss_mask].mean()


def m1_forward(
    model: ModelConfig, weights: dict[str, Tensor], token_ids: Tensor, cu_seqlens: Tensor | None = None
) -> tuple[Tensor, list[RouterTrace]]:
    """Logits [B, T, vocab_size] and the L router traces.

    token_ids: [B, T] int64. cu_seqlens: document starts along T and, last, T itself; every row is cut there, and attention,
    lightning state and positions restart at each cut. None: a row is one document.
    """
    if cu_seqlens is None:
        return document_forward(model, weights, token_ids)
    cuts = cu_seqlens.tolist()
    documents = [
        document_forward(model, weights, token_ids[:, start:end]) for start, end in pairwise(cuts) if end > start
    ]
    logits = torch.cat([document_logits for document_logits, _ in documents], dim=1)
    routers = [
        RouterTrace(
            logits=torch.cat([router.logits for router in layer], dim=1),
            probs=torch.cat([router.probs for router in layer], dim=1),
            chosen=torch.cat([router.chosen for router in layer], dim=1),
        )
        for layer in zip(*[routers for _, routers in documents], strict=True)
    ]
    return logits, routers


def document_forward(
    model: ModelConfig, weights: dict[str, Tensor], token_ids: Tensor
) -> tuple[Tensor, list[RouterTrace]]:
    hidden = weights["model.embed_tokens.weight"][token_ids]
    routers = []
    for layer in range(model.num_hidden_layers):
        hidden, router = decoder_layer(model, weights, hidden, layer)
        routers.append(router)
    hidden = rms_norm(hidden, weights["model.norm.weight"], model.rms_norm_eps)
    return hidden @ weights["lm_head.weight"].T, routers


def decoder_layer(
    model: ModelConfig, weights: dict[str, Tensor], hidden: Tensor, layer: int
) -> tuple[Tensor, RouterTrace]:
    """h = alpha * residual + beta * sublayer(norm(h)), twice; the residual is norm(h) if postnorm, else h."""
    layer_weights = sub_dict(weights, f"model.layers.{layer}.")
    if model.layer_types()[layer] == LIGHTNING:
        attention = lightning_attention
        alpha, beta = model.layernorm_linear_attention_alpha, model.layernorm_linear_attention_beta
    else:
        attention = softmax_attention
        alpha, beta = model.layernorm_full_attention_alpha, model.layernorm_full_attention_beta

    normed = rms_norm(hidden, layer_weights["input_layernorm.weight"], model.rms_norm_eps)
    attended = attention(model, sub_dict(layer_weights, "self_attn."), normed, layer)
    hidden = alpha * (normed if model.postnorm else hidden) + beta * attended

    normed = rms_norm(hidden, layer_weights["post_attention_layernorm.weight"], model.rms_norm_eps)
    mixed, router = feed_forward(model, layer_weights, normed)
    hidden = model.layernorm_mlp_alpha * (normed if model.postnorm else hidden) + model.layernorm_mlp_beta * mixed
    return hidden, router


def lightning_attention(model: ModelConfig, weights: dict[str, Tensor], x: Tensor, layer: int) -> Tensor:
    """out_proj(sigmoid(gate(x)) * norm(o)) with S_t = exp(-s) S_{t-1} + k_t^T v_t and o_t = q_t S_t, S D x D per head."""
    B, T, _ = x.shape
    H, D = model.num_attention_heads, model.head_dim
    qkv = silu(x @ weights["qkv_proj.weight"].T).view(B, T, H, 3 * D)
    q, k, v = qkv[..., :D], qkv[..., D : 2 * D], qkv[..., 2 * D :]

    decay = torch.exp(-lightning_slopes(H, layer, model.num_hidden_layers)).to(x)
    state = x.new_zeros(B, H, D, D)
    outputs = []
    for t in range(T):
        state = decay[:, None, None] * state + k[:, t, :, :, None] * v[:, t, :, None, :]
        outputs.append(torch.einsum("bhd,bhde->bhe", q[:, t], state))
    o = torch.stack(outputs, dim=1).reshape(B, T, H * D)

    gate = torch.sigmoid(x @ weights["output_gate.weight"].T)
    return (gate * rms_norm(o, weights["norm.weight"], model.lightning_norm_eps)) @ weights["out_proj.weight"].T


def lightning_slopes(num_heads: int, layer: int, num_layers: int) -> Tensor:
    """Decay rates per token of the H heads of absolute layer `layer`, float64 [H]."""
    factor = 1 - layer / (num_layers - 1) + 1e-5
    return torch.tensor(alibi_slopes(num_heads), dtype=torch.float64) * factor


def alibi_slopes(num_heads: int) -> list[float]:
    """2^(-8(h+1)/H) for H a power of two; else those of the power of two below, then every other one of the one above.

    Source: ALiBi (arXiv 2108.12409), as in the released modeling_minimax_m1.py.
    """
    if math.log2(num_heads).is_integer():
        return [2 ** (-8 * (head + 1) / num_heads) for head in range(num_heads)]
    below = 2 ** math.floor(math.log2(num_heads))
    return alibi_slopes(below) + alibi_slopes(2 * below)[0::2][: num_heads - below]


def softmax_attention(model: ModelConfig, weights: dict[str, Tensor], x: Tensor, layer: int) -> Tensor:
    """Causal softmax attention with H/G query heads per key-value head and RoPE on the first rotary_dim channels."""
    B, T, _ = x.shape
    H, G, D = model.num_attention_heads, model.num_key_value_heads, model.head_dim
    q = (x @ weights["q_proj.weight"].T).view(B, T, H, D)
    k = (x @ weights["k_proj.weight"].T).view(B, T, G, D)
    v = (x @ weights["v_proj.weight"].T).view(B, T, G, D)
    q, k = rope(q, model.rotary_dim, model.rope_theta), rope(k, model.rotary_dim, model.rope_theta)
    k, v = k.repeat_interleave(H // G, dim=2), v.repeat_interleave(H // G, dim=2)

    scores = torch.einsum("bthd,bshd->bhts", q, k) / math.sqrt(D)
    future = torch.ones(T, T, dtype=torch.bool, device=x.device).triu(1)
    o = torch.einsum("bhts,bshd->bthd", scores.masked_fill(future, -math.inf).softmax(dim=-1), v)
    return o.reshape(B, T, H * D) @ weights["o_proj.weight"].T


def rope(x: Tensor, rotary_dim: int, theta: float) -> Tensor:
    """Channel pairs (j, j + rotary_dim/2) of token t turned by t * theta^(-2j/rotary_dim); x: [B, T, heads, D]."""
    half = rotary_dim // 2
    frequency = theta ** (-torch.arange(half, dtype=torch.float64, device=x.device) / half)
    angle = torch.arange(x.shape[1], dtype=torch.float64, device=x.device)[:, None] * frequency
    cos, sin = angle.cos().to(x)[:, None, :], angle.sin().to(x)[:, None, :]
    a, b, untouched = x[..., :half], x[..., half:rotary_dim], x[..., rotary_dim:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin, untouched], dim=-1)


def feed_forward(model: ModelConfig, weights: dict[str, Tensor], y: Tensor) -> tuple[Tensor, RouterTrace]:
    """The experts' mixture; with a shared expert (1 - c) * mixture + c * shared(y), c = sigmoid(coefficient(y))."""
    mixed, router = mixture_of_experts(model, sub_dict(weights, "block_sparse_moe."), y)
    if model.shared_intermediate_size == 0:
        return mixed, router
    shared = swiglu(
        y,
        gate=weights["shared_mlp.gate_proj.weight"],
        up=weights["shared_mlp.up_proj.weight"],
        down=weights["shared_mlp.down_proj.weight"],
    )
    c = torch.sigmoid(y @ weights["coefficient.weight"].T)
    return mixed * (1 - c) + shared * c, router


def mixture_of_experts(model: ModelConfig, weights: dict[str, Tensor], y: Tensor) -> tuple[Tensor, RouterTrace]:
    """Softmax over all experts, the K largest, renormalised to sum 1, weigh the outputs of those K experts."""
    logits = y @ weights["gate.weight"].T
    probs = logits.softmax(dim=-1)
    top_probs, chosen = probs.topk(model.num_experts_per_tok, dim=-1)
    top_weights = top_probs / top_probs.sum(dim=-1, keepdim=True)

    mixed = torch.zeros_like(y)
    for expert in range(model.num_local_experts):
        expert_weight = (top_weights * (chosen == expert)).sum(dim=-1, keepdim=True)
        expert_output = swiglu(
            y,
            gate=weights[f"experts.{expert}.w1.weight"],
            up=weights[f"experts.{expert}.w3.weight"],
            down=weights[f"experts.{expert}.w2.weight"],
        )
        mixed = mixed + expert_weight * expert_output
    return mixed, RouterTrace(logits, probs, chosen)


def swiglu(y: Tensor, *, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return (silu(y @ gate.T) * (y @ up.T)) @ down.T


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / torch.sqrt(x.square().mean(dim=-1, keepdim=True) + eps) * weight


def router_aux_loss(router: RouterTrace, form: AuxLossForm, token_mask: Tensor | None = None) -> Tensor:
    """Load-balancing loss of one layer over the tokens of token_mask, before its coefficient, a scalar.

    With f_e the share of the K * tokens assignments that expert e got and m_e its mean probability: `megatron`
    E * sum f_e m_e (1 at balance), `minimax` (1/E) * sum f_e m_e (1/E^2), `hf` K * E * sum f_e m_e (K). The model's loss
    is the sum over layers. token_mask: [B, T] bool; None: every token.
    """
    num_experts, top_k = router.probs.shape[-1], router.chosen.shape[-1]
    probs, chosen = router.probs.flatten(0, 1), router.chosen.flatten(0, 1)
    if token_mask is not None:
        probs, chosen = probs[token_mask.flatten()], chosen[token_mask.flatten()]
    f = torch.stack([(chosen == expert).sum() for expert in range(num_experts)]) / chosen.numel()
    product = (f.to(probs) * probs.mean(dim=0)).sum()
    return product * {"megatron": num_experts, "minimax": 1 / num_experts, "hf": top_k * num_experts}[form]


def router_z_loss(router: RouterTrace, token_mask: Tensor | None = None) -> Tensor:
    """Mean over tokens of logsumexp(logits)^2 of one layer, a scalar. token_mask: [B, T] bool; None: every token."""
    squared = router.logits.logsumexp(dim=-1).square()
    return squared.mean() if token_mask is None else squared[token_mask].mean()


def sub_dict(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): weight for name, weight in weights.items() if name.startswith(prefix)}
