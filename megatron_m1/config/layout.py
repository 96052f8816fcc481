"""Sizes and ranks that follow from a configuration and a world size. Pure arithmetic, no process group."""

from dataclasses import dataclass

from megatron_m1.config.schema import Config, ParallelConfig

__all__ = [
    "AUTO_RING_BYTES",
    "Derived",
    "chunk_layers",
    "context_method",
    "derived",
    "head_chunk_tokens",
    "head_parts",
    "last_stage_sizes",
    "rank_groups",
]

AUTO_RING_BYTES = 64 << 20
"""`auto` takes the ring where an all-gather would bring a rank more than this: about a millisecond of a 50 GB/s link."""
_HEAD_CHUNK_BYTES = 2**31


@dataclass(frozen=True)
class Derived:
    """What a layout implies."""

    world_size: int
    data: int
    """Data-parallel ranks (DP): replicas of the non-expert parameters."""
    expert_data: int
    """Replicas of each expert (EDP)."""
    expert_tensor: int
    """Tensor-parallel ranks of one expert (ETP), `None` of the configuration resolved."""
    sequence_parallel: bool
    layers_per_chunk: int
    """Of the smallest model chunk: a pipeline stage, or its `virtual_pipeline`-th part."""
    micro_batches: int
    """Micro-batches per optimizer step and data-parallel rank at training.global_batch."""


def derived(config: Config, world_size: int) -> Derived:
    """Sizes implied by a layout that `validate` accepts (for others the divisions are rounded down)."""
    parallel, training = config.parallel, config.training
    expert_tensor = parallel.tensor if parallel.expert_tensor is None else parallel.expert_tensor
    data = world_size // (parallel.tensor * parallel.pipeline * parallel.context)
    return Derived(
        world_size=world_size,
        data=data,
        expert_data=world_size // (parallel.pipeline * parallel.expert * expert_tensor),
        expert_tensor=expert_tensor,
        sequence_parallel=parallel.tensor > 1 if parallel.sequence is None else parallel.sequence,
        layers_per_chunk=min(chunk_layers(config)),
        micro_batches=training.global_batch // max(training.micro_batch * data, 1),
    )


def context_method(method: str, gathered_bytes: float) -> str:
    """`method`, or for `auto` `ring` or `all_gather` by the bytes that the latter brings a context-parallel rank."""
    if method != "auto":
        return method
    return "ring" if gathered_bytes > AUTO_RING_BYTES else "all_gather"


def chunk_layers(config: Config) -> list[int]:
    """Layers of a model chunk on every pipeline rank, first to last."""
    parallel, layers = config.parallel, config.model.num_hidden_layers
    others, chunks = parallel.pipeline - 1, parallel.virtual_pipeline
    if parallel.last_stage_layers is None or not others:
        return [layers // (parallel.pipeline * chunks)] * parallel.pipeline
    last = parallel.last_stage_layers
    return [*[(layers - last) // (others * chunks)] * others, last // chunks]


def last_stage_sizes(config: Config) -> list[int]:
    """What parallel.last_stage_layers may be with parallel.pipeline above 1: the other ranks' parts are equal, and so are chunks."""
    layers, others, chunks = (
        config.model.num_hidden_layers,
        config.parallel.pipeline - 1,
        config.parallel.virtual_pipeline,
    )
    return [last for last in range(chunks, layers, chunks) if (layers - last) % (others * chunks) == 0]


def head_chunk_tokens(config: Config) -> int:
    """training.head_chunk_tokens, None resolved: tokens whose fp32 logits on one tensor-parallel rank fill 2 GiB."""
    given, rows = config.training.head_chunk_tokens, config.model.vocab_size // config.parallel.tensor
    return max(1, _HEAD_CHUNK_BYTES // (4 * rows)) if given is None else given


def head_parts(config: Config) -> int:
    """bf16 parts of every weight of the head under training.head_products; 1: it is multiplied in fp32."""
    return {"fp32": 1, "bf16x3": 2, "bf16x6": 3}[config.training.head_products]


def rank_groups(parallel: ParallelConfig, world_size: int) -> dict[str, list[list[int]]]:
    """Global ranks of every process group by kind: `tensor`, `context`, `data`, `pipeline`, `expert_tensor`,
    `expert`, `expert_data`.

    Megatron-Core's default order, fastest first: tensor, context, data, pipeline for the dense parameters, and
    expert_tensor, expert, expert_data, pipeline for the experts (parallel_state.py, order "tp-cp-ep-dp-pp").
    """
    expert_tensor = parallel.tensor if parallel.expert_tensor is None else parallel.expert_tensor
    data = world_size // (parallel.tensor * parallel.pipeline * parallel.context)
    expert_data = world_size // (parallel.pipeline * parallel.expert * expert_tensor)
    dense = {"tensor": parallel.tensor, "context": parallel.context, "data": data, "pipeline": parallel.pipeline}
    expert = {
        "expert_tensor": expert_tensor,
        "expert": parallel.expert,
        "expert_data": expert_data,
        "pipeline": parallel.pipeline,
    }
    return _groups(dense) | {kind: groups for kind, groups in _groups(expert).items() if kind != "pipeline"}


def _groups(sizes: dict[str, int]) -> dict[str, list[list[int]]]:
    world_size = 1
    strides = {}
    for kind, size in sizes.items():
        strides[kind] = world_size
        world_size *= size
    groups = {}
    for kind, size in sizes.items():
        stride = strides[kind]
        firsts = [rank for rank in range(world_size) if (rank // stride) % size == 0]
        groups[kind] = [[first + i * stride for i in range(size)] for first in firsts]
    return groups
