"""Initial weights that depend on (seed, parameter name, expert) only, never on the layout."""

import hashlib
import math

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from torch import Tensor, nn

from megatron_m1.config.schema import ModelConfig

__all__ = ["initialize"]


@torch.no_grad()
def initialize(parameters: dict[str, ShardedTensor], model: ModelConfig, *, seed: int) -> None:
    """Fill the local shards in place. `parameters`: as `build.sharded_parameters` gives them.

    Every matrix is drawn on the CPU from its own generator, one expert and one of w1, w3, w2, q, k, v at a time: Xavier-uniform
    with the matrix's own fans (MiniMax-01 report) or normal. Norm weights are 1.
    """
    for name, sharded in parameters.items():
        local = sharded.data
        assert local is not None
        if len(sharded.global_shape) == 1:
            local.fill_(1.0)
            continue
        window = tuple(
            slice(offset, offset + size)
            for offset, size in zip(sharded.global_offset, sharded.local_shape, strict=True)
        )
        if name.endswith("experts.fc1") or name.endswith("experts.fc2"):
            _fill_experts(local, name, sharded.global_shape, window, model, seed)
        else:
            full = torch.cat(
                [_matrix(part, shape, model, seed) for part, shape in _parts(name, sharded.global_shape, model)]
            )
            if _is_grouped(name, model):
                full = _group_qkv(full, model)
            local.copy_(full[window])


def _fill_experts(
    local: Tensor, name: str, shape: tuple[int, ...], window: tuple[slice, ...], model: ModelConfig, seed: int
) -> None:
    for row, expert in enumerate(range(window[0].start, window[0].stop)):
        if name.endswith("fc1"):
            for part in range(2):
                full = _matrix(f"{name}.{expert}.{part}", shape[2:], model, seed)
                local[row, part].copy_(full[window[2:]])
        else:
            local[row].copy_(_matrix(f"{name}.{expert}", shape[1:], model, seed)[window[1:]])


def _is_grouped(name: str, model: ModelConfig) -> bool:
    """Whether `name` is the q, k and v projection of a softmax layer."""
    if not name.endswith("self_attention.qkv_proj.weight"):
        return False
    return model.layer_types()[int(name.split(".")[2])] == 1


def _parts(name: str, shape: tuple[int, ...], model: ModelConfig) -> list[tuple[str, tuple[int, ...]]]:
    """The matrices that `name` is made of, with their shapes; their rows one after the other are the global tensor."""
    if not _is_grouped(name, model):
        return [(name, shape)]
    q, kv = model.num_attention_heads * model.head_dim, model.num_key_value_heads * model.head_dim
    return [(f"{name}.{part}", (rows, shape[1])) for part, rows in (("q", q), ("k", kv), ("v", kv))]


def _group_qkv(full: Tensor, model: ModelConfig) -> Tensor:
    """Rows [all q | all k | all v] -> per KV group [its q heads | k | v]."""
    groups, dim = model.num_key_value_heads, model.head_dim
    q_rows = model.num_attention_heads * dim
    q, k, v = full.split([q_rows, groups * dim, groups * dim])
    return torch.cat([part.view(groups, -1, full.shape[1]) for part in (q, k, v)], dim=1).flatten(0, 1)


def _matrix(name: str, shape: tuple[int, ...], model: ModelConfig, seed: int) -> Tensor:
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    weight = torch.empty(shape, dtype=torch.float32, device="cpu")
    if model.init == "normal":
        return nn.init.normal_(weight, std=model.init_std, generator=generator)
    bound = math.sqrt(6.0 / (shape[0] + shape[1]))
    return nn.init.uniform_(weight, -bound, bound, generator=generator)
