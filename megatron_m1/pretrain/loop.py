"""The training loop, for pretraining and continual pretraining."""

import os
import time
from typing import Any

import torch.distributed as dist

from megatron_m1 import platform
from megatron_m1.config.load import load_config
from megatron_m1.config.schema import Config
from megatron_m1.config.validate import validate

__all__ = ["main", "train"]


def main(argv: list[str]) -> None:
    """`megatron_m1 pretrain`: options as in config/load.py; run alone or under torchrun."""
    config = load_config(argv)
    validate(config, int(os.environ.get("WORLD_SIZE", "1")))
    platform.setup()
    from megatron_m1.engine.distributed import init_distributed, shutdown_distributed

    init_distributed(config.parallel.timeout_s, deterministic=config.training.deterministic)
    train(config)
    shutdown_distributed()


def train(config: Config) -> None:
    """Train from `checkpoint.load` (or from scratch) to `training.steps`; torch.distributed is initialised.

    Position in the data, learning rate and batch size are functions of the step alone, so that a resumed run is the same run.
    """
    from megatron_m1.checkpoint.native import Checkpointer, check_save_folder
    from megatron_m1.checkpoint.together import together
    from megatron_m1.data.batches import MicroBatches
    from megatron_m1.data.dataset import build_dataset
    from megatron_m1.engine.layer_stats import LayerStats
    from megatron_m1.engine.metrics import MetricsLog
    from megatron_m1.engine.schedule import consumed_samples, global_batch_at, learning_rate
    from megatron_m1.engine.stop import EarlyStop
    from megatron_m1.engine.throughput import Throughput
    from megatron_m1.engine.trainer import Trainer
    from megatron_m1.parallel import group_sizes, init_groups
    from megatron_m1.pretrain.evaluation import Evaluation

    training, data = config.training, config.data
    groups = init_groups(config.parallel, seed=training.seed)
    with together():
        check_save_folder(config.checkpoint)
        dataset = build_dataset(
            data, seq_length=training.seq_length, seed=training.seed, split="train", vocab_size=config.model.vocab_size
        )
        evaluation = Evaluation(config, groups)
    trainer = Trainer(config, groups, initial_weights=config.checkpoint.load is None)
    checkpoints = Checkpointer(config, trainer)
    first = checkpoints.load() if config.checkpoint.load else 0
    throughput = Throughput(config, world_size=dist.get_world_size())
    stats = LayerStats(trainer)
    with together():
        log = MetricsLog(config, rank=dist.get_rank())

    with (
        log,
        checkpoints,
        EarlyStop(exit_after_s=training.exit_after_s, device=trainer.device) as stop,
        MicroBatches(dataset, document_boundaries=data.document_boundaries, num_workers=data.num_workers) as batches,
    ):
        log.event({"event": "start", "from_step": first, "process_groups": group_sizes(groups)})
        log.say(
            f"{dist.get_world_size()} ranks on {platform.device_name()}, {training.precision}, AdamW of {trainer.adam}"
        )
        if config.checkpoint.load:
            what = "weights of" if config.checkpoint.weights_only else f"continuing after step {first}:"
            log.say(f"{what} {config.checkpoint.load}")
        if evaluation.enabled:
            before = evaluation.loss(trainer)
            log.event({"event": "evaluation", "after_step": first, "valid_loss": before})
            log.say(f"held-out loss {before:.4f} before step {first + 1}")
        for step in range(first, training.steps):
            started = time.perf_counter()
            global_batch, lr = (
                global_batch_at(step, training),
                learning_rate(step, config.schedule, config.optimizer, training.steps),
            )
            share = batches.step(
                consumed_samples(step, training), global_batch, training.micro_batch, groups.dp.rank(), groups.dp.size()
            )
            observe = _every(config.logging.layer_stats_every_steps, step + 1)
            if observe:
                stats.prepare()
            loss, tokens = trainer.forward_backward(share)
            if observe:
                stats.before_update()
            result = trainer.update(loss, tokens, lr=lr)
            metrics: dict[str, Any] = {
                "step": step + 1,
                "loss": result.loss,
                "grad_norm": result.grad_norm,
                "lr": lr,
                "aux_loss": result.aux_loss,
                "z_loss": result.z_loss,
                "global_batch": global_batch,
                "loss_tokens": result.tokens,
                "consumed_samples": consumed_samples(step + 1, training),
                "expert_load_max": float(result.expert_load.max()),
                "expert_load_min": float(result.expert_load.min()),
            }
            if observe:
                metrics["layers"] = stats.after_update()
            platform.synchronize()
            metrics |= throughput.figures(global_batch, seconds=time.perf_counter() - started)
            metrics["peak_memory_gib"] = platform.peak_memory_bytes() / 2**30
            last, reason = step + 1 == training.steps, stop.reason()
            if evaluation.enabled and (last or _every(config.evaluation.every_steps, step + 1)):
                metrics["valid_loss"] = evaluation.loss(trainer)
            log.step(metrics, show=last or _every(config.logging.every_steps, step + 1))
            checkpoints.poll()
            if config.checkpoint.save and (last or reason or _every(config.checkpoint.every_steps, step + 1)):
                log.say(f"saving step {step + 1} to {config.checkpoint.save}")
                checkpoints.save(step + 1)
            if reason:
                log.say(f"stopping after step {step + 1}: {reason}")
                break
        if first >= training.steps:
            log.say(f"nothing to do: {first} steps are done, training.steps={training.steps}")


def _every(period: int, step: int) -> bool:
    return period > 0 and step % period == 0
