"""One pass through the pipeline stages of a replica, and the choice of tokens from what comes out."""

import contextlib
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from torch import Tensor
from torch.nn.functional import pad

from megatron_m1.generation.cache import HybridCache
from megatron_m1.generation.decode import RecordRouting, decode_stage
from megatron_m1.generation.products import VECTOR_ELEMENTS
from megatron_m1.generation.requests import Running
from megatron_m1.generation.sampling import SamplingPlan, sample, uniform
from megatron_m1.model.layer import M1Layer
from megatron_m1.model.m1 import M1Model
from megatron_m1.model.vocab_loss import logit_logprobs
from megatron_m1.platform.transfer import upload

__all__ = ["Stages", "inference"]


class Stages:
    """This rank's model chunks (one, or one per virtual stage) among those of the replica; all its ranks call alike."""

    def __init__(
        self,
        models: Sequence[M1Model],
        groups: ProcessGroupCollection,
        *,
        logprob_temperature: float = 1.0,
        invariant: bool = False,
    ) -> None:
        """invariant: on CPU, the rows of a decoding pass and the choices do not depend on one another by a bit, provided that the
        pass has as many rows as `invariant_rows` says."""
        self.models, self.groups, self.logprob_temperature = list(models), groups, logprob_temperature
        self.invariant = invariant
        self.config = models[0].config
        self.device = next(models[0].parameters()).device
        self.holds_head = models[-1].post_process
        self._plan = SamplingPlan([], self.device)

    def run(
        self,
        tokens: Tensor,
        position_ids: Tensor,
        cache: HybridCache | None,
        *,
        decode: bool = False,
        record: RecordRouting | None = None,
    ) -> Tensor | None:
        """This rank's logits [1, m, V / TP] where the head is (without a cache those of all tokens, [1, n, V]), else None.

        tokens, position_ids: [1, n]; decode: it is a decoding pass of the cache.
        """
        output = None
        for model in self.models:
            hidden = None if model.pre_process else self._receive(tokens.shape[1])
            if decode:
                assert cache is not None
                output = decode_stage(
                    model,
                    tokens,
                    position_ids,
                    cache,
                    self.groups,
                    hidden=hidden,
                    record=record,
                    invariant=self.invariant,
                )
            else:
                if hidden is not None:
                    model.set_input_tensor(hidden)
                output = model(tokens, position_ids, inference_context=cache)
            if not model.post_process:
                self._send(output)
        if not self.holds_head:
            return None
        return output.unsqueeze(0) if decode else output

    def choose(self, logits: Tensor | None, requests: list[Running], *, row: int | None = None) -> None:
        """Every request takes its next token from its row of logits [m, V / TP] (given where the head is); further rows do not count.

        row: a single request takes that row, and its log-probability is computed with those of all rows, as training does.
        Raises FloatingPointError, naming the request, if a logit is not finite.
        """
        chosen = torch.empty(2, len(requests), dtype=torch.float64, device=self.device)
        if self.holds_head:
            assert logits is not None
            if self.invariant and logits.shape[-1] % VECTOR_ELEMENTS:
                for index, request in enumerate(requests):
                    self._choose(logits[index : index + 1], [request], chosen[:, index : index + 1], None)
            else:
                self._choose(logits[: len(requests)] if row is None else logits, requests, chosen, row)
        pp = self.groups.pp
        if pp.size() > 1:
            dist.broadcast(chosen, src=dist.get_global_rank(pp, pp.size() - 1), group=pp)
        for request, token, logprob in zip(requests, *chosen.tolist(), strict=True):
            if token < 0:
                raise FloatingPointError(
                    f"prompt {request.index} (counted from 0): the logits after {len(request.request.prompt)} + "
                    f"{len(request.result.tokens)} tokens are not finite; use another checkpoint."
                )
            request.take(int(token), logprob)

    def _choose(self, logits: Tensor, requests: list[Running], chosen: Tensor, row: int | None) -> None:
        tp = self.groups.tp
        numbers = upload([uniform(r.request.seed, r.length) for r in requests], self.device, dtype=torch.float64)
        samplings = [r.request.sampling for r in requests]
        if samplings != self._plan.samplings:
            self._plan = SamplingPlan(samplings, self.device)
        finite = logits.isfinite().all(dim=-1).to(torch.int32)
        if tp.size() > 1:
            dist.all_reduce(finite, op=dist.ReduceOp.MIN, group=tp)
        logits = logits.where(finite.bool().unsqueeze(-1), 0.0)
        mine = slice(None) if row is None else slice(row, row + 1)
        tokens = sample(logits[mine], numbers, self._plan, tp)
        if self.logprob_temperature != 1.0:
            logits = logits / self.logprob_temperature
        chosen[0] = torch.where(finite.bool()[mine], tokens, -1)
        rows = len(logits)
        tokens = tokens.expand(rows)
        if self.invariant:
            padding = -rows % VECTOR_ELEMENTS
            logits, tokens = pad(logits, (0, 0, 0, padding)), pad(tokens, (0, padding))
        chosen[1] = logit_logprobs(logits, tokens, group=tp)[:rows][mine]

    def _receive(self, length: int) -> Tensor:
        pp, config = self.groups.pp, self.config
        hidden = torch.empty(length, 1, config.hidden_size, dtype=config.params_dtype, device=self.device)
        dist.recv(hidden, src=dist.get_global_rank(pp, (pp.rank() - 1) % pp.size()), group=pp)
        return hidden

    def _send(self, hidden: Tensor) -> None:
        pp = self.groups.pp
        dist.send(hidden.contiguous(), dst=dist.get_global_rank(pp, (pp.rank() + 1) % pp.size()), group=pp)


@contextlib.contextmanager
def inference(models: Sequence[M1Model]) -> Iterator[None]:
    """Evaluation mode and no sequence parallelism while the context is open; training's settings after it."""
    training = [model.training for model in models]
    changed: list[tuple[object, str, object]] = []

    def switch(module: object, name: str, value: object) -> None:
        changed.append((module, name, getattr(module, name)))
        setattr(module, name, value)

    if models[0].config.sequence_parallel:
        switch(models[0].config, "sequence_parallel", False)
        for module in (module for model in models for module in model.modules()):
            if isinstance(module, ColumnParallelLinear | RowParallelLinear):
                switch(module, "sequence_parallel", False)
            elif isinstance(module, VocabParallelEmbedding | LanguageModelEmbedding):
                switch(module, "reduce_scatter_embeddings", False)
            elif isinstance(module, M1Layer):
                # Core's experts go on with distinct tokens on each tensor-parallel rank, which the layer now deals out.
                switch(module, "scatter_for_experts", True)
    try:
        for model in models:
            model.eval()
        yield
    finally:
        for module, name, value in changed:
            setattr(module, name, value)
        for model, mode in zip(models, training, strict=True):
            model.train(mode)
