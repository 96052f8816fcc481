"""Reference generation: every token comes out of a whole training forward pass, so that training finds the same bits."""

import contextlib
from collections.abc import Iterator, Sequence

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.utils import unwrap_model
from torch import Tensor, nn

from megatron_m1.generation.lock_step import LockStep
from megatron_m1.generation.requests import Request, Result, Running
from megatron_m1.generation.routing import RoutingRecord
from megatron_m1.generation.schedule import results_of_all, share_of_replica
from megatron_m1.generation.stages import Stages, inference
from megatron_m1.model.experts import exact_experts
from megatron_m1.model.m1 import M1Model

__all__ = ["ReferenceEngine"]


class ReferenceEngine:
    """`Engine` without a cache: each token costs a forward pass over [1, tokens], the sequence so far and then padding.

    Its log-probabilities are, bit by bit, those of the training forward pass over [1, tokens] of the complete sequence, each
    sequence in a row of its own, with gradients or without, in the same layout, in fp32 on CPU with one thread, both under
    `exact_experts`: every product then has the same shape in both, the rows of a product do not read one another, attention and
    states look back only, and the groups of the experts, the only shapes that later tokens change, are padded to where
    their rows no longer depend on the group's size. Neither batch composition nor the other replicas enter.
    """

    def __init__(
        self,
        models: nn.Module | Sequence[nn.Module],
        groups: ProcessGroupCollection,
        *,
        tokens: int,
        record_routing: bool = False,
        logprob_temperature: float = 1.0,
    ) -> None:
        """tokens: length of every pass, a multiple of 64; no request may grow longer. The rest as in `Engine`."""
        assert tokens % 64 == 0 and tokens > 0
        self.models: list[M1Model] = unwrap_model(list(models) if isinstance(models, Sequence) else [models])
        self.groups, self.tokens, self.record_routing = groups, tokens, record_routing
        self.stages = Stages(self.models, groups, logprob_temperature=logprob_temperature)
        self.lock_step = LockStep(self.models, groups)

    @property
    def idle_s(self) -> float:
        """As `Engine.idle_s`, of all calls."""
        return self.lock_step.idle_s

    def generate(self, requests: list[Request]) -> list[Result]:
        """As `Engine.generate`. Raises ValueError for a request that may outgrow `tokens`."""
        return results_of_all(dict(self.stream(requests)), self.groups.dp_cp)

    def stream(self, requests: list[Request]) -> Iterator[tuple[int, Result]]:
        """As `Engine.stream`."""
        for index, asked in enumerate(requests):
            if len(asked.prompt) + asked.sampling.max_new_tokens - 1 > self.tokens:
                raise ValueError(
                    f"request {index} may grow to {len(asked.prompt)} + {asked.sampling.max_new_tokens} tokens, which a pass "
                    f"over {self.tokens} does not hold; raise `tokens`."
                )
        replicas = self.groups.dp_cp
        waiting = [Running(*pair) for pair in share_of_replica(requests, replicas.rank(), replicas.size())]
        routing = RoutingRecord(self.models, self.groups) if self.record_routing else None
        listening = contextlib.nullcontext() if routing is None else routing.listening()
        with inference(self.models), exact_experts(self.models), listening:
            while self.lock_step.any(bool(waiting)):
                if not waiting:
                    self.lock_step.idle()
                    continue
                request = waiting[0]
                self._token(request, routing)
                if request.done:
                    waiting.pop(0)
                    if routing is not None:
                        request.result.routing = routing.assembled(request.routing)
                    yield request.index, request.result

    @torch.no_grad()
    def _token(self, request: Running, routing: RoutingRecord | None) -> None:
        """One pass."""
        sequence = [*request.request.prompt, *request.result.tokens]
        ids = torch.zeros(1, self.tokens, dtype=torch.int64)
        ids[0, : len(sequence)] = torch.tensor(sequence, dtype=torch.int64)
        positions = torch.arange(self.tokens, device=self.stages.device)[None]
        logits = self.stages.run(ids.to(self.stages.device), positions, None)
        if routing is not None:
            request.routing = [routing.take(len(sequence))]
        self.stages.choose(None if logits is None else self._local(logits), [request], row=len(sequence) - 1)

    def _local(self, logits: Tensor) -> Tensor:
        tp = self.groups.tp
        return logits[0].chunk(tp.size(), dim=-1)[tp.rank()]
