"""What a checkpoint holds, as core's ShardedTensors under names that no layout and no kind of optimizer changes.

    <native name>                               weights, in the dtype of the model
    optimizer.state.param.<native name>         fp32 main weight, only of weights that are not fp32 themselves
    optimizer.state.exp_avg.<native name>       fp32
    optimizer.state.exp_avg_sq.<native name>    fp32
    rng_state                                   one object per rank

The optimizer's hyperparameters are not stored: they come from the configuration; its step count stands in the plain state.
"""

from dataclasses import replace
from typing import Any, Protocol

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import get_cuda_rng_tracker

from megatron_m1 import platform

__all__ = ["OptimizerState", "Trained", "optimizer_step", "rng_state", "set_rng_state"]

METADATA = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}
"""How core lays out its distributed optimizer: by parameter, so that any layout can load it (its default raises)."""
PREFIX = "optimizer.state."
MOMENTS = ("exp_avg", "exp_avg_sq")


class Trained(Protocol):
    """The part of engine.trainer.Trainer that checkpoints need."""

    models: list[Any]
    optimizer: MegatronOptimizer
    groups: ProcessGroupCollection

    def consumed_samples(self, step: int) -> int: ...

    def complete_parameters(self) -> None: ...


class OptimizerState:
    """The optimizer's state on this rank as `tensors`: stored name -> ShardedTensor.

    weights: native name -> ShardedTensor of the live parameter. The data is a gathered copy for core's distributed optimizer
    (collective over its data-parallel group; with `loading`, an empty buffer of the right shape), else the live state.
    """

    def __init__(self, optimizer: MegatronOptimizer, weights: dict[str, ShardedTensor], *, loading: bool) -> None:
        self.optimizer, self.weights = optimizer, weights
        parts = chained(optimizer)
        for part in parts:
            if not part.optimizer.state:
                part.init_state_fn(part.optimizer, part.config)
        self.nested = None
        if all(isinstance(part, DistributedOptimizer) for part in parts):
            for part in parts:
                correct_order(part)
            self.nested = optimizer.sharded_state_dict(dict(weights), is_loading=loading, metadata=METADATA)
            tensors = {tensor.key: tensor for tensor in _sharded_tensors(self.nested)}
        else:
            tensors = _live_tensors(parts, weights)
        self.fp32 = {
            f"{PREFIX}param.{name}": weight for name, weight in weights.items() if weight.dtype == torch.float32
        }
        self.tensors = {key: tensor for key, tensor in tensors.items() if key not in self.fp32}

    def restore(self, loaded: dict[str, torch.Tensor], *, step: int) -> None:
        """Take over what was read for `tensors`; the weights must be in place already."""
        if self.nested is not None:
            weights = {key: weight.data for key, weight in self.fp32.items()}
            self.optimizer.load_state_dict(_with_data(self.nested, weights | loaded))
        else:
            for key, tensor in self.tensors.items():
                tensor.data.copy_(loaded[key])
        for part in chained(self.optimizer):
            for group in part.optimizer.param_groups:
                group["step"] = step


def optimizer_step(optimizer: MegatronOptimizer) -> int:
    """Number of updates made, which Adam's bias correction needs."""
    steps = {
        group.get("step", 0) for part in chained(optimizer) for group in part.optimizer.param_groups if group["params"]
    }
    assert len(steps) == 1, f"parameter groups have made different numbers of steps: {steps}"
    return int(steps.pop())


def chained(optimizer: MegatronOptimizer) -> list[MegatronOptimizer]:
    """Core's optimizers behind one (dense and expert parameters have one each)."""
    return getattr(optimizer, "chained_optimizers", [optimizer])


def correct_order(part: DistributedOptimizer) -> None:
    """Make core find the state of a parameter where the model mixes bf16 and fp32 weights.

    Core looks it up by position, and its map has the order of the buffers while the inner optimizer has fp32 weights first
    (core/optimizer/distrib_optimizer.py:455 against :344, 0.19.2): other shapes raise, equal shapes are swapped in silence.
    """
    for group, (fp32, half) in enumerate(zip(part.model_fp32_groups, part.model_float16_groups, strict=True)):
        for position, param in enumerate([*fp32, *half]):
            part.model_param_group_index_map[param] = (group, position)


def _live_tensors(parts: list[MegatronOptimizer], weights: dict[str, ShardedTensor]) -> dict[str, ShardedTensor]:
    """State of optimizers that are not distributed. Ours because core's confuses parameters where the model mixes bf16 and
    fp32 weights (core/optimizer/optimizer.py:1147, 0.19.2: it numbers the bf16 ones only)."""
    state = {id(param): values for part in parts for param, values in part.optimizer.state.items()}
    tensors = {}
    for name, weight in weights.items():
        main = weight.data if weight.dtype == torch.float32 else weight.data.main_param
        values = {"param": main.detach(), **{key: state[id(main)][key] for key in MOMENTS}}
        for kind, value in values.items():
            key = f"{PREFIX}{kind}.{name}"
            tensors[key] = replace(weight, key=key, data=value, dtype=value.dtype)
    return tensors


def _sharded_tensors(nested: Any) -> list[ShardedTensor]:
    if isinstance(nested, ShardedTensor):
        return [nested]
    children = nested.values() if isinstance(nested, dict) else nested if isinstance(nested, list) else ()
    return [tensor for child in children for tensor in _sharded_tensors(child)]


def _with_data(nested: Any, data: dict[str, torch.Tensor]) -> Any:
    """`nested` with data[key] in place of each ShardedTensor."""
    if isinstance(nested, ShardedTensor):
        return data[nested.key]
    if isinstance(nested, dict):
        return {key: _with_data(child, data) for key, child in nested.items()}
    return [_with_data(child, data) for child in nested] if isinstance(nested, list) else nested


def rng_state() -> ShardedObject:
    """This rank's random number generators: torch's on CPU and device, and those of core's tracker."""
    state = {"cpu": torch.get_rng_state(), "tracker": get_cuda_rng_tracker().get_states()}
    if platform.is_cuda():
        state["device"] = torch.get_device_module(platform.device()).get_rng_state(platform.device())
    return ShardedObject("rng_state", state, (dist.get_world_size(),), (dist.get_rank(),))


def set_rng_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["cpu"])
    get_cuda_rng_tracker().set_states(state["tracker"])
    if platform.is_cuda():
        torch.get_device_module(platform.device()).set_rng_state(state["device"], platform.device())
