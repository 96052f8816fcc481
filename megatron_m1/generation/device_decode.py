"""Decoding passes on a device that reads its own tables: queued kernel by kernel, or replayed as one CUDA graph."""

import logging

import torch
from torch import Tensor

from megatron_m1.generation.cache import HybridCache
from megatron_m1.generation.decode import RecordRouting
from megatron_m1.generation.stages import Stages
from megatron_m1.platform.graphs import DeviceGraph, GraphPool
from megatron_m1.platform.transfer import upload

__all__ = ["DeviceDecoder"]

logger = logging.getLogger(__name__)

EXACT_ROWS, FINE_ROWS = 4, 32
"""Passes of up to EXACT_ROWS sequences have no padding, those of up to FINE_ROWS are padded to a multiple of 4, others of 16."""


class DeviceDecoder:
    """One more token of every sequence of a cache whose tables are on the device.

    With `graphs` the second pass of each number of rows is recorded and later ones are replayed; the first warms up what may not be
    set up while recording. Recording runs nothing, so every pass takes the sequences one token on, however it is run.
    """

    def __init__(self, stages: Stages, cache: HybridCache, *, pad_to: int, graphs: str) -> None:
        """pad_to: divides the rows of every pass; graphs: "always", "never" or "try", which goes on without them, and says so, where
        the device refuses to record."""
        self.stages, self.cache, self.pad_to, self.graphs = stages, cache, pad_to, graphs
        self._pool: GraphPool | None = None
        self._warm: set[int] = set()
        self._recorded: dict[int, tuple[Tensor, DeviceGraph, dict[int, Tensor]]] = {}

    def run(self, tokens: list[int], *, record: RecordRouting | None = None) -> Tensor | None:
        """This rank's logits [sequences, V / TP] after `tokens`, the newest of each sequence, where the head is."""
        positions = self.cache.advance()
        rows = self._rows(len(tokens))
        padding = rows - len(tokens)
        data = [tokens + [0] * padding, positions + [-1] * padding]
        logits = None
        if self.graphs != "never" and rows in self._warm:
            logits = self._replay(rows, data, record)
        if logits is None:
            logits = self._pass(upload(data, self.stages.device), record)
            self._warm.add(rows)
        return None if logits is None else logits[: len(tokens)]

    def _rows(self, sequences: int) -> int:
        """Few numbers of rows, of which each would have a graph of its own, and little padding."""
        step = self.pad_to
        if self.graphs != "never" and sequences > EXACT_ROWS:
            step = 4 if sequences <= FINE_ROWS else 16
        return min(max(-(-sequences // step), 1) * step, self.cache.slots)

    def _pass(self, inputs: Tensor, record: RecordRouting | None) -> Tensor | None:
        tokens, positions = inputs
        position_ids = self.cache.start_device_decode(positions)
        logits = self.stages.run(tokens[None], position_ids, self.cache, decode=True, record=record)
        return None if logits is None else logits[0]

    def _replay(self, rows: int, data: list[list[int]], record: RecordRouting | None) -> Tensor | None:
        """The logits, or None where the device refuses to record and that is accepted."""
        if rows not in self._recorded and not self._record(rows, with_routing=record is not None):
            return None
        inputs, graph, routing = self._recorded[rows]
        inputs.copy_(upload(data, self.stages.device))
        logits = graph.replay()
        if record is not None:
            for layer_number, experts in routing.items():
                record(layer_number, experts)
        return logits

    def _record(self, rows: int, *, with_routing: bool) -> bool:
        inputs = torch.zeros(2, rows, dtype=torch.int64, device=self.stages.device)
        routing: dict[int, Tensor] = {}
        record = routing.__setitem__ if with_routing else None
        if self._pool is None:
            self._pool = GraphPool()
        try:
            graph = DeviceGraph(lambda: self._pass(inputs, record), self._pool)
        except RuntimeError as error:
            if self.graphs == "always":
                raise
            logger.warning("decoding goes on without CUDA graphs, several times slower at small batches: %s", error)
            self.graphs = "never"
            return False
        self._recorded[rows] = inputs, graph, routing
        return True
