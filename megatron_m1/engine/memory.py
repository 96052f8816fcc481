"""Estimate of the device memory of a layout, before it is tried."""

import math
from collections import Counter
from dataclasses import dataclass, replace

from megatron_m1.config.layout import chunk_layers, derived, head_chunk_tokens, head_parts
from megatron_m1.config.schema import Config
from megatron_m1.engine.context_exchange import keeps_attention, key_value_exchange, rank_tokens, state_exchange
from megatron_m1.engine.flops import layer_parameters

__all__ = ["ACTIVATION_MARGIN", "RESERVE_GIB", "MemoryEstimate", "estimate_memory", "head_chunks", "stage_layers"]

RESERVE_GIB = 6.0
"""Of each GPU for the CUDA context, NCCL's own buffers and the allocator's fragmentation (3 to 6 GiB)."""
ACTIVATION_MARGIN = 1.2
"""For experts that get more than their share of tokens. With balanced ones the estimate of a whole rank's peak was right to 3%."""
_FP32 = 4
_RING_STATES, _GATHERED_STATES = 4, 3
"""Times the states of a rank, on their way, added up and in the caller's order: of the ring, and beside what an all-gather brings. Counted
in the exchange of documents cut over 8 and 16 ranks."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on one rank."""

    weights: float
    gradients: float
    optimizer: float
    """fp32 main weights (bf16 training) and both Adam moments, over the data-parallel ranks if distributed."""
    activations: float
    """What forward passes keep until their backward, plus the working set of one layer. Experts assumed balanced."""
    logits: float
    """fp32 logits of one chunk, which turn into their gradient in place, its hidden states and their gradient in fp32, and the
    gradient of the head before it joins the others (last stage). With training.head_products the bf16 parts of the weight and of the
    hidden states and one of the gradient of the logits too."""
    update: float
    """What the update holds when activations and logits are gone: the optimizer's fp32 copy of bf16 gradients, and the copy of
    the weights of steps with layer statistics."""
    buffers: float
    """What communication receives into: gathered sequence shards, K/V blocks and lightning states of context-parallel ranks,
    activations of the neighbouring stages."""

    @property
    def state(self) -> float:
        return self.weights + self.gradients + self.optimizer

    @property
    def total(self) -> float:
        return self.state + max(self.activations + self.logits, self.update) + self.buffers

    @property
    def with_margin(self) -> float:
        """`total` with ACTIVATION_MARGIN."""
        return replace(self, activations=ACTIVATION_MARGIN * self.activations).total


def estimate_memory(config: Config, world_size: int, *, document_tokens: int | None = None) -> list[MemoryEstimate]:
    """MemoryEstimate of a rank of every pipeline stage, first to last.

    document_tokens: length of the documents that sequences are packed of; None: sequences are one document each.

    Parameters, gradients and optimizer state are counted exactly; activations follow from the shapes that the layers
    save, experts balanced. Not counted: the allocator's fragmentation, NCCL's own buffers, the CUDA context
    (together about 3 to 6 GiB on a GPU).
    """
    activations = _Activations.of(config, world_size, document_tokens)
    buffers = _buffers(config, world_size, document_tokens)
    types = config.model.layer_types()
    return [
        _stage(config, world_size, stage, Counter(types[i] for i in stage_layers(config, stage)), activations, buffers)
        for stage in range(config.parallel.pipeline)
    ]


def stage_layers(config: Config, stage: int) -> list[int]:
    """Global 0-based layers of pipeline rank `stage`, in the order of its chunks."""
    counts = chunk_layers(config)
    firsts = [chunk * sum(counts) + sum(counts[:stage]) for chunk in range(config.parallel.virtual_pipeline)]
    return [first + i for first in firsts for i in range(counts[stage])]


def head_chunks(config: Config) -> int:
    """Parts of `rank_tokens` that the head takes one after the other."""
    return math.ceil(rank_tokens(config) / head_chunk_tokens(config))


def _stage(
    config: Config, world_size: int, stage: int, kinds: Counter[int], activations: "_Activations", buffers: float
) -> MemoryEstimate:
    model, parallel = config.model, config.parallel
    sizes = derived(config, world_size)
    is_first, is_last = stage == 0, stage == parallel.pipeline - 1

    dense = _Tally(config, sizes.data * parallel.context)
    experts = _Tally(config, sizes.expert_data)
    for kind, layers in kinds.items():
        count = layer_parameters(model, kind)
        split = (count["attention"] + count["attention_norm"] + count["shared"]) / parallel.tensor
        dense.add(layers * (split + count["norms"]))
        dense.add(layers * count["router"], always_fp32=True)
        experts.add(layers * count["experts"] / (parallel.expert * sizes.expert_tensor))
    vocabulary = model.vocab_size * model.hidden_size / parallel.tensor
    if is_first:
        dense.add(vocabulary)
    if is_last:
        dense.add(model.hidden_size)
        dense.add(vocabulary, always_fp32=True)
    head = (
        rank_tokens(config) / head_chunks(config) * (vocabulary / model.hidden_size + 2 * model.hidden_size)
        + vocabulary
    )
    if head_parts(config) > 1:
        head += _head_parts(config, vocabulary) / _FP32
    weights = dense.weights + experts.weights
    return MemoryEstimate(
        weights=weights,
        gradients=dense.gradients + experts.gradients,
        optimizer=dense.optimizer + experts.optimizer,
        activations=_in_flight(config, sizes.micro_batches, stage)
        * sum(layers * activations.kept[kind] for kind, layers in kinds.items())
        + activations.working,
        logits=_FP32 * head if is_last else 0.0,
        update=dense.gradient_copy
        + experts.gradient_copy
        + (weights if config.logging.layer_stats_every_steps > 0 else 0.0),
        buffers=buffers,
    )


def _head_parts(config: Config, vocabulary: float) -> float:
    """Bytes of bf16 parts beside a chunk's logits; vocabulary: weights of the head on a rank."""
    parts, hidden = head_parts(config), config.model.hidden_size
    tokens = rank_tokens(config) / head_chunks(config)
    hidden_parts = parts if config.training.precision == "fp32" else 1
    # The third part of the weight is made by way of an fp32 copy, before there is a part of the gradient.
    passing = max(2 * tokens * vocabulary / hidden, _FP32 * vocabulary if parts == 3 else 0.0)
    return 2 * (parts * vocabulary + hidden_parts * tokens * hidden) + passing


class _Tally:
    """Bytes of parameters that `replicas` data-parallel ranks share."""

    def __init__(self, config: Config, replicas: int) -> None:
        self.bf16 = config.training.precision == "bf16"
        self.gradient_bytes = _FP32 if config.training.grad_reduce_dtype == "fp32" else 2
        self.shards = replicas if config.parallel.distributed_optimizer else 1
        self.weights = self.gradients = self.optimizer = self.gradient_copy = 0.0

    def add(self, parameters: float, *, always_fp32: bool = False) -> None:
        low = self.bf16 and not always_fp32
        self.weights += parameters * (2 if low else _FP32)
        self.gradients += parameters * (self.gradient_bytes if low else _FP32)
        moments_and_main = 3 if low else 2
        self.optimizer += parameters * moments_and_main * _FP32 / self.shards
        if low and self.gradient_bytes < _FP32:
            self.gradient_copy += parameters * _FP32 / self.shards


@dataclass(frozen=True)
class _Activations:
    kept: dict[int, float]
    """Bytes that a layer of each kind keeps from its forward to its backward pass."""
    working: float
    """Bytes that the backward pass of one layer needs besides: what is recomputed, and gradients."""

    @staticmethod
    def of(config: Config, world_size: int, document_tokens: int | None) -> "_Activations":
        training = config.training
        size = 2 if training.precision == "bf16" else _FP32
        layers = {kind: _layer(config, world_size, kind, document_tokens) for kind in set(config.model.layer_types())}
        gradients = _expert_gradients(config, world_size)
        if training.recompute == "full":
            hidden = rank_tokens(config) / _sequence_shards(config, world_size) * config.model.hidden_size * size
            group = min(training.recompute_layers, derived(config, world_size).layers_per_chunk)
            again = group * max(sum(parts.values()) for parts in layers.values())
            kept = dict.fromkeys(layers, hidden / group)
            if keeps_attention(config) and 1 in kept:
                kept[1] += rank_tokens(config) * _local_channels(config) * size + _sums(config)
            return _Activations(kept, again + gradients)
        drop = training.recompute_modules if training.recompute == "selective" else []
        kept = {kind: sum(held for name, held in parts.items() if name not in drop) for kind, parts in layers.items()}
        if "core_attn" in drop and keeps_attention(config) and 1 in kept:
            kept[1] += _sums(config)  # the output stays for its projection anyway
        again = max((parts[name] for parts in layers.values() for name in drop), default=0.0)
        return _Activations(kept, again + gradients)


def _in_flight(config: Config, micro_batches: int, stage: int) -> float:
    """Micro-batches whose activations a stage holds at once, 1F1B or interleaved (fractions: not all chunks)."""
    pipeline, chunks = config.parallel.pipeline, config.parallel.virtual_pipeline
    if chunks == 1:
        return min(pipeline - stage, micro_batches)
    return min(2 * (pipeline - stage - 1) + (chunks - 1) * pipeline + 1, micro_batches * chunks) / chunks


def _sequence_shards(config: Config, world_size: int) -> int:
    return config.parallel.tensor if derived(config, world_size).sequence_parallel else 1


def _layer(config: Config, world_size: int, kind: int, document_tokens: int | None) -> dict[str, float]:
    """Bytes one layer saves for its backward pass, by what can be recomputed: core_attn, moe, and the rest."""
    model, tensor = config.model, config.parallel.tensor
    sizes, tokens = derived(config, world_size), rank_tokens(config)
    size = 2 if config.training.precision == "bf16" else _FP32
    residual = 4 * tokens / _sequence_shards(config, world_size) * model.hidden_size * size  # h and its norm, twice
    inner, keys = (heads * model.head_dim / tensor for heads in (model.num_attention_heads, model.num_key_value_heads))
    if kind == 1:
        around, core = 2 * inner + 2 * keys, tokens * (inner + 2 * keys) * size  # qkv, output; rotated q, k, and v
    else:
        # qkv before SiLU, output, gate, product of gate and normed output; SiLU(qkv) does not stay, the states that entered do.
        around, core = 6 * inner, state_exchange(config, document_tokens=document_tokens).held_bytes
    # Under expert tensor parallelism every rank of the group holds the tokens of all of them.
    rows = sizes.expert_tensor * model.hidden_size + 3 * model.intermediate_size
    moe = _routed(config) * rows * size + tokens / tensor * model.hidden_size * _FP32  # and the router's fp32 input
    shared = 3 * tokens * model.shared_intermediate_size / tensor * size
    return {"rest": residual + tokens * around * size + shared, "core_attn": core, "moe": moe}


def _local_channels(config: Config) -> float:
    return config.model.num_attention_heads * config.model.head_dim / config.parallel.tensor


def _sums(config: Config) -> float:
    """Bytes of the log-sum-exp of a softmax layer."""
    return rank_tokens(config) * config.model.num_attention_heads / config.parallel.tensor * _FP32


def _expert_gradients(config: Config, world_size: int) -> float:
    """Bytes that the backward pass of the experts adds to what they saved, where a layer's backward pass needs most."""
    model, expert_tensor = config.model, derived(config, world_size).expert_tensor
    size = 2 if config.training.precision == "bf16" else _FP32
    gathered = expert_tensor * model.hidden_size
    held = _routed(config) * (gathered + 2 * model.intermediate_size) * size
    # Core scatters the sums of an expert-tensor group in the type of the router's probabilities, fp32.
    return held + (_routed(config) * gathered * _FP32 if expert_tensor > 1 else 0.0)


def _routed(config: Config) -> float:
    """Copies of tokens that a rank sends to experts, which work on sequence shards."""
    return rank_tokens(config) / config.parallel.tensor * config.model.num_experts_per_tok


def _buffers(config: Config, world_size: int, document_tokens: int | None) -> float:
    model, parallel = config.model, config.parallel
    size = 2 if config.training.precision == "bf16" else _FP32
    hidden = rank_tokens(config) * model.hidden_size * size
    shards = _sequence_shards(config, world_size)
    gathered = hidden if shards > 1 else 0.0
    neighbours = 2 * hidden / shards if parallel.pipeline > 1 else 0.0
    if parallel.context == 1:
        return gathered + neighbours
    return gathered + neighbours + _key_value_buffers(config) + _state_buffers(config, document_tokens)


def _key_value_buffers(config: Config) -> float:
    exchange, size = key_value_exchange(config), 2 if config.training.precision == "bf16" else _FP32
    if exchange.method == "all_gather":
        # Of the whole sequence, by rank and in its order; backward the gradients in its order, by rank, and by rank in one piece.
        return exchange.gathered_bytes / size * (2 * size + 3 * _FP32)
    # A block in use and the next one on its way; gradients of K and V travel in fp32.
    return 2 * exchange.held_bytes / size * (size + _FP32)


def _state_buffers(config: Config, document_tokens: int | None) -> float:
    exchange = state_exchange(config, document_tokens=document_tokens)
    if exchange.method == "all_gather":
        return exchange.held_bytes * (config.parallel.context + _GATHERED_STATES)
    return exchange.held_bytes * _RING_STATES
