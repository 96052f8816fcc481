"""Replicas that share experts run pass by pass together: which ones, until when, and what those without work do."""

import time
from collections.abc import Sequence

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_m1.model.m1 import M1Model

__all__ = ["LockStep"]


class LockStep:
    """The replicas (data- and context-parallel ranks) over which the experts of this rank are spread; others go their own way.

    Every layer of every pass has the same collectives over them, whether it is a prefill, a decoding pass or `idle`, so that each
    replica does in a pass what it has to do. `any` before every pass says whether there is to be one. `idle_s`: seconds between the
    end of the own work and that of the others'.
    """

    def __init__(self, models: Sequence[M1Model], groups: ProcessGroupCollection) -> None:
        self.models = list(models)
        tp, sharing = groups.tp.size(), groups.tp_ep.size()
        self.needed = tp % sharing != 0
        self.rows = tp
        self.idle_s = 0.0
        self._idle_since: float | None = None
        # The ranks of tp_ep are neighbours, whole replicas of a stage where tp divides them.
        self._group = groups.tp_ep if sharing % tp == 0 else groups.dp_cp

    def any(self, work: bool) -> bool:
        """Whether one of the replicas has work left."""
        if not self.needed:
            return work
        if work:
            self._idle_since = None
        elif self._idle_since is None:
            self._idle_since = time.perf_counter()
        flag = torch.tensor([work], dtype=torch.int32, device=next(self.models[0].parameters()).device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self._group)
        goes_on = bool(flag.item())
        if not goes_on and self._idle_since is not None:
            self.idle_s += time.perf_counter() - self._idle_since
            self._idle_since = None
        return goes_on

    @torch.no_grad()
    def idle(self) -> None:
        """A pass of a replica without work: one token of zeros a rank (core's router takes none) through the experts of its
        layers, nothing else."""
        config, weight = self.models[0].config, next(self.models[0].parameters())
        zeros = torch.zeros(self.rows, 1, config.hidden_size, dtype=config.params_dtype, device=weight.device)
        for model in self.models:
            for layer in model.decoder.layers:
                layer._experts(zeros, None)
