"""Build this rank's part of the model."""

import itertools

import torch
from m1_kernels.triton_runtime import interpreting
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.utils import unwrap_model
from torch import Tensor

from megatron_m1 import platform
from megatron_m1.config.errors import ConfigError
from megatron_m1.config.schema import Config
from megatron_m1.model.init import initialize
from megatron_m1.model.lightning import LightningAttention
from megatron_m1.model.m1 import M1Model
from megatron_m1.model.router import M1Router
from megatron_m1.model.transformer_config import core_config

__all__ = ["build_model", "lightning_layers", "model_sharded_state", "routers", "sharded_parameters"]


def build_model(
    config: Config, groups: ProcessGroupCollection, *, device: torch.device | None = None, initial_weights: bool = True
) -> list[M1Model]:
    """This rank's model chunks (one, or one per virtual pipeline stage), initialised from training.seed.

    device: where the parameters live; None for the platform's. On the meta device nothing is initialised.
    initial_weights: False where a checkpoint is loaded next; until then the matrices are undefined.
    """
    core = core_config(config)
    device = device or platform.device()
    strategy = config.training.lightning_strategy
    if strategy != "auto" and device.type == "cpu" and not interpreting():
        raise ConfigError(
            f"training.lightning_strategy={strategy} is one of the Triton kernels, which do not run on this CPU; use auto."
        )
    chunks = config.parallel.virtual_pipeline
    rank, size = groups.pp.rank(), groups.pp.size()
    models = []
    with torch.device(device):
        for stage in range(chunks):
            models.append(
                M1Model(
                    core,
                    moe=config.moe,
                    pg_collection=groups,
                    pre_process=rank == 0 and stage == 0,
                    post_process=rank == size - 1 and stage == chunks - 1,
                    vp_stage=stage if chunks > 1 else None,
                )
            )
    if initial_weights and device.type != "meta":
        initialize(sharded_parameters(models), config.model, seed=config.training.seed)
    return models


def model_sharded_state(models: list[torch.nn.Module], groups: ProcessGroupCollection) -> list[dict]:
    """Core's sharded state dict of each chunk (wrapped or not), with global layer and expert indices in its keys."""
    return [m.sharded_state_dict(metadata={"dp_cp_group": groups.dp_cp}) for m in unwrap_model(models)]


def sharded_parameters(models: list[torch.nn.Module]) -> dict[str, ShardedTensor]:
    """Native name -> ShardedTensor whose `.data` is the local parameter, over all chunks of this rank."""
    plain = unwrap_model(models)
    states = model_sharded_state(plain, plain[0].pg_collection)
    tensors = (value for state in states for value in state.values() if isinstance(value, ShardedTensor))
    return {tensor.key: tensor for tensor in tensors}


def routers(models: list[torch.nn.Module]) -> list[M1Router]:
    """The routers of this rank, in layer order."""
    modules = itertools.chain.from_iterable(m.modules() for m in unwrap_model(models))
    return [module for module in modules if isinstance(module, M1Router)]


def lightning_layers(models: list[torch.nn.Module]) -> dict[int, Tensor]:
    """0-based layer index -> slopes fp32 [local heads] of the lightning layers of this rank."""
    layers = itertools.chain.from_iterable(m.decoder.layers for m in unwrap_model(models))
    return {
        layer.layer_number - 1: layer.self_attention.slopes
        for layer in layers
        if isinstance(layer.self_attention, LightningAttention)
    }
