"""Gradient norm and update-to-weight ratio by layer and by slope group: where a run becomes unstable."""

from collections.abc import Callable

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import is_main_replica
from torch import Tensor

from megatron_m1.engine.trainer import Trainer
from megatron_m1.model.build import lightning_layers, sharded_parameters

__all__ = ["LayerStats"]

SLOPE_EDGES = (1e-3, 1e-2, 1e-1)
BLOCK_ELEMENTS = 1 << 24
"""Weights whose update is formed in fp64 at a time."""
SLOPE_GROUPS = ("slope<1e-3", "slope<1e-2", "slope<1e-1", "slope>=1e-1")


class LayerStats:
    """Figures of one step, on every rank: `prepare()`, forward and backward, `before_update()`, update, `after_update()`.

    L2 norms over the global tensors, gradients before clipping; update_ratio = ||w_after - w_before|| / ||w_before|| of the weights
    that the model computes with. Keys: `layer_000`..., `embedding`, `output` and the SLOPE_GROUPS (heads of the lightning qkv
    projections by their slope: slow heads see the longest context).
    Costs a copy of the local weights and whole gradients on every data-parallel rank for that step.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        layers = trainer.config.model.num_hidden_layers
        self.keys = [*(f"layer_{i:03d}" for i in range(layers)), "embedding", "output", *SLOPE_GROUPS]
        self.saved: dict[str, Tensor] = {}
        self.gradient_squares = torch.zeros(0)

    def prepare(self) -> None:
        """Have the coming backward pass reduce gradients in full."""
        self.trainer.force_all_reduce = True

    def before_update(self) -> None:
        """Take the gradients' norms and remember the weights."""
        self.trainer.force_all_reduce = False
        self.gradient_squares = self._sum(lambda name, parameter: parameter.main_grad)
        self.saved = {name: weight.detach().clone() for name, weight in self.trainer.parameters().items()}

    def after_update(self) -> dict[str, dict[str, float]]:
        """{"grad_norm": {key: norm}, "update_ratio": {key: ratio}}"""
        self.trainer.complete_parameters()
        weight = self._sum(lambda name, parameter: self.saved[name])
        update = self._sum(lambda name, parameter: parameter.detach(), subtract=self.saved)
        self.saved = {}
        ratio = (update / weight.clamp(min=1e-300)).sqrt()
        return {
            "grad_norm": dict(zip(self.keys, self.gradient_squares.sqrt().tolist(), strict=True)),
            "update_ratio": dict(zip(self.keys, ratio.tolist(), strict=True)),
        }

    def _sum(self, values: Callable[[str, Tensor], Tensor], subtract: dict[str, Tensor] | None = None) -> Tensor:
        """[keys] fp64: sums of squares of `values(name, parameter)`, less `subtract[name]`, over the global tensors."""
        sums = torch.zeros(len(self.keys), dtype=torch.float64, device=self.trainer.device)
        for name, sharded in sharded_parameters(self.trainer.models).items():
            if is_main_replica(sharded.replica_id):
                self._add(sums, name, _row_squares(values(name, sharded.data), subtract and subtract[name]))
        dist.all_reduce(sums)
        return sums

    def _add(self, sums: Tensor, name: str, rows: Tensor) -> None:
        sums[self.keys.index(_group(name))] += rows.sum()
        if name.endswith("self_attention.qkv_proj.weight"):
            slopes = lightning_layers(self.trainer.models).get(int(name.split(".")[2]))
            if slopes is not None:
                groups = torch.bucketize(slopes.cpu(), torch.tensor(SLOPE_EDGES), right=True)
                first = len(self.keys) - len(SLOPE_GROUPS)
                sums.index_add_(0, (groups + first).to(sums.device), rows.view(len(slopes), -1).sum(dim=1))


def _row_squares(value: Tensor, subtract: Tensor | None) -> Tensor:
    """[rows] fp64: sums of squares over the last dimension of `value - subtract`, a block of rows at a time."""
    value = value.detach().flatten(0, -2) if value.dim() > 1 else value.detach()[None]
    size = max(1, BLOCK_ELEMENTS // value.shape[1])
    blocks = value.split(size)
    if subtract is not None:
        olds = subtract.view_as(value).split(size)
        blocks = (new.double() - old for new, old in zip(blocks, olds, strict=True))
    return torch.cat([torch.linalg.vector_norm(block, dim=1, dtype=torch.float64).square() for block in blocks])


def _group(name: str) -> str:
    if name.startswith("embedding"):
        return "embedding"
    if name.startswith("decoder.layers."):
        return f"layer_{int(name.split('.')[2]):03d}"
    return "output"
