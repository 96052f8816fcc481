"""Generation over slots on the training modules: ragged prefill, one-token decoding, in any layout."""

from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron_m1.generation.cache import HybridCache
from megatron_m1.generation.sampling import request_generator, sample
from megatron_m1.model.m1 import M1Model

__all__ = ["Completion", "Sampling", "generate"]

PREFILL_TOKENS = 8192
"""Prompt tokens of one prefill pass at most (a longer prompt has a pass of its own)."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen, and when to stop."""

    max_new_tokens: int
    temperature: float = 1.0
    """0: always the likeliest token."""
    top_p: float = 1.0
    seed: int = 0
    end_token: int | None = None
    """None: every completion has max_new_tokens tokens."""


@dataclass
class Completion:
    """What was generated after one prompt."""

    tokens: list[int] = field(default_factory=list)
    """The end token included."""
    logprobs: list[float] = field(default_factory=list)
    """Natural log of each token's probability at temperature 1 and top_p 1: minus the loss that training has on it."""
    finish_reason: str = ""
    """`stop` (end token) or `length`."""


@dataclass
class _Request:
    index: int
    prompt: list[int]
    generator: torch.Generator
    completion: Completion

    def take(self, token: int, logprob: float, sampling: Sampling) -> None:
        done = self.completion
        done.tokens.append(token)
        done.logprobs.append(logprob)
        if token == sampling.end_token:
            done.finish_reason = "stop"
        elif len(done.tokens) == sampling.max_new_tokens:
            done.finish_reason = "length"


def generate(
    model: M1Model,
    groups: ProcessGroupCollection,
    prompts: list[list[int]],
    sampling: Sampling,
    *,
    batch_size: int,
) -> list[Completion]:
    """A completion of every prompt, in order, on every rank. All ranks call it with the same arguments.

    model: this rank's pipeline stage, without sequence parallelism. prompts: token ids, none empty.
    batch_size: sequences that run together on one data-parallel rank; the next prompt starts when one ends.
    The data-parallel ranks share the prompts out. What is drawn depends on (sampling.seed, index of the prompt) and the
    logits alone; these differ between batch sizes and layouts by rounding only.
    Raises FloatingPointError, naming the prompt, on the ranks that work on it if a logit is NaN or infinite.
    """
    rank, replicas = groups.dp.rank(), groups.dp.size()
    indices = range(rank, len(prompts), replicas)
    requests = [
        _Request(index, prompts[index], request_generator(sampling.seed, index), Completion()) for index in indices
    ]
    longest = max(map(len, prompts), default=0) + sampling.max_new_tokens
    slots = min(batch_size, max(len(indices), 1))
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            _Engine(model, groups, sampling, slots=slots, capacity=longest).run(requests)
    finally:
        model.train(was_training)
    shares: list[list[Completion]] = [[] for _ in range(replicas)]
    dist.all_gather_object(shares, [request.completion for request in requests], group=groups.dp)
    return [shares[index % replicas][index // replicas] for index in range(len(prompts))]


class _Engine:
    """The ranks that hold one replica of the model (tensor- and pipeline-parallel) run the same sequences in step.

    Where experts are spread over data-parallel ranks, these too run pass by pass together, those without sequences with
    padding.
    """

    def __init__(
        self, model: M1Model, groups: ProcessGroupCollection, sampling: Sampling, *, slots: int, capacity: int
    ) -> None:
        assert not model.config.sequence_parallel, "generation needs a model without sequence parallelism"
        m1, tp = model.config.m1, groups.tp.size()
        self.model, self.groups, self.sampling, self.slots = model, groups, sampling, slots
        self.device = next(model.parameters()).device
        self.lock_step = tp % groups.tp_ep.size() != 0
        kinds = m1.layer_types()
        self.cache = HybridCache(
            {layer.layer_number: kinds[layer.layer_number - 1] for layer in model.decoder.layers},
            slots=slots,
            capacity=capacity,
            heads=m1.num_attention_heads // tp,
            groups=m1.num_key_value_heads // tp,
            head_dim=m1.head_dim,
            dtype=model.config.params_dtype,
            device=self.device,
            pad_to=tp,
        )

    def run(self, requests: list[_Request]) -> None:
        """Complete all requests of this replica."""
        waiting = requests[::-1]
        active: list[_Request] = []
        while True:
            admitted = self._admit(waiting, self.slots - len(active))
            prefill, decode = self._agree(bool(admitted), bool(active))
            if prefill:
                position_ids = self.cache.start_prefill([len(request.prompt) for request in admitted])
                active += admitted
                self._advance(admitted, [token for request in admitted for token in request.prompt], position_ids)
            elif decode:
                position_ids = self.cache.start_decode()
                self._advance(active, [request.completion.tokens[-1] for request in active], position_ids)
            else:
                return
            for slot in reversed(range(len(active))):
                if active[slot].completion.finish_reason:
                    self.cache.remove(slot)
                    active[slot] = active[-1]
                    active.pop()

    def _admit(self, waiting: list[_Request], free: int) -> list[_Request]:
        """The requests, taken off the end of `waiting`, whose prompts make up the next prefill pass."""
        admitted: list[_Request] = []
        tokens = 0
        while waiting and len(admitted) < free and (not admitted or tokens + len(waiting[-1].prompt) <= PREFILL_TOKENS):
            tokens += len(waiting[-1].prompt)
            admitted.append(waiting.pop())
        return admitted

    def _agree(self, prefill: bool, decode: bool) -> tuple[bool, bool]:
        """Whether any of the replicas that share experts wants a prefill, and whether any wants to decode."""
        if not self.lock_step:
            return prefill, decode
        wishes = torch.tensor([prefill, decode], dtype=torch.int32, device=self.device)
        dist.all_reduce(wishes, op=dist.ReduceOp.MAX, group=self.groups.dp)
        prefill, decode = (bool(wish) for wish in wishes.tolist())
        return prefill, decode

    def _advance(self, requests: list[_Request], tokens: list[int], position_ids: Tensor) -> None:
        """One pass; each of `requests`, whose tokens stand in `tokens` one after the other, takes its next token."""
        padded = torch.zeros(1, position_ids.shape[1], dtype=torch.int64)
        padded[0, : len(tokens)] = torch.tensor(tokens, dtype=torch.int64)
        output = self._stage(padded.to(self.device), position_ids)
        if not requests:
            return
        # Every stage draws, so that the generators stay in step.
        uniform = torch.cat([torch.rand(1, generator=r.generator, dtype=torch.float64) for r in requests])
        chosen = torch.empty(2, len(requests), dtype=torch.float64, device=self.device)
        if self.model.post_process:
            chosen.copy_(self._choose(output[0, : len(requests)], uniform.to(self.device)))
        pp = self.groups.pp
        if pp.size() > 1:
            dist.broadcast(chosen, src=dist.get_global_rank(pp, pp.size() - 1), group=pp)
        for request, token, logprob in zip(requests, *chosen.tolist()):
            if token < 0:
                raise FloatingPointError(
                    f"prompt {request.index} (counted from 0): the logits after {len(request.prompt)} + "
                    f"{len(request.completion.tokens)} tokens are not finite; use another checkpoint."
                )
            request.take(int(token), logprob, self.sampling)

    def _stage(self, tokens: Tensor, position_ids: Tensor) -> Tensor:
        """Logits [1, m, V] on the last pipeline stage; elsewhere the activations that were sent on."""
        pp, config = self.groups.pp, self.model.config
        rank = pp.rank()
        if not self.model.pre_process:
            hidden = torch.empty(tokens.shape[1], 1, config.hidden_size, dtype=config.params_dtype, device=self.device)
            dist.recv(hidden, src=dist.get_global_rank(pp, rank - 1), group=pp)
            self.model.set_input_tensor(hidden)
        output = self.model(tokens, position_ids, inference_context=self.cache)
        if not self.model.post_process:
            dist.send(output.contiguous(), dst=dist.get_global_rank(pp, rank + 1), group=pp)
        return output

    def _choose(self, logits: Tensor, uniform: Tensor) -> Tensor:
        """[2, m] float64: token (-1 where a logit is not finite) and log-probability of each row of logits [m, V]."""
        tp, sampling = self.groups.tp, self.sampling
        tokens = sample(logits, uniform, temperature=sampling.temperature, top_p=sampling.top_p)
        if tp.size() > 1:
            # The ranks have equal logits, but not every device sums equal numbers alike twice.
            dist.broadcast(tokens, src=dist.get_global_rank(tp, 0), group=tp)
        local = logits.chunk(tp.size(), dim=-1)[tp.rank()].unsqueeze(1).clone()
        nll = self.model.compute_language_model_loss(tokens.unsqueeze(0), local)[0]
        tokens = torch.where(logits.isfinite().all(dim=-1), tokens, -1)
        return torch.stack([tokens.double(), -nll.double()])
