"""`pretrain --dry-run`: what a configuration would do on a given number of ranks, without a GPU or a process group."""

import importlib.util
import os
from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType

from megatron_m1.config import Config, ConfigError, derived, load_config, rank_groups, to_yaml, validate
from megatron_m1.config.layout import AUTO_RING_BYTES
from megatron_m1.engine.cluster import DEVICES
from megatron_m1.engine.context_exchange import key_value_exchange, state_exchange
from megatron_m1.engine.flops import count_parameters, training_flops_per_token
from megatron_m1.engine.memory import RESERVE_GIB, estimate_memory, stage_layers
from megatron_m1.engine.schedule import consumed_samples, global_batch_at, learning_rate
from megatron_m1.engine.step_time import step_time

__all__ = ["config_and_world", "dry_run_report", "main"]

_GIB = 2**30
_SHOWN_GROUPS = 4
_DEVICE = "H800"
_BF16_SUM_MICRO_BATCHES = 64
"""More micro-batches than this lose much of their gradients in a bf16 sum, whose increments below 1/256 of it vanish."""


def main(argv: list[str]) -> None:
    """Print the report for configuration options plus `--world-size N` (default: $WORLD_SIZE, else 1) on rank 0.

    Raises ConfigError as the run itself would.
    """
    config, world_size = config_and_world(argv)
    validate(config, world_size)
    if os.environ.get("RANK", "0") == "0":
        print(dry_run_report(config, world_size))


def config_and_world(argv: list[str]) -> tuple[Config, int]:
    """Configuration, not validated, and world size of a dry run's options."""
    world_size, options = _take_world_size(argv)
    return load_config(options), world_size


def dry_run_report(config: Config, world_size: int, more: Mapping[str, str] = MappingProxyType({})) -> str:
    """Resolved configuration, parameter counts, rank layout, memory, FLOPs and schedule as text.

    config: one that `validate` accepts for world_size.  more: text of further sections by title, to stand after memory.
    """
    sections = (
        ("configuration", to_yaml(config).rstrip()),
        ("parameters", _parameters(config)),
        (f"layout of {world_size} ranks", _layout(config, world_size)),
        ("memory estimate per rank, GiB", _memory(config, world_size)),
        *more.items(),
        ("arithmetic", _arithmetic(config, world_size)),
        (f"estimated time of a step on {_DEVICE}", _time(config, world_size)),
        ("schedule", _schedule(config)),
        ("warnings", _warnings(config, world_size)),
    )
    return (
        "\n\n".join(f"== {title}\n{text}" for title, text in sections if text)
        + "\n\ndry run: the configuration is valid"
    )


def _take_world_size(argv: list[str]) -> tuple[int, list[str]]:
    given = os.environ.get("WORLD_SIZE", "1")
    options = []
    arguments = iter(argv)
    for argument in arguments:
        if argument == "--world-size":
            given = next(arguments, "")
        elif argument.startswith("--world-size="):
            given = argument.partition("=")[2]
        else:
            options.append(argument)
    if not given.isdecimal() or int(given) < 1:
        raise ConfigError(f"--world-size={given} must be a number of ranks, 1 or more.")
    return int(given), options


def _parameters(config: Config) -> str:
    count = count_parameters(config.model)
    kinds = config.model.layer_types()
    rows = [
        ("embedding", count.embedding),
        (f"lightning attention ({kinds.count(0)} layers)", count.lightning),
        (f"softmax attention ({kinds.count(1)} layers)", count.softmax),
        ("routers", count.router),
        ("experts", count.experts),
        ("shared experts", count.shared),
        ("norms", count.norms),
        ("head", count.head),
        ("total", count.total),
        ("active per token, without embedding and head", count.active),
    ]
    return "\n".join(f"{name:46s} {number:>19,d}" for name, number in rows if number)


def _layout(config: Config, world_size: int) -> str:
    lines = []
    for kind, groups in rank_groups(config.parallel, world_size).items():
        shown = " ".join(_ranks(group) for group in groups[:_SHOWN_GROUPS])
        more = f" ... ({len(groups)} groups)" if len(groups) > _SHOWN_GROUPS else ""
        lines.append(f"{kind:14s} size {len(groups[0]):4d}   {shown}{more}")
    for stage in range(config.parallel.pipeline):
        layers = stage_layers(config, stage)
        softmax = sum(config.model.layer_types()[layer] for layer in layers)
        lines.append(f"stage {stage}: layers {_spans(layers)} ({softmax} softmax)")
    sizes = derived(config, world_size)
    sequence = "on" if sizes.sequence_parallel else "off"
    lines.append(
        f"sequence parallelism {sequence}; {sizes.micro_batches} micro-batches per step and data-parallel rank"
    )
    if config.parallel.context > 1:
        lines.append(_context(config))
    if config.moe.aux_loss != "none":
        lines.append(_balance(config, sizes.data))
    return "\n".join(lines)


def _context(config: Config) -> str:
    """How context-parallel ranks hand each other states, keys and values."""
    parallel, states, keys = config.parallel, state_exchange(config), key_value_exchange(config)
    named = {}
    for key, exchange in (("context_lightning", states), ("context_softmax", keys)):
        asked, gathered = getattr(parallel, key), exchange.gathered_bytes / 2**20
        named[key] = exchange.method
        if asked == "auto":
            named[key] += f" (auto: {gathered:.4g} MiB gathered a layer, limit {AUTO_RING_BYTES >> 20})"
    text = (
        f"context exchange: lightning states {named['context_lightning']}; keys and values {named['context_softmax']}"
    )
    if parallel.context_layout == "document":
        text += (
            f"; every document of a sequence has {states.held_bytes / 2**20:.3g} MiB of states a layer, and one is counted here: "
            "tools/plan_layout.py --document-tokens counts more"
        )
    return text


def _balance(config: Config, data: int) -> str:
    """What one load-balancing statistic of a layer is taken over; data: data-parallel ranks."""
    micro_batch, scope = config.training.micro_batch, config.moe.aux_loss
    span, rule = micro_batch, f"training.micro_batch={micro_batch}"
    if scope == "global":
        span, rule = micro_batch * data, f"{rule} x {data} data-parallel ranks"
    return f"expert balance statistics (moe.aux_loss={scope}) span {span} sequences: {rule}"


def _memory(config: Config, world_size: int) -> str:
    names = ("weights", "gradients", "optimizer", "activations", "logits", "update", "buffers", "total")
    lines = ["stage " + "".join(f"{name:>12s}" for name in names)]
    for stage, estimate in enumerate(estimate_memory(config, world_size)):
        lines.append(f"{stage:5d} " + "".join(f"{getattr(estimate, name) / _GIB:12.2f}" for name in names))
    lines.append("total: weights + gradients + optimizer + buffers + the larger of activations + logits and update")
    lines.append(
        "host memory of a save or load: about weights + optimizer, and the optimizer state of two more tensors"
    )
    lines.append("not counted: NCCL's own buffers, allocator fragmentation, the CUDA context (about 3 to 6 GiB)")
    return "\n".join(lines)


def _arithmetic(config: Config, world_size: int) -> str:
    training = config.training
    per_token = training_flops_per_token(config.model, training.seq_length)
    tokens = training.global_batch * training.seq_length
    total = consumed_samples(training.steps, training) * training.seq_length
    return "\n".join(
        (
            f"{per_token / 1e9:.4g} GFLOP per token (forward and backward, {training.seq_length} tokens per sequence)",
            f"{tokens:,d} tokens and {tokens * per_token / 1e12:.4g} TFLOP per step, "
            f"{tokens * per_token / 1e12 / world_size:.4g} TFLOP per rank",
            f"{total:,d} tokens in {training.steps} steps",
            *([_head(config)] if config.parallel.pipeline > 1 else []),
        )
    )


def _time(config: Config, world_size: int) -> str:
    cluster = replace(DEVICES[_DEVICE], gpus=world_size)
    time, training = step_time(config, cluster), config.training
    rate = training.global_batch * training.seq_length / time.total / world_size
    use = rate * training_flops_per_token(config.model, training.seq_length) / (cluster.peak_tflops * 1e12)
    terms = sorted(vars(time).items(), key=lambda term: -term[1])
    shares = ", ".join(f"{name} {seconds / time.total:.1%}" for name, seconds in terms if seconds > time.total / 1000)
    return (
        f"{time.total:.4g} s, {rate:.4g} tokens/s and GPU, {use:.1%} MFU: {shares}\n"
        f"a sum of terms (rates of engine/rates.py), {cluster.rates.calibration}; "
        "tools/plan_layout.py takes other GPUs and rates and compares layouts"
    )


def _head(config: Config) -> str:
    """The work that only the last pipeline stage has: the head, which M1 computes in fp32."""
    model, length = config.model, config.training.seq_length
    head = 6 * model.vocab_size * model.hidden_size
    kinds = [model.layer_types()[layer] for layer in stage_layers(config, config.parallel.pipeline - 1)]
    stage = training_flops_per_token(replace(model, num_hidden_layers=len(kinds), attn_type_list=kinds), length) - head
    products = config.training.head_products
    slow = "fp32 runs below the bf16 rate" if products == "fp32" else f"{products} takes several bf16 products for one"
    return (
        f"head: {head / 1e9:.4g} GFLOP per token in {products}, {head / stage:.0%} of the {stage / 1e9:.4g} GFLOP of its stage's "
        f"layers in {config.training.precision}: the last stage is the slowest, and {slow}"
    )


def _schedule(config: Config) -> str:
    training, schedule = config.training, config.schedule
    last = max(training.steps - 1, 0)
    points = {0, schedule.warmup_steps, last // 4, last // 2, 3 * last // 4, last}
    points |= {schedule.warmup_steps + schedule.constant_steps} | {stage.from_step for stage in training.batch_ramp}
    lines = [f"{'step':>10s} {'learning rate':>14s} {'global batch':>13s}"]
    for step in sorted(point for point in points if point <= last):
        rate = learning_rate(step, schedule, config.optimizer, training.steps)
        lines.append(f"{step:10d} {rate:14.4g} {global_batch_at(step, training):13d}")
    return "\n".join(lines)


def _warnings(config: Config, world_size: int) -> str:
    """One line for each; empty if there are none."""
    lines = []
    training, sizes = config.training, derived(config, world_size)
    largest = max([training.global_batch, *(stage.global_batch for stage in training.batch_ramp)])
    micro_batches = largest // (training.micro_batch * sizes.data)
    if training.grad_reduce_dtype == "bf16" and micro_batches > _BF16_SUM_MICRO_BATCHES:
        lines.append(
            f"training.grad_reduce_dtype=bf16 sums up to {micro_batches} micro-batches per step and rank in bf16, which loses "
            "increments below 1/256 of the sum; use fp32, more data-parallel ranks or a larger training.micro_batch."
        )
    method = config.parallel.context_softmax
    if config.parallel.context > 1 and method == "transformer_engine" and not _installed("transformer_engine"):
        lines.append(
            "parallel.context_softmax=transformer_engine needs Transformer Engine, which is not installed here; install "
            "transformer-engine[pytorch] 2.2 or later where the run starts, or use auto, ring or all_gather."
        )
    stages = estimate_memory(config, world_size)
    stage, fullest = max(enumerate(stages), key=lambda pair: pair[1].with_margin)
    needed, memory = fullest.with_margin / _GIB, DEVICES[_DEVICE].memory_gib
    if needed + RESERVE_GIB > memory:
        lines.append(
            f"stage {stage} needs {needed:.1f} GiB, a fifth more for activations included, and {RESERVE_GIB:g} GiB in reserve, above "
            f"the {memory:g} GiB of an {_DEVICE}: it will run out of memory there; tools/plan_layout.py --gpus {world_size} "
            f"--seq-length {training.seq_length} lists layouts that fit, or use GPUs with more memory."
        )
    return "\n".join(lines)


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _ranks(group: list[int]) -> str:
    if len(group) > 8:
        return f"[{group[0]},{group[1]},...,{group[-1]}]"
    return f"[{','.join(map(str, group))}]"


def _spans(numbers: list[int]) -> str:
    """`0-3,8-11` for runs of consecutive numbers."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ",".join(f"{first}-{last}" if last > first else str(first) for first, last in spans)
