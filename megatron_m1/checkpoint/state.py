"""What a checkpoint holds, as core's ShardedTensors under names that no layout and no kind of optimizer changes.

    <native name>                               weights, in the dtype of the model
    optimizer.state.param.<native name>         fp32 main weight, only of weights that are not fp32 themselves
    optimizer.state.exp_avg.<native name>       fp32
    optimizer.state.exp_avg_sq.<native name>    fp32
    rng_state                                   one object per rank

The optimizer's hyperparameters are not stored: they come from the configuration; its step count stands in the plain state.
"""

from collections import ChainMap
from collections.abc import Iterator
from dataclasses import dataclass, replace
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

    weights: native name -> ShardedTensor of the live parameter. Without core's distributed optimizer the data is the live state.
    With it, each parameter's state is put together on one of its data-parallel ranks, which saves it from the host's memory
    (collective over the data-parallel group; the other ranks have no tensor of it), and `loading` gives empty tensors in the
    host's memory for the parameters that this rank has a part of.  Core's own way takes memory for all of them on every rank.
    """

    def __init__(self, optimizer: MegatronOptimizer, weights: dict[str, ShardedTensor], *, loading: bool) -> None:
        self.optimizer, self.weights = optimizer, weights
        self.names = _names(weights)  # reading takes the parameters out of `weights`
        parts = chained(optimizer)
        for part in parts:
            if not part.optimizer.state:
                part.init_state_fn(part.optimizer, part.config)
        self.distributed = all(isinstance(part, DistributedOptimizer) for part in parts)
        if self.distributed:
            self.tensors: dict[str, ShardedTensor] = {}
            for part in parts:
                correct_order(part)
                self.tensors |= (_wanted_tensors if loading else _gathered_tensors)(part, weights)
        else:
            self.tensors = _live_tensors(parts, weights)

    def restore(self, loaded: dict[str, torch.Tensor], *, step: int) -> None:
        """Take over what was read for `tensors`; the weights must be in place already."""
        if self.distributed:
            for part in chained(self.optimizer):
                for name, _, shard in _parameters(part, self.names):
                    if shard is not None:
                        for kind, value in shard.values.items():
                            if (key := _stored_name(kind, self.weights[name])) is not None:
                                value.copy_(loaded[key].flatten()[shard.window])
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
    for weight in weights.values():
        main = weight.data if weight.dtype == torch.float32 else weight.data.main_param
        values = {"param": main.detach(), **{key: state[id(main)][key] for key in MOMENTS}}
        for kind, value in values.items():
            if (key := _stored_name(kind, weight)) is not None:
                tensors[key] = replace(weight, key=key, data=value, dtype=value.dtype)
    return tensors


@dataclass(frozen=True)
class _Shard:
    """This rank's part of the state of one parameter."""

    window: slice
    """Of the flattened parameter."""
    values: dict[str, torch.Tensor]
    """The live fp32 main weight ("param") and moments, flat."""


def _names(weights: dict[str, ShardedTensor]) -> dict[int, str]:
    """id of a parameter -> native name"""
    return {id(weight.data): name for name, weight in weights.items()}


def _parameters(part: DistributedOptimizer, names: dict[int, str]) -> Iterator[tuple[str, torch.Tensor, _Shard | None]]:
    """(native name, parameter, this rank's part if it has one), in an order that all data-parallel ranks share."""
    for buffer, ranges in zip(part.buffers, part.gbuf_ranges, strict=True):
        (buckets,) = ranges.values()
        windows = ChainMap(*(bucket["param_map"] for bucket in buckets))
        for parameter in buffer.param_index_map:
            shard = None
            if parameter in windows:
                window = windows[parameter]["param"]
                values = part._get_main_param_and_optimizer_states(parameter)
                shard = _Shard(
                    slice(window.start, window.end), {key: values[key].detach() for key in ("param", *MOMENTS)}
                )
            yield names[id(parameter)], parameter, shard


def _gathered_tensors(part: DistributedOptimizer, weights: dict[str, ShardedTensor]) -> dict[str, ShardedTensor]:
    group, tensors = part.data_parallel_group, {}
    held = [0] * group.size()
    for name, parameter, shard in _parameters(part, _names(weights)):
        weight = weights[name]
        writer = held.index(min(held))
        held[writer] += parameter.numel()
        for kind in ("param", *MOMENTS):
            key = _stored_name(kind, weight)
            if key is None:
                continue
            whole = torch.zeros(parameter.numel(), dtype=torch.float32, device=parameter.device)
            if shard is not None:
                whole[shard.window] = shard.values[kind]
            # Parts that do not overlap, summed as integers: every bit arrives, also that of -0.0.
            dist.reduce(whole.view(torch.int32), group=group, group_dst=writer)
            if group.rank() == writer:
                data = whole.view(weight.local_shape).cpu()
                tensors[key] = replace(
                    weight, key=key, data=data, dtype=data.dtype, replica_id=(*weight.replica_id[:-1], 0)
                )
    return tensors


def _wanted_tensors(part: DistributedOptimizer, weights: dict[str, ShardedTensor]) -> dict[str, ShardedTensor]:
    tensors = {}
    for name, _, shard in _parameters(part, _names(weights)):
        for kind in () if shard is None else ("param", *MOMENTS):
            if (key := _stored_name(kind, weights[name])) is not None:
                data = torch.empty(weights[name].local_shape, dtype=torch.float32, device="cpu")
                tensors[key] = replace(weights[name], key=key, data=data, dtype=data.dtype)
    return tensors


def _stored_name(kind: str, weight: ShardedTensor) -> str | None:
    """None for the main weight of an fp32 weight, which is that weight."""
    if kind == "param" and weight.dtype == torch.float32:
        return None
    return f"{PREFIX}{kind}.{weight.key}"


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
