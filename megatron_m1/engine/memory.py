"""Estimate of the device memory of a layout, before it is tried."""

import math
from collections import Counter
from dataclasses import dataclass

from megatron_m1.config.layout import derived, head_chunk_tokens
from megatron_m1.config.schema import Config, ModelConfig
from megatron_m1.engine.flops import layer_parameters

__all__ = ["MemoryEstimate", "estimate_memory", "head_chunks", "rank_tokens", "stage_layers"]

_FP32 = 4
_CHUNK = 64
"""Tokens of a chunk of lightning attention (kernels/chunked.py, which needs torch and so is not imported here)."""


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
    gradient of the head before it joins the others (last stage)."""
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


def estimate_memory(config: Config, world_size: int) -> list[MemoryEstimate]:
    """MemoryEstimate of a rank of every pipeline stage, first to last.

    Parameters, gradients and optimizer state are counted exactly; activations follow from the shapes that the layers
    save (to about a fifth). Not counted: the allocator's fragmentation, NCCL's own buffers, the CUDA context
    (together about 3 to 6 GiB on a GPU).
    """
    return [_stage(config, world_size, stage) for stage in range(config.parallel.pipeline)]


def stage_layers(config: Config, stage: int) -> list[int]:
    """Global 0-based layers of pipeline rank `stage`, in the order of its chunks."""
    parallel = config.parallel
    per_chunk = derived(config, 1).layers_per_chunk
    firsts = [(chunk * parallel.pipeline + stage) * per_chunk for chunk in range(parallel.virtual_pipeline)]
    return [first + i for first in firsts for i in range(per_chunk)]


def rank_tokens(config: Config) -> float:
    """Tokens of one micro-batch that a context-parallel rank holds."""
    return config.training.seq_length * config.training.micro_batch / config.parallel.context


def head_chunks(config: Config) -> int:
    """Parts of `rank_tokens` that the head takes one after the other."""
    return math.ceil(rank_tokens(config) / head_chunk_tokens(config))


def _stage(config: Config, world_size: int, stage: int) -> MemoryEstimate:
    model, parallel = config.model, config.parallel
    sizes = derived(config, world_size)
    types = model.layer_types()
    kinds = Counter(types[layer] for layer in stage_layers(config, stage))
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
    weights = dense.weights + experts.weights
    return MemoryEstimate(
        weights=weights,
        gradients=dense.gradients + experts.gradients,
        optimizer=dense.optimizer + experts.optimizer,
        activations=_activations(config, world_size, stage, kinds),
        logits=_FP32 * head if is_last else 0.0,
        update=dense.gradient_copy
        + experts.gradient_copy
        + (weights if config.logging.layer_stats_every_steps > 0 else 0.0),
        buffers=_buffers(config, world_size),
    )


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


def _activations(config: Config, world_size: int, stage: int, kinds: Counter[int]) -> float:
    training = config.training
    size = 2 if training.precision == "bf16" else _FP32
    in_flight = _in_flight(config, world_size, stage)  # micro-batches, each with all chunks of this stage
    working = max(_layer(config, world_size, kind, drop=()) + _states(config, kind) for kind in kinds)
    if training.recompute == "full":
        hidden_tokens = rank_tokens(config) / _sequence_shards(config, world_size)
        group = min(training.recompute_layers, derived(config, world_size).layers_per_chunk)
        kept = hidden_tokens * config.model.hidden_size * size * kinds.total() / group
        return in_flight * kept + 2 * group * working  # the recomputed group and its gradients
    drop = tuple(training.recompute_modules) if training.recompute == "selective" else ()
    kept = sum(layers * _layer(config, world_size, kind, drop=drop) for kind, layers in kinds.items())
    return in_flight * kept + working


def _in_flight(config: Config, world_size: int, stage: int) -> float:
    """Micro-batches whose activations a stage holds at once, 1F1B or interleaved (fractions: not all chunks)."""
    pipeline, chunks = config.parallel.pipeline, config.parallel.virtual_pipeline
    micro_batches = derived(config, world_size).micro_batches
    if chunks == 1:
        return min(pipeline - stage, micro_batches)
    return min(2 * (pipeline - stage - 1) + (chunks - 1) * pipeline + 1, micro_batches * chunks) / chunks


def _sequence_shards(config: Config, world_size: int) -> int:
    return config.parallel.tensor if derived(config, world_size).sequence_parallel else 1


def _layer(config: Config, world_size: int, kind: int, *, drop: tuple[str, ...]) -> float:
    """Bytes one layer saves for its backward pass; `drop`: modules that are recomputed instead."""
    model, tensor = config.model, config.parallel.tensor
    sizes = derived(config, world_size)
    tokens = rank_tokens(config)
    size = 2 if config.training.precision == "bf16" else _FP32
    hidden_tokens = tokens / _sequence_shards(config, world_size)
    residual = 4 * hidden_tokens * model.hidden_size * size  # h and its norm, twice
    attention, core = _attention(model, kind, tokens, tensor, size)
    if "core_attn" in drop:
        core = 0.0
    routed = tokens / tensor * model.num_experts_per_tok  # the experts work on sequence shards
    width = model.intermediate_size / sizes.expert_tensor
    # Under expert tensor parallelism every rank of the group holds the tokens of all of them.
    moe = routed * sizes.expert_tensor * (2 * model.hidden_size + 4 * width) * size
    if "moe" in drop:
        moe = 0.0
    shared = 3 * tokens * model.shared_intermediate_size / tensor * size
    return residual + attention + core + moe + shared


def _attention(model: ModelConfig, kind: int, tokens: float, tensor: int, size: int) -> tuple[float, float]:
    """Bytes saved around the attention operator and by it."""
    inner = model.num_attention_heads * model.head_dim / tensor
    if kind == 1:
        keys = model.num_key_value_heads * model.head_dim / tensor
        return tokens * (2 * inner + 2 * keys) * size, tokens * (2 * inner + 2 * keys) * size
    around = tokens * (3 * inner * size + 4 * inner * size)  # qkv before SiLU; normed output, gate and their product
    return around, tokens * 4 * inner * size


def _states(config: Config, kind: int) -> float:
    """Bytes of the chunk states and their gradients, which the backward pass of a lightning layer (kind 0) recomputes."""
    model, tokens = config.model, rank_tokens(config)
    width = model.num_attention_heads / config.parallel.tensor * model.head_dim
    return 2 * tokens / _CHUNK * width * model.head_dim * _FP32 if kind == 0 else 0.0


def _buffers(config: Config, world_size: int) -> float:
    model, parallel = config.model, config.parallel
    size = 2 if config.training.precision == "bf16" else _FP32
    tokens, shards = rank_tokens(config), _sequence_shards(config, world_size)
    hidden = tokens * model.hidden_size * size
    gathered = hidden if shards > 1 else 0.0
    neighbours = 2 * hidden / shards if parallel.pipeline > 1 else 0.0
    if parallel.context == 1:
        return gathered + neighbours
    # A block in use and the next one on its way; gradients of K and V travel in fp32.
    keys = 2 * tokens * model.num_key_value_heads * model.head_dim / parallel.tensor
    # Two chunks of every rank, forward and backward.
    states = 2 * 2 * parallel.context * model.num_attention_heads / parallel.tensor * model.head_dim**2 * _FP32
    return gathered + neighbours + 2 * keys * (size + _FP32) + states
