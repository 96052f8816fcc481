"""Which experts every token went to, pass by pass."""

import contextlib
from collections.abc import Iterator, Sequence
from functools import partial

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron_m1.generation.sampling import gathered
from megatron_m1.model.build import routers
from megatron_m1.model.m1 import M1Model

__all__ = ["RoutingRecord"]


class RoutingRecord:
    """Collects the choices of this rank's routers; `take` gives those of the last pass.

    Where the routers run as modules their outputs are read by hooks (`listening`), and the tensor-parallel ranks have a shard of
    the tokens each; where generation/decode.py stands in for them it calls `add` with all tokens.
    """

    def __init__(self, models: Sequence[M1Model], groups: ProcessGroupCollection) -> None:
        self.groups = groups
        self.layers = [layer for model in models for layer in model.decoder.layers]
        self._routers = routers(list(models))
        self._chosen: dict[int, Tensor] = {}

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Hooks on the routers while the context is open."""
        handles = [
            router.register_forward_hook(partial(self._hook, layer.layer_number))
            for router, layer in zip(self._routers, self.layers, strict=True)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def add(self, layer_number: int, experts: Tensor) -> None:
        """experts [n, top_k] of all tokens of the pass, likeliest first."""
        self._chosen[layer_number] = experts.to(torch.int16)

    def take(self, tokens: int) -> Tensor:
        """[tokens, layers here, top_k] int16 of the pass that has just run; padding beyond `tokens` is cut off."""
        out = torch.stack([self._chosen[layer.layer_number] for layer in self.layers], dim=1)
        self._chosen.clear()
        return out[:tokens]

    def assembled(self, parts: list[Tensor]) -> Tensor:
        """[all tokens, layers of the model, top_k] int16 on CPU from one sequence's parts on every pipeline stage."""
        local = torch.cat(parts).to(torch.int32)
        pp = self.groups.pp
        if pp.size() == 1:
            return local.to(torch.int16).cpu()
        table = local.new_zeros(len(local), self.layers[0].config.num_layers, local.shape[-1])
        table[:, [layer.layer_number - 1 for layer in self.layers]] = local
        dist.all_reduce(table, group=pp)
        return table.to(torch.int16).cpu()

    def _hook(self, layer_number: int, router: torch.nn.Module, inputs: object, output: tuple[Tensor, Tensor]) -> None:
        probs, chosen = output
        experts = torch.where(chosen, probs, -1.0).topk(router.topk, dim=-1).indices  # type: ignore[arg-type]
        tp = self.groups.tp
        if tp.size() > 1:
            experts = gathered(experts, tp).flatten(0, 1)
        self.add(layer_number, experts)
