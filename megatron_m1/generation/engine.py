"""Generation over slots on the training modules: prompts in chunks, one-token decoding, in any layout."""

import contextlib
import functools
import logging
import math
from collections import deque
from collections.abc import Iterator, Sequence

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.utils import unwrap_model
from torch import Tensor, nn

from megatron_m1 import platform
from megatron_m1.config.schema import ModelConfig
from megatron_m1.generation.blocks import BLOCK_TOKENS, blocks_for
from megatron_m1.generation.cache import HybridCache
from megatron_m1.generation.decode import local_experts
from megatron_m1.generation.device_decode import DeviceDecoder
from megatron_m1.generation.lock_step import LockStep
from megatron_m1.generation.products import invariant_rows
from megatron_m1.generation.requests import Request, Result, Running
from megatron_m1.generation.routing import RoutingRecord
from megatron_m1.generation.schedule import (
    PromptGroup,
    group_requests,
    prompt_parts,
    results_of_all,
    share_of_replica,
)
from megatron_m1.generation.stages import Stages, inference
from megatron_m1.model.experts import exact_experts
from megatron_m1.model.m1 import M1Model
from megatron_m1.platform.graphs import obstacle as graph_obstacle
from megatron_m1.platform.transfer import upload

__all__ = ["DECODE_MODES", "Engine"]

DECODE_MODES = ("auto", "host", "device", "graph")

logger = logging.getLogger(__name__)


class Engine:
    """Completes requests with the weights as they are at the time of the call; between calls it holds no memory.

    The ranks that hold one replica of the model (tensor- and pipeline-parallel) run the same sequences in step. Replicas over which
    experts are spread run pass by pass together until the last of them is done; those without sequences go through the experts alone.
    """

    def __init__(
        self,
        models: nn.Module | Sequence[nn.Module],
        groups: ProcessGroupCollection,
        *,
        slots: int,
        prefill_tokens: int = 2048,
        cache_tokens: int | None = None,
        record_routing: bool = False,
        logprob_temperature: float = 1.0,
        decode: str = "auto",
        batch_invariant: bool = False,
    ) -> None:
        """models: this rank's chunks, in core's wrappers or out of them, with all their weights in place (no parameter gather under
        way); sequence parallelism is switched off while they generate.

        slots: sequences at a time on one data-parallel rank; the next one starts when one ends. prefill_tokens: prompt tokens of
        a pass at most, a multiple of 64, so that chunks of a prompt end where those of training do. cache_tokens: tokens of keys
        and values per softmax layer, of which a request takes its longest possible length; None: enough for all slots.
        logprob_temperature: of the log-probabilities that are reported, as the trainer that uses them scores.
        decode: how the host drives one-token passes. "host": it knows every length and touches no key behind one (CPU). "device":
        the kernels read lengths and blocks from the device, and the host waits for the sampled tokens alone. "graph": so too, and
        a pass is one CUDA graph (one rank, bf16, compute capability 9.0 or newer); raises ValueError where that is impossible and
        RuntimeError where the device refuses. "auto": "host" on CPU; on CUDA graphs, else "device", and the log says why.
        batch_invariant: a result has the same bits whatever other requests there are, and however many slots: those of an
        interrupted call that are asked for again come out as they would have. On CPU with one thread and decode "host", without token
        drop, with at most two tensor-parallel ranks (sums over more depend on where in a buffer a number stands).
        """
        if decode not in DECODE_MODES:
            raise ValueError(f"decode={decode!r} must be one of {', '.join(DECODE_MODES)}")
        assert slots >= 1 and prefill_tokens % BLOCK_TOKENS == 0 and prefill_tokens > 0
        self.models: list[M1Model] = unwrap_model(list(models) if isinstance(models, Sequence) else [models])
        self.groups, self.slots = groups, slots
        self.prefill_tokens, self.cache_tokens, self.record_routing = prefill_tokens, cache_tokens, record_routing
        self.stages = Stages(self.models, groups, logprob_temperature=logprob_temperature, invariant=batch_invariant)
        self.idle_s = 0.0
        """Seconds of the last call that this replica had no work left while those with which it shares experts had."""
        self.on_device, self.graphs = _decode_mode(decode, groups, self.stages.config.params_dtype)
        if batch_invariant and self.on_device:
            raise ValueError("batch_invariant=True needs decode='host', on CPU")

    def generate(self, requests: list[Request]) -> list[Result]:
        """A result per request, in order, on every rank. All ranks call it with the same requests.

        What is drawn for a request depends on its seed, positions and logits alone; the logits differ between batches and layouts
        by rounding only. The data-parallel ranks share out the prompts.
        Raises FloatingPointError, naming the request, on the ranks that work on it if a logit is NaN or infinite; ValueError if
        cache_tokens do not hold a request.
        """
        return results_of_all(dict(self.stream(requests)), self.groups.dp_cp)

    def stream(self, requests: list[Request]) -> Iterator[tuple[int, Result]]:
        """(index, result) of the requests that fall to this replica, each as soon as it is complete.

        All ranks call it with the same requests and read it to its end: replicas that share experts wait for it, and until then the
        models stay in evaluation mode.
        """
        replicas = self.groups.dp_cp
        own = share_of_replica(requests, replicas.rank(), replicas.size())
        batch = _Batch(self, own)
        exact = exact_experts(self.models) if self.stages.invariant else contextlib.nullcontext()
        with inference(self.models), exact, batch.recording():
            while (ended := batch.step()) is not None:
                yield from ended
        self.idle_s = batch.lock_step.idle_s


class _Batch:
    """One call of the engine.

    Prompts are admitted in order. While one has requests that found no slot yet, none behind it starts: so at most one prompt is
    kept for requests to come.
    """

    def __init__(self, engine: Engine, requests: list[tuple[int, Request]]) -> None:
        stages, groups = engine.stages, engine.groups
        self.stages, self.prefill_tokens, self.invariant = stages, engine.prefill_tokens, stages.invariant
        self.lock_step = LockStep(engine.models, groups)
        self.tp = groups.tp.size()
        self.row_multiple = _row_multiple(stages.config.m1, groups) if self.invariant else 1
        self.prefill_pad = math.lcm(self.tp, self.row_multiple)
        self.decode_pad = self.row_multiple if local_experts(groups) else self.prefill_pad
        self.waiting = deque(group_requests(requests))
        """Prompts with requests that have not started."""
        self.prefilling: list[PromptGroup] = []
        """Prompts on their way through the model, in the slots behind `active`."""
        self.active: list[Running] = []
        """Requests with at least one token, by slot."""
        self.finished = False
        self.slots = max(min(engine.slots, len(requests)), 1)
        self.cache = self._cache(engine, sorted((_capacity(r) for _, r in requests), reverse=True))
        self.device_decoder: DeviceDecoder | None = None
        if engine.on_device:
            self.device_decoder = DeviceDecoder(stages, self.cache, pad_to=self.decode_pad, graphs=engine.graphs)
        self.routing = RoutingRecord(engine.models, groups) if engine.record_routing else None

    def recording(self) -> contextlib.AbstractContextManager[None]:
        """Context in which `step` records routing, if that was asked for."""
        return contextlib.nullcontext() if self.routing is None else self.routing.listening()

    @torch.no_grad()
    def step(self) -> list[tuple[int, Result]] | None:
        """One pass: (index, result) of the requests that end with it; None when there is nothing left to do, here and where experts
        of this rank are."""
        if self.finished:
            return None
        ended: list[tuple[int, Result]] = []
        if not self.prefilling:
            while self._start_from_prefix():
                ended += self._ended()
            self._admit()
        self.finished = not self.lock_step.any(bool(self.prefilling or self.active))
        if self.finished:
            return ended
        if self.prefilling:
            self._prefill()
        elif self.active:
            self._decode()
        else:
            self.lock_step.idle()
        return ended if self.prefilling else ended + self._ended()

    def _cache(self, engine: Engine, capacities: list[int]) -> HybridCache:
        m1, config = self.stages.config.m1, self.stages.config
        # One more: a prompt that is kept has a partly filled last block, of which each of its requests has a copy.
        least = blocks_for(max(capacities, default=0)) + 1
        blocks = sum(map(blocks_for, capacities[: self.slots])) + 1
        if engine.cache_tokens is not None:
            blocks = min(blocks, engine.cache_tokens // BLOCK_TOKENS)
            if blocks < least:
                raise ValueError(
                    f"cache_tokens={engine.cache_tokens} hold no request of {capacities[0]} tokens; "
                    f"use {least * BLOCK_TOKENS} or more."
                )
        kinds = m1.layer_types()
        numbers = [layer.layer_number for model in engine.models for layer in model.decoder.layers]
        return HybridCache(
            {number: kinds[number - 1] for number in numbers},
            slots=-(-self.slots // self.decode_pad) * self.decode_pad,
            blocks=blocks,
            longest=max(capacities, default=0),
            heads=m1.num_attention_heads // self.tp,
            groups=m1.num_key_value_heads // self.tp,
            head_dim=m1.head_dim,
            dtype=config.params_dtype,
            device=self.stages.device,
            on_device=engine.on_device,
            invariant=self.invariant,
        )

    def _admit(self) -> None:
        """Give slots and blocks to the first waiting prompts and to as many of their requests as find room."""
        slots, blocks = self.slots - len(self.active), self.cache.pool.free
        while self.waiting and not (group := self.waiting[0]).prefix:
            shared = len(group.prompt) // BLOCK_TOKENS
            group.starting = 0
            for request in group.waiting:
                cost = blocks_for(_capacity(request.request)) - (shared if group.starting else 0)
                if slots == 0 or cost > blocks:
                    break
                slots, blocks, group.starting = slots - 1, blocks - cost, group.starting + 1
            if group.starting:
                self.cache.add(_capacity(group.waiting[0].request))
                self.prefilling.append(group)
            if group.starting < len(group.waiting):
                return
            self.waiting.popleft()

    def _prefill(self) -> None:
        """One pass over the next tokens of the prompts being prefilled; after the last one their requests start."""
        unfinished = [group for group in self.prefilling if group.prefilled < len(group.prompt)]
        parts = prompt_parts(unfinished, self.prefill_tokens, alike=self.invariant)
        first = len(self.active) + len(self.prefilling) - len(unfinished)
        position_ids = self.cache.start_prefill(
            first, [count for _, count in parts], pad_to=self.prefill_pad, predicting_pad_to=self.row_multiple
        )
        tokens = [t for group, count in parts for t in group.prompt[group.prefilled : group.prefilled + count]]
        padded = tokens + [0] * (position_ids.shape[1] - len(tokens))
        output = self.stages.run(upload(padded, self.stages.device)[None], position_ids, self.cache)
        logits = None if output is None else output[0]
        rows = None if self.routing is None else self.routing.take(len(tokens))
        start = 0
        for row, (group, count) in enumerate(parts):
            group.prefilled += count
            if rows is not None:
                group.routing.append(rows[start : start + count])
            start += count
            if logits is not None and group.prefilled == len(group.prompt):
                group.logits = logits[row].clone()
        if all(group.prefilled == len(group.prompt) for group in self.prefilling):
            self._start_prefilled()

    def _start_prefilled(self) -> None:
        """The admitted requests of the prompts that are now through the model take their first token."""
        groups, self.prefilling = self.prefilling, []
        logits, started = [], []
        for slot, group in enumerate(groups, start=len(self.active)):
            if len(group.waiting) > 1:
                group.prefix = self.cache.snapshot(slot)
            logits.append(group.logits)
            started.append(group.start())
        for group in groups:
            for _ in range(group.starting - 1):
                logits.append(group.logits)
                started.append(self._fork(group))
            if group.prefix is not None and not group.waiting:
                self.cache.forget(group.prefix)
        self._first_tokens(started, logits)

    def _start_from_prefix(self) -> bool:
        """Start what requests find room of those that wait for a prompt which is through the model; whether there were any."""
        started: list[Running] = []
        if not self.waiting or (prefix := self.waiting[0].prefix) is None:
            return False
        group = self.waiting[0]
        while group.waiting and len(self.active) + len(started) < self.slots:
            own = blocks_for(_capacity(group.waiting[0].request)) - prefix.length // BLOCK_TOKENS
            if own > self.cache.pool.free:
                break
            started.append(self._fork(group))
        if not group.waiting:
            self.cache.forget(prefix)
            self.waiting.popleft()
        if started:
            self._first_tokens(started, [group.logits] * len(started))
        return bool(started)

    def _fork(self, group: PromptGroup) -> Running:
        assert group.prefix is not None
        request = group.start()
        self.cache.fork(group.prefix, _capacity(request.request))
        return request

    def _first_tokens(self, started: list[Running], logits: list[Tensor | None]) -> None:
        self.active += started
        rows = [row for row in logits if row is not None]
        self.stages.choose(torch.stack(rows) if rows else None, started)

    def _decode(self) -> None:
        tokens = [request.last_token for request in self.active]
        record = None if self.routing is None else self.routing.add
        if self.device_decoder is not None:
            logits = self.device_decoder.run(tokens, record=record)
        else:
            position_ids = self.cache.start_decode(pad_to=self.decode_pad)
            ids = torch.tensor([tokens + [0] * (position_ids.shape[1] - len(tokens))])
            output = self.stages.run(ids, position_ids, self.cache, decode=True, record=record)
            logits = None if output is None else output[0]
        if self.routing is not None:
            for request, row in zip(self.active, self.routing.take(len(self.active)).split(1), strict=True):
                request.routing.append(row)
        self.stages.choose(logits, self.active)

    def _ended(self) -> list[tuple[int, Result]]:
        """The requests that are done, whose slots are free now."""
        ended = []
        for slot in reversed(range(len(self.active))):
            request = self.active[slot]
            if not request.done:
                continue
            self.cache.remove(slot)
            self.active[slot] = self.active[-1]
            self.active.pop()
            if self.routing is not None:
                request.result.routing = self.routing.assembled(request.routing)
            ended.append((request.index, request.result))
        return ended


def _decode_mode(decode: str, groups: ProcessGroupCollection, dtype: torch.dtype) -> tuple[bool, str]:
    """(whether the device reads its own tables, whether as graphs: "always", "try" or "never")."""
    if decode == "host" and platform.is_cuda():
        raise ValueError("decode='host' runs on CPU; use 'device'")
    if decode in ("host", "device") or (decode == "auto" and not platform.is_cuda()):
        return decode == "device", "never"
    obstacle = graph_obstacle(dtype)
    if any(group.size() > 1 for group in (groups.tp, groups.pp, groups.ep, groups.expt_tp)):
        obstacle = "a replica of more than one rank communicates within a pass"
    if obstacle is None:
        return True, "always" if decode == "graph" else "try"
    if decode == "graph":
        raise ValueError(f"decode='graph' is not possible here: {obstacle}; use 'device' or 'auto'")
    _log_once(f"decoding runs kernel by kernel, not as CUDA graphs: {obstacle}")
    return True, "never"


@functools.cache
def _log_once(text: str) -> None:
    logger.warning(text)


def _row_multiple(m1: ModelConfig, groups: ProcessGroupCollection) -> int:
    """Divides the rows of passes that do not depend on one another, see `invariant_rows`."""
    heads, width = m1.num_attention_heads // groups.tp.size(), m1.intermediate_size // groups.expt_tp.size()
    return invariant_rows((m1.hidden_size, heads * m1.head_dim, width, m1.rotary_dim // 2))


def _capacity(request: Request) -> int:
    """Tokens that go through the model at most: the last one drawn does not."""
    return len(request.prompt) + request.sampling.max_new_tokens - 1
