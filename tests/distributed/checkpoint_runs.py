"""Training runs on tiny models for the checkpoint tests: functions of one rank, for the `ranks` fixture."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from megatron_m1.config.schema import (
    CheckpointConfig,
    Config,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    TrainingConfig,
)

SEQ, VOCAB, BATCH, LR = 16, 64, 4, 1e-3
MODEL = ModelConfig(
    vocab_size=VOCAB,
    hidden_size=32,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    intermediate_size=32,
    num_local_experts=4,
    shared_intermediate_size=16,
    attn_type_list=[0, 1, 0, 0],
    rotary_dim=4,
)


@dataclass
class Run:
    """What one rank saw: figures of every step and, if asked for, all of its state."""

    steps: list[tuple[float, float]] = field(default_factory=list)
    """(loss, gradient norm)"""
    start: int = 0
    optimizers: int = 0
    """Core's, one after another."""
    state: dict[str, torch.Tensor] = field(default_factory=dict)


def tiny_config(
    save: Path | None = None, load: Path | None = None, *, precision: str = "fp32", **parallel: Any
) -> Config:
    return Config(
        model=replace(MODEL),
        parallel=ParallelConfig(**parallel),
        training=TrainingConfig(steps=5, micro_batch=1, global_batch=BATCH, seq_length=SEQ, precision=precision),
        optimizer=OptimizerConfig(lr=LR),
        checkpoint=CheckpointConfig(save=save and str(save), load=load and str(load)),
    )


def batches(step: int, data_rank: int, data_size: int) -> list[dict[str, torch.Tensor]]:
    """This data-parallel rank's micro-batches of one step, a pure function of the step."""
    micro_batches = []
    for sample in range(data_rank, BATCH, data_size):
        tokens = torch.randint(0, VOCAB, (1, SEQ + 1), generator=torch.Generator().manual_seed(100 * step + sample))
        micro_batches.append(
            {
                "tokens": tokens[:, :-1],
                "labels": tokens[:, 1:],
                "loss_mask": torch.ones(1, SEQ),
                "position_ids": torch.arange(SEQ)[None],
            }
        )
    return micro_batches


def make_trainer(config: Config) -> Any:
    from megatron_m1.engine.trainer import Trainer
    from megatron_m1.model.build import sharded_parameters
    from megatron_m1.parallel import init_groups

    groups = init_groups(config.parallel, seed=config.training.seed)
    trainer = Trainer(config, groups, initial_weights=config.checkpoint.load is None)
    if config.checkpoint.load is not None:
        weights = [sharded.data for sharded in sharded_parameters(trainer.models).values()]
        main = [weight for group in trainer.optimizer.param_groups for weight in group["params"]]
        with torch.no_grad():  # whatever is not loaded shows
            for weight in weights + main:
                weight.fill_(float("nan"))
    return trainer


def steps(trainer: Any, first: int, last: int) -> list[tuple[float, float]]:
    """(loss, gradient norm) of steps first .. last - 1."""
    dp = trainer.groups.dp
    results = [trainer.train_step(batches(step, dp.rank(), dp.size()), lr=LR) for step in range(first, last)]
    return [(result.loss, result.grad_norm) for result in results]


def full_state(trainer: Any) -> dict[str, torch.Tensor]:
    """Every number of this rank that the next step depends on: weights, optimizer, random number generators."""
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    state = {name: tensor.detach().clone() for name, tensor in trainer.parameters().items()}
    for number, part in enumerate(trainer.optimizer.chained_optimizers):
        for group_number, group in enumerate(part.optimizer.param_groups):
            state[f"step {number}.{group_number}"] = torch.tensor(group["step"])
            for position, param in enumerate(group["params"]):
                where = f"{number}.{group_number}.{position}"
                state[f"main {where}"] = param.detach().clone()
                for key, value in part.optimizer.state[param].items():
                    state[f"{key} {where}"] = value.detach().clone()
    state["rng"] = torch.get_rng_state()
    state |= {f"rng {name}": value for name, value in get_cuda_rng_tracker().get_states().items()}
    return state


def train(
    rank: int, world: int, config: Config, last: int, save_at: tuple[int, ...] = (), keep_state: bool = False
) -> Run:
    """Load if the configuration says so, train up to step `last`, save after the steps `save_at`."""
    from megatron_m1.checkpoint.native import Checkpointer

    trainer = make_trainer(config)
    with Checkpointer(config, trainer) as checkpointer:
        run = Run(start=checkpointer.load(), optimizers=len(trainer.optimizer.chained_optimizers))
        for step in range(run.start, last):
            run.steps += steps(trainer, step, step + 1)
            checkpointer.poll()
            if step + 1 in save_at:
                torch.rand(3)  # so that the generator's state is not the one it started with
                checkpointer.save(step + 1)
    if keep_state:
        run.state = full_state(trainer)
    return run
