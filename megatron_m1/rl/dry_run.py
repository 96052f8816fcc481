"""`rl --dry-run`: what a configuration would do on a given number of ranks, generation included, without a GPU or a process group."""

import os

from megatron_m1.config import Config, derived
from megatron_m1.config.validate import validate_rl
from megatron_m1.engine.dry_run import config_and_world, dry_run_report
from megatron_m1.engine.memory import estimate_memory, stage_layers

__all__ = ["RolloutMemory", "main", "rollout_memory"]

_GIB = 2**30
_BLOCK_TOKENS = 64
"""Of the cache (generation/blocks.py, which needs torch and so is not imported here)."""
_PREFILL_TOKENS = 2048
"""Of a pass over prompts at most (generation/engine.py)."""


class RolloutMemory:
    """Bytes on one rank of a pipeline stage while it generates; gradients and optimizer stay where they are.

    weights, training: weights; gradients and optimizer state.  blocks: keys and values of `slots` sequences, each as long as it may
    become.  states: of lightning layers, for the slots and one prompt that waits for slots.  working: hidden states of a pass over
    prompts through a layer, and the logits of all slots.  block, slot: one block of keys and values, one slot's states.
    """

    def __init__(self, config: Config, world_size: int, stage: int) -> None:
        model, parallel, rl = config.model, config.parallel, config.rl
        size = 2 if config.training.precision == "bf16" else 4
        types = model.layer_types()
        kinds = [types[layer] for layer in stage_layers(config, stage)]
        estimate = estimate_memory(config, world_size)[stage]
        heads, groups = model.num_attention_heads // parallel.tensor, model.num_key_value_heads // parallel.tensor
        self.weights, self.training = estimate.weights, estimate.gradients + estimate.optimizer
        self.block = 2 * _BLOCK_TOKENS * groups * model.head_dim * size * kinds.count(1)
        self.slot = heads * model.head_dim**2 * 4 * kinds.count(0)
        blocks = rl.slots * -(-config.training.seq_length // _BLOCK_TOKENS) + 1
        if rl.cache_tokens is not None:
            blocks = min(blocks, rl.cache_tokens // _BLOCK_TOKENS)
        self.blocks, self.states = blocks * self.block, (rl.slots + 1) * self.slot
        tokens = max(_PREFILL_TOKENS, rl.slots)
        width = 4 * model.hidden_size + 7 * heads * model.head_dim
        routed = tokens * model.num_experts_per_tok * (2 * model.hidden_size + 3 * model.intermediate_size)
        logits = 2 * 4 * rl.slots * model.vocab_size / parallel.tensor if stage == parallel.pipeline - 1 else 0.0
        self.working = (tokens * width + routed / parallel.tensor) * size + logits

    @property
    def total(self) -> float:
        return self.weights + self.training + self.blocks + self.states + self.working


def rollout_memory(config: Config, world_size: int) -> list[RolloutMemory]:
    """Of a rank of every pipeline stage, first to last. Counted exactly but for `working`."""
    return [RolloutMemory(config, world_size, stage) for stage in range(config.parallel.pipeline)]


def main(argv: list[str]) -> None:
    """Print the report for configuration options plus `--world-size N` (default: $WORLD_SIZE, else 1) on rank 0.

    Raises ConfigError as the run itself would before it reads a file.
    """
    config, world_size = config_and_world(argv)
    validate_rl(config, world_size)
    if os.environ.get("RANK", "0") == "0":
        sections = {
            "generation batches": _batches(config, world_size),
            "memory of rollouts per rank, GiB": _memory(config, world_size),
        }
        print(dry_run_report(config, world_size, sections))


def _batches(config: Config, world_size: int) -> str:
    rl, training, parallel = config.rl, config.training, config.parallel
    replicas = derived(config, world_size).data * parallel.context
    samples = training.global_batch * rl.updates_per_batch
    windows = [stage.max_new_tokens for stage in rl.windows] or [rl.max_new_tokens]
    return "\n".join(
        (
            f"{training.steps} batches of {samples // rl.samples_per_prompt} prompts x {rl.samples_per_prompt} samples, "
            f"{rl.updates_per_batch} updates of {training.global_batch} samples each",
            f"{replicas} replicas of {parallel.tensor * parallel.pipeline} ranks generate {samples / replicas:g} samples each, "
            f"{rl.slots} at a time",
            f"output windows {', '.join(map(str, windows))}; packs of {training.micro_batch * training.seq_length} tokens",
            "a step of the other sections is an update whose samples are as long as training.seq_length",
        )
    )


def _memory(config: Config, world_size: int) -> str:
    names = ("weights", "training", "blocks", "states", "working", "total")
    found = rollout_memory(config, world_size)
    lines = ["stage " + "".join(f"{name:>12s}" for name in names) + "   while training"]
    for stage, (memory, training) in enumerate(zip(found, estimate_memory(config, world_size), strict=True)):
        row = "".join(f"{getattr(memory, name) / _GIB:12.2f}" for name in names)
        lines.append(f"{stage:5d} {row}{training.total / _GIB:17.2f}")
    lines.append(
        "training: gradients and optimizer state, which stay; blocks: keys and values, until the batch is complete"
    )
    slot, block = max(memory.slot for memory in found), max(memory.block for memory in found)
    lines.append(
        f"a slot takes at most {slot / 2**20:.2f} MiB of states, whatever its length, and {block / 2**10:.2f} KiB of keys and values "
        f"for every {_BLOCK_TOKENS} tokens"
    )
    return "\n".join(lines)
