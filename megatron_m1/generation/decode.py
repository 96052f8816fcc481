"""One-token passes through a pipeline stage: the parameters and formulas of the model's modules without core's wrappers.

At a few tokens per pass the wrappers (dispatcher, autograd functions, reductions over groups of one) cost more than
reading the weights. Where experts are spread over ranks that hold other tokens, core's dispatcher stays.
tests/distributed/test_generation.py compares every layout with the training forward pass.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist
from m1_kernels import swiglu
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor
from torch.nn.functional import linear

from megatron_m1.generation.cache import HybridCache
from megatron_m1.generation.products import Grouping, product
from megatron_m1.model.lightning import LightningAttention
from megatron_m1.model.m1 import M1Model
from megatron_m1.model.softmax import SoftmaxAttention, apply_rotary, rotary_table

__all__ = ["RecordRouting", "decode_stage", "local_experts"]

RecordRouting = Callable[[int, Tensor], None]
"""Takes a 1-based layer number and the experts [n, top_k] of the pass's tokens."""

Product = Callable[[Tensor, Tensor], Tensor]


def local_experts(groups: ProcessGroupCollection) -> bool:
    """Whether this rank and its tensor-parallel peers, which have the same tokens, hold all experts."""
    return groups.ep.size() == 1 and groups.expt_tp.size() in (1, groups.tp.size())


@torch.inference_mode()
def decode_stage(
    model: M1Model,
    tokens: Tensor,
    position_ids: Tensor,
    cache: HybridCache,
    groups: ProcessGroupCollection,
    *,
    hidden: Tensor | None,
    record: RecordRouting | None,
    invariant: bool = False,
) -> Tensor:
    """What `model(tokens, position_ids, inference_context=cache)` gives, up to rounding: [m, V / tp] fp32 on the last stage, else
    the activations [n, 1, h].

    tokens, position_ids: [1, n] of a decoding pass of the cache. hidden: [n, 1, h] from the stage before.
    invariant: products as in products.py; the experts that core's dispatcher runs are the caller's to set.
    """
    m1 = model.config.m1
    if model.pre_process:
        hidden = model.embedding.word_embeddings(tokens)
    assert hidden is not None, "stages after the first need the activations of the one before"
    hidden = hidden.view(-1, m1.hidden_size)
    rotary = rotary_table(position_ids, m1.rotary_dim, m1.rope_theta)
    multiply = partial(product, invariant=invariant)
    for layer in model.decoder.layers:
        x = layer.input_layernorm(hidden)
        attention = layer.self_attention
        if isinstance(attention, LightningAttention):
            out = _lightning(attention, x, cache, groups.tp, multiply)
        else:
            out = _softmax(attention, x, cache, rotary, groups.tp, multiply)
        hidden = _add(out, x if layer.postnorm else hidden, layer.attention_beta, layer.attention_alpha)
        y = layer.pre_mlp_layernorm(hidden)
        if local_experts(groups):
            out = _experts(layer, y, groups, record, invariant)
        else:
            out = layer._experts(y.unsqueeze(1), None).squeeze(1)
        if layer.shared_mlp is not None:
            out = layer.shared_mlp(y.unsqueeze(1), out.unsqueeze(1)).squeeze(1)
        hidden = _add(out, y if layer.postnorm else hidden, layer.mlp_beta, layer.mlp_alpha)
    if not model.post_process:
        return hidden.unsqueeze(1)
    hidden = model.decoder.final_layernorm(cache.predicting_step(hidden))
    # In fp32 under any training.head_products: making parts of the weights would move 5 to 10 times the bytes that a step reads.
    return multiply(hidden.float(), model.output_layer.weight)


def _lightning(
    attention: LightningAttention, x: Tensor, cache: HybridCache, tp: dist.ProcessGroup, multiply: Product
) -> Tensor:
    qkv = multiply(x, attention.qkv_proj.weight).view(len(x), attention.local_heads, -1)
    if attention.slopes.device != x.device:
        attention.slopes = attention.slopes.to(x.device)
    out = cache.lightning_step(attention.layer_number, qkv, attention.slopes).view(len(x), -1)
    out = attention.norm(out, multiply(x, attention.output_gate.weight))
    return _summed(multiply(out, attention.out_proj.weight), tp)


def _softmax(
    attention: SoftmaxAttention,
    x: Tensor,
    cache: HybridCache,
    rotary: Tensor,
    tp: dist.ProcessGroup,
    multiply: Product,
) -> Tensor:
    qkv = multiply(x, attention.qkv_proj.weight)
    qkv = qkv.view(1, len(x), attention.local_groups, attention.queries_per_group + 2, attention.head_dim)
    q = apply_rotary(qkv[:, :, :, :-2].flatten(2, 3), rotary)[0]
    k = apply_rotary(qkv[:, :, :, -2], rotary)[0]
    out = cache.softmax_step(attention.layer_number, q, k, qkv[0, :, :, -1], scale=attention.head_dim**-0.5)
    return _summed(multiply(out.reshape(len(x), -1), attention.o_proj.weight), tp)


def _experts(
    layer: torch.nn.Module, y: Tensor, groups: ProcessGroupCollection, record: RecordRouting | None, invariant: bool
) -> Tensor:
    """The routed experts, all of them here: tokens sorted by expert, two grouped products, a sum in fixed order."""
    router, experts = layer.mlp.router, layer.mlp.experts
    grouping = Grouping.of(linear(y.float(), router.weight), router.topk, invariant=invariant)
    if record is not None:
        record(layer.layer_number, grouping.chosen)
    gate_up = grouping.product(y.index_select(0, grouping.tokens), experts.fc1.flatten(1, 2))
    out = grouping.summed(grouping.product(swiglu(gate_up, grouping.shares), experts.fc2))
    return _summed(out, groups.expt_tp)


def _add(branch: Tensor, residual: Tensor, beta: float, alpha: float) -> Tensor:
    return torch.add(branch if beta == 1.0 else branch * beta, residual, alpha=alpha)


def _summed(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    if group.size() > 1:
        dist.all_reduce(x, group=group)
    return x
