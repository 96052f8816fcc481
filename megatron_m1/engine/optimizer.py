"""Core's data-parallel wrapper and optimizer for our model chunks."""

import logging

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer
from megatron.core.optimizer import OptimizerConfig as CoreOptimizerConfig
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_m1.config.schema import Config
from megatron_m1.model.m1 import M1Model

__all__ = ["build_optimizer", "set_gradient_clip", "set_learning_rate", "wrap_data_parallel"]


def wrap_data_parallel(
    models: list[M1Model], config: Config, groups: ProcessGroupCollection
) -> list[DistributedDataParallel]:
    """The chunks with gradient buffers that are SUMMED over the data-parallel ranks (the loss is normalised beforehand)."""
    # Core computes the buffer layout itself where none is given (distributed_data_parallel.py:133) and warns each time.
    logging.getLogger("megatron.core.distributed.distributed_data_parallel").setLevel(logging.ERROR)
    parallel = config.parallel
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=config.training.grad_reduce_dtype == "fp32",
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
        use_distributed_optimizer=parallel.distributed_optimizer,
    )
    return [
        DistributedDataParallel(
            config=model.config,
            ddp_config=ddp,
            module=model,
            # True would exchange a chunk's bf16 and fp32 buffers in one call, which gloo does wrongly and in silence
            # (torch 2.13: a coalesced all-gather takes all tensors for the type of the first).
            disable_bucketing=False,
            pg_collection=groups,
        )
        for model in models
    ]


def build_optimizer(
    models: list[DistributedDataParallel], config: Config, groups: ProcessGroupCollection
) -> MegatronOptimizer:
    """AdamW with fp32 main weights; no weight decay on norm weights."""
    optimizer, training = config.optimizer, config.training
    bf16 = training.precision == "bf16"
    core = CoreOptimizerConfig(
        optimizer="adam",
        lr=optimizer.lr,
        min_lr=0.0,
        weight_decay=optimizer.weight_decay,
        adam_beta1=optimizer.beta1,
        adam_beta2=optimizer.beta2,
        adam_eps=optimizer.eps,
        clip_grad=optimizer.clip_grad,
        bf16=bf16,
        params_dtype=torch.bfloat16 if bf16 else torch.float32,
        use_distributed_optimizer=config.parallel.distributed_optimizer,
        overlap_param_gather=config.parallel.overlap_param_gather,
    )
    return get_megatron_optimizer(core, models, use_gloo_process_groups=False, pg_collection=groups)


def set_learning_rate(optimizer: MegatronOptimizer, lr: float) -> None:
    """Use `lr` in the next step, for all parameters."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def set_gradient_clip(optimizer: MegatronOptimizer, clip_grad: float) -> None:
    """Clip to this global norm from the next step on; 0: no clipping."""
    for part in [optimizer, *getattr(optimizer, "chained_optimizers", [])]:
        part.config.clip_grad = clip_grad
