"""All layouts of a model on a cluster: those that fit, ranked by the estimated time of a step, and why the others do not."""

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from megatron_m1.config import Config, ConfigError, derived, validate
from megatron_m1.config.layout import last_stage_sizes
from megatron_m1.config.schema import CheckpointConfig, ParallelConfig
from megatron_m1.engine.cluster import Cluster
from megatron_m1.engine.flops import training_flops_per_token
from megatron_m1.engine.memory import RESERVE_GIB, MemoryEstimate, estimate_memory
from megatron_m1.engine.step_time import StepTime, stage_seconds, step_time

__all__ = [
    "MOST_DOUBLINGS",
    "Plan",
    "Refusal",
    "Search",
    "layout_name",
    "padded",
    "plan_layout",
    "search",
    "smallest_cluster",
]

_GIB = 2**30
_LEAST_TOKENS = 8192  # of a context-parallel rank: the rates of cluster.py were measured with no fewer
_MOST_CHUNKS = 5  # model chunks of a pipeline rank
MOST_DOUBLINGS = 8
"""Of the GPUs, in the search for a number that is enough: from one node to 2048 GPUs."""
_RECOMPUTE: tuple[tuple[str, list[str]], ...] = (
    ("none", ["core_attn"]),
    ("selective", ["core_attn"]),
    ("selective", ["moe"]),
    ("selective", ["core_attn", "moe"]),
    ("full", ["core_attn"]),
)


@dataclass(frozen=True)
class Plan:
    """A layout that fits."""

    config: Config
    """The given configuration with this layout and the fastest recomputation that fits."""
    memory: list[MemoryEstimate]
    """By stage."""
    time: StepTime
    tokens_per_s_per_gpu: float
    mfu: float
    """Model FLOPs utilisation: recomputation does not count as work."""

    @property
    def fullest(self) -> MemoryEstimate:
        """The stage that needs most."""
        return max(self.memory, key=lambda estimate: estimate.total)

    @property
    def needed_gib(self) -> float:
        """Memory of the fullest stage with the margin for activations, without the reserve."""
        return _needed(self.memory)


@dataclass(frozen=True)
class Refusal:
    """A layout that does not work, and the first reason."""

    parallel: ParallelConfig
    rule: str
    """`memory`, or the configuration key or size whose rule it breaks."""
    reason: str
    needed_gib: float = 0.0
    """With full recomputation, where memory is the reason."""


@dataclass(frozen=True)
class Search:
    """Every layout that was looked at."""

    plans: list[Plan]
    """Fastest first."""
    refusals: list[Refusal]

    def rules(self) -> Counter[str]:
        """Number of refusals by rule."""
        return Counter(refusal.rule for refusal in self.refusals)


def search(
    config: Config, cluster: Cluster, *, reserve_gib: float = RESERVE_GIB, document_tokens: int | None = None
) -> Search:
    """Search over tensor (within a node), pipeline, context, expert, expert-tensor and virtual-pipeline sizes, and where it is faster
    over layouts whose last stage has fewer layers.

    config gives everything else: the model, training.seq_length, global_batch, micro_batch, precision and gradient type, overlap.
    document_tokens: see `plan_layout`.
    """
    plans, refusals = [], []
    for parallel in _candidates(config, cluster):
        limits: dict[str, Any] = {"reserve_gib": reserve_gib, "document_tokens": document_tokens}
        found = plan_layout(config, cluster, parallel, **limits)
        if isinstance(found, Refusal):
            refusals.append(found)
            continue
        plans.append(found)
        for last in _smaller_last_stages(found, cluster, document_tokens):
            uneven = plan_layout(config, cluster, replace(parallel, last_stage_layers=last), **limits)
            if isinstance(uneven, Plan) and uneven.time.total < found.time.total:
                plans.append(uneven)
    plans.sort(key=lambda plan: (plan.time.total, plan.fullest.total))
    return Search(plans, refusals)


def smallest_cluster(
    config: Config, cluster: Cluster, *, reserve_gib: float = RESERVE_GIB, document_tokens: int | None = None
) -> tuple[int, Plan] | None:
    """GPUs, in doublings of cluster.gpus, with which a layout fits, and the fastest; None if 2^MOST_DOUBLINGS times as many do not help."""
    for doublings in range(1, MOST_DOUBLINGS + 1):
        larger = replace(cluster, gpus=cluster.gpus << doublings)
        plans = search(config, larger, reserve_gib=reserve_gib, document_tokens=document_tokens).plans
        if plans:
            return larger.gpus, plans[0]
    return None


def plan_layout(
    config: Config,
    cluster: Cluster,
    parallel: ParallelConfig,
    *,
    reserve_gib: float = RESERVE_GIB,
    document_tokens: int | None = None,
) -> Plan | Refusal:
    """The layout `parallel` with the fastest recomputation that fits, or why there is none.

    document_tokens: length of the documents that sequences are packed of, which decides what is attended to and, with
    parallel.context_layout=document, how much padding there is. None: sequences are one document each.
    """
    config = replace(config, parallel=parallel)
    try:
        validate(replace(config, checkpoint=CheckpointConfig()), cluster.gpus)
    except ConfigError as error:
        reason = str(error).splitlines()[0]
        return Refusal(parallel, reason.split("=", 1)[0], reason)
    training, config = config.training, padded(config, document_tokens)
    variants, room = recompute_variants(config), cluster.memory_gib - reserve_gib
    least = estimate_memory(variants[-1], cluster.gpus, document_tokens=document_tokens)
    if max(estimate.state for estimate in least) / _GIB > room:
        return Refusal(parallel, "memory", _too_much(variants[-1], least, cluster, reserve_gib), _needed(least))
    others = (estimate_memory(variant, cluster.gpus, document_tokens=document_tokens) for variant in variants[:-1])
    memory = [*others, least]
    fitting = [pair for pair in zip(variants, memory) if _needed(pair[1]) <= room]
    if not fitting:
        return Refusal(parallel, "memory", _too_much(variants[-1], least, cluster, reserve_gib), _needed(least))
    times = [step_time(variant, cluster, document_tokens=document_tokens) for variant, _ in fitting]
    time, (best, estimates) = min(zip(times, fitting), key=lambda pair: pair[0].total)
    rate = training.global_batch * training.seq_length / time.total / cluster.gpus
    flops = training_flops_per_token(config.model, min(document_tokens or training.seq_length, training.seq_length))
    return Plan(best, estimates, time, rate, rate * flops / (cluster.peak_tflops * 1e12))


def padded(config: Config, document_tokens: int | None) -> Config:
    """The configuration with the padding of parallel.context_layout=document in training.seq_length: every document of a pack to a
    multiple of 2W, half of that on average, and the pack to what tensor-parallel ranks divide (engine/trainer.py)."""
    parallel, training = config.parallel, config.training
    if parallel.context_layout != "document" or document_tokens is None:
        return config
    unit = 2 * parallel.context
    padding = training.seq_length / min(document_tokens, training.seq_length) * (unit - 1) / 2
    shared = math.lcm(unit, parallel.tensor * parallel.context)
    length = math.ceil((training.seq_length + padding) / shared) * shared
    return replace(config, training=replace(training, seq_length=length))


def layout_name(parallel: ParallelConfig) -> str:
    """`TP/PP/CP/EP/ETP/VPP`, such as 8/8/1/8/1/1, and behind it the layers of a smaller last stage, such as 4/4/4/32/1/1/14."""
    expert_tensor = parallel.tensor if parallel.expert_tensor is None else parallel.expert_tensor
    last = [] if parallel.last_stage_layers is None else [parallel.last_stage_layers]
    sizes = (parallel.tensor, parallel.pipeline, parallel.context, parallel.expert, expert_tensor)
    return "/".join(map(str, (*sizes, parallel.virtual_pipeline, *last)))


def recompute_variants(config: Config) -> list[Config]:
    """The configuration with every kind of recomputation: none, core_attn, moe, both, full."""
    return [
        replace(config, training=replace(config.training, recompute=mode, recompute_modules=modules))  # type: ignore[arg-type]
        for mode, modules in _RECOMPUTE
    ]


def _candidates(config: Config, cluster: Cluster) -> Iterator[ParallelConfig]:
    model, gpus, length = config.model, cluster.gpus, config.training.seq_length
    for tensor in _divisors(cluster.gpus_per_node):
        for pipeline in _divisors(model.num_hidden_layers):
            for context in _divisors(gpus):
                if gpus % (tensor * pipeline * context) or (context > 1 and length // context < _LEAST_TOKENS):
                    continue
                for expert in _divisors(model.num_local_experts):
                    for expert_tensor in sorted({1, tensor}):
                        for chunks in _divisors(model.num_hidden_layers // pipeline):
                            if chunks > (_MOST_CHUNKS if pipeline > 1 else 1):
                                continue
                            yield replace(
                                config.parallel,
                                tensor=tensor,
                                sequence=None,
                                pipeline=pipeline,
                                virtual_pipeline=chunks,
                                last_stage_layers=None,
                                context=context,
                                expert=expert,
                                expert_tensor=expert_tensor,
                            )


def _smaller_last_stages(even: Plan, cluster: Cluster, document_tokens: int | None) -> list[int]:
    """The two sizes of the last stage, in layers, next to that with which it would take as long with the head as the others."""
    parallel, layers = even.config.parallel, even.config.model.num_hidden_layers
    others = parallel.pipeline - 1
    if not others:
        return []
    stages = stage_seconds(even.config, cluster, document_tokens=document_tokens)
    head = stages[-1]["head"]
    layer = (sum(sum(terms.values()) for terms in stages) - head) / layers
    ideal = (layers - others * head / layer) / parallel.pipeline
    smaller = [last for last in last_stage_sizes(even.config) if last < layers // parallel.pipeline]
    return sorted(smaller, key=lambda last: abs(last - ideal))[:2]


def _needed(stages: list[MemoryEstimate]) -> float:
    return max(estimate.with_margin for estimate in stages) / _GIB


def _too_much(config: Config, stages: list[MemoryEstimate], cluster: Cluster, reserve_gib: float) -> str:
    stage, fullest = max(enumerate(stages), key=lambda pair: pair[1].with_margin)
    kinds = ("weights", "gradients", "optimizer", "activations", "logits", "update", "buffers")
    parts = ", ".join(f"{kind} {getattr(fullest, kind) / _GIB:.1f}" for kind in kinds)
    remedy = "more pipeline, expert or tensor ranks"
    if fullest.state < fullest.total / 2:
        remedy = "more context ranks, or a smaller training.micro_batch"
    elif derived(config, cluster.gpus).data > 1 and fullest.optimizer > fullest.weights + fullest.gradients:
        remedy = "more expert or pipeline ranks, or more GPUs to share the optimizer"
    return (
        f"stage {stage} needs {fullest.with_margin / _GIB:.1f} GiB with full recomputation ({parts}, a fifth more for "
        f"activations) and {reserve_gib:g} GiB in reserve, above the {cluster.memory_gib:g} GiB of a GPU; use {remedy}."
    )


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]
