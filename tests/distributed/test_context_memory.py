"""A lightning layer over context-parallel ranks keeps no more for its backward pass than on one, and gives it back layer by layer."""

import gc
from dataclasses import dataclass
from unittest.mock import patch

import pytest
import torch
from m1_kernels import chunked
from torch import Tensor

from megatron_m1.engine.equality import equality_config
from megatron_m1.model import lightning
from megatron_m1.model.build import build_model
from megatron_m1.parallel import SequenceLayout, SequenceParams, destroy_groups, init_groups

ROWS, LOCAL_TOKENS = 2, 64


@dataclass
class Kept:
    """Bytes of a call over ranks, less those of the same call without them; both count everything that Python can reach."""

    forward: int
    """Between forward and backward pass."""
    backward: int
    """After the backward pass, the graph not yet freed."""
    states: int
    """Bytes of one state of every piece."""
    same: bool
    """Whether output and gradients have the bits of a run that keeps silu(qkv)."""


def reachable_bytes() -> int:
    gc.collect()
    storages = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in gc.get_objects() if type(t) is Tensor
    }
    return sum(storages.values())


def call(
    layer: lightning.LightningAttention, hidden: Tensor, params: SequenceParams | None
) -> tuple[list[Tensor], int, int]:
    """(output and gradients, bytes kept by the forward pass, by the graph after the backward pass)."""
    leaves = [hidden, *layer.parameters()]
    before = reachable_bytes()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):
        out, _ = layer(hidden, packed_seq_params=params)
    forward = reachable_bytes() - before
    gradients = torch.autograd.grad(out.square().sum(), leaves)
    backward = reachable_bytes() - before
    return [out.detach(), *gradients], forward, backward


def kept(rank: int, world: int, method: str) -> Kept:
    config = equality_config({"context": world, "context_lightning": method}, {})
    groups = init_groups(config.parallel, seed=1)
    [model] = build_model(config, groups)
    layer = next(m for m in model.modules() if isinstance(m, lightning.LightningAttention))
    layout = SequenceLayout.dense(world=world, rank=rank, rows=ROWS, tokens=world * LOCAL_TOKENS)
    params = SequenceParams(qkv_format="sbhd", layout=layout)
    hidden = torch.randn(LOCAL_TOKENS, ROWS, config.model.hidden_size, requires_grad=True)
    silu = lightning.transient_silu
    with patch.dict(chunked.KEPT_TOKENS, cpu=0):  # as for long sequences
        with patch.object(lightning, "transient_silu", lambda x: (silu(x)[0], lambda result: None)):
            expected, _, _ = call(layer, hidden, params)
        # Their cache is full of what this process ran before: the first call's grid takes the place of another.
        call(layer, hidden, None)
        _, forward_alone, backward_alone = call(layer, hidden, None)
        results, forward, backward = call(layer, hidden, params)
    destroy_groups()
    return Kept(
        forward - forward_alone,
        backward - backward_alone,
        2 * ROWS * layer.local_heads * layer.head_dim**2 * 4,
        all(torch.equal(a, b) for a, b in zip(results, expected, strict=True)),
    )


@pytest.mark.parametrize("method", ["ring", "all_gather"])
def test_a_layer_over_ranks_keeps_its_projection_and_its_states(method, ranks):
    for found in ranks(2, kept, method):
        assert found.same
        assert found.forward <= 2 * found.states and found.backward <= 0, found
