"""One rank of a large job alone on this machine: torch's fake process group, with finite data where other ranks' would arrive.

Every operation returns at once, so times of this rank are times without communication. What would have been received is counted.
The fake group leaves some results unwritten, which ones depends on torch's version; here each holds data of the right shape:
    all-gather       this rank's part in everyone's place (in place: what the buffer held)
    reduce-scatter   this rank's own share of the sum (in place, and all-reduce: the buffer as it is)
    all-to-all       this rank's own rows, as often as they are needed
    receive          normal random numbers
    broadcast        the buffer as it is
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron_m1 import platform
from megatron_m1.config.schema import ParallelConfig
from megatron_m1.engine.cluster import Cluster
from megatron_m1.model.build import routers
from megatron_m1.parallel import destroy_groups, init_groups

__all__ = ["Arrivals", "Received", "balance_routing", "fake_rank", "fill_weights", "modelled_again"]

RECEIVED_STD = 0.02
BALANCED_LOGIT = 100.0
"""Added to the logits of the experts that a token is to take; the probabilities of the chosen keep their ratio."""
_GROUPS = ("tp", "cp", "pp", "ep", "expt_tp", "expt_dp", "dp", "dp_cp", "tp_cp", "tp_ep", "tp_ep_pp", "tp_dp_cp", "mp")


@dataclass(frozen=True)
class Received:
    """What one kind of operation brought this rank."""

    group: str
    """As core names it."""
    operation: str
    peers: int
    """Of the group, also where a message is from one of them: its ring is as fast as its slowest link."""
    stride: int
    calls: int
    received_bytes: int
    """Of collectives by their ring algorithms."""

    def seconds(self, cluster: Cluster) -> float:
        """Modelled from the links' speeds, nothing hidden."""
        model = cluster.exchange_s if self.operation == "all_to_all" else cluster.collective_s
        return model(self.received_bytes, peers=self.peers, stride=self.stride)


def modelled_again(
    rows: list[dict[str, Any]], parallel: ParallelConfig, world_size: int, cluster: Cluster
) -> list[dict[str, Any]]:
    """Rows of stored results, `Received` and its `seconds`, with the seconds of today's model; what was counted stays.

    Messages that were stored by the pair of ranks they went between become one row of their group.
    """
    rings = {"cp": (parallel.context, parallel.tensor), "pp": (parallel.pipeline, world_size // parallel.pipeline)}
    merged: dict[tuple[str, str, int, int], Received] = {}
    for row in rows:
        received = Received(**{name: value for name, value in row.items() if name != "seconds"})
        if received.operation == "receive":
            peers, stride = rings[received.group]
            received = replace(received, peers=peers, stride=stride)
        key = (received.group, received.operation, received.peers, received.stride)
        if key in merged:
            calls = merged[key].calls + received.calls
            received = replace(
                received, calls=calls, received_bytes=merged[key].received_bytes + received.received_bytes
            )
        merged[key] = received
    rows_again = sorted(merged.values(), key=lambda received: -received.received_bytes)
    return [asdict(received) | {"seconds": received.seconds(cluster)} for received in rows_again]


class Arrivals:
    """Counts since the last `take`."""

    def __init__(self) -> None:
        self._bytes: Counter[tuple[tuple[int, ...], str]] = Counter()
        self._calls: Counter[tuple[tuple[int, ...], str]] = Counter()
        self.names: dict[tuple[int, ...], str] = {}

    def add(self, ranks: tuple[int, ...], operation: str, received: float) -> None:
        if len(ranks) > 1:
            self._bytes[ranks, operation] += int(received)
            self._calls[ranks, operation] += 1

    def take(self) -> list[Received]:
        """What has been received meanwhile, by group and operation."""
        rows = [
            Received(
                self._name(ranks), operation, len(ranks), ranks[1] - ranks[0], self._calls[ranks, operation], count
            )
            for (ranks, operation), count in self._bytes.items()
        ]
        self._bytes.clear()
        self._calls.clear()
        return sorted(rows, key=lambda row: -row.received_bytes)

    def ring(self, group: tuple[int, ...], pair: tuple[int, int]) -> tuple[int, ...]:
        """The named group whose ring a message between two ranks belongs to: of pipelines of two stages core sends half of the
        messages in the group of all ranks (pipeline_parallel/p2p_communication.py)."""
        return group if group in self.names else next((known for known in self.names if {*pair} <= {*known}), group)

    def _name(self, ranks: tuple[int, ...]) -> str:
        return self.names.get(ranks) or next((n for known, n in self.names.items() if {*ranks} <= {*known}), "world")


@contextmanager
def fake_rank(
    rank: int, world_size: int, parallel: ParallelConfig, *, seed: int = 1
) -> Iterator[tuple[ProcessGroupCollection, Arrivals]]:
    """Process groups of `rank` in a job of `world_size` with the layout `parallel`, and the counts of what it would receive.

    torch.distributed must not be initialised; afterwards it is not.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    platform.select_device()
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    arrivals = Arrivals()
    try:
        with _supplied(arrivals):
            groups = init_groups(parallel, seed=seed)
            for name in _GROUPS:
                if getattr(groups, name, None) is not None:
                    arrivals.names.setdefault(tuple(dist.get_process_group_ranks(getattr(groups, name))), name)
            arrivals.take()
            yield groups, arrivals
    finally:
        destroy_groups()
        dist.destroy_process_group()


def balance_routing(models: list[torch.nn.Module]) -> None:
    """Token i of a rank takes experts k*i, ..., k*i + k-1 modulo their number, whatever the gate says; its work is still done.

    Core's own moe_router_force_load_balancing draws random experts: about a tenth off balance with the few tokens of a rank, and
    here every rank would receive the same deviation 'from all others'.
    """
    for router in routers(models):
        router.routing = _Balanced(router.routing, router.topk)  # type: ignore[method-assign]


class _Balanced:
    def __init__(self, routing: Callable, top_k: int) -> None:
        self.routing, self.top_k, self.bias = routing, top_k, torch.empty(0)

    def __call__(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if self.bias.shape != logits.shape:
            experts = logits.shape[-1]
            chosen = torch.arange(logits.numel() // experts * self.top_k, device=logits.device).remainder(experts)
            bias = logits.new_zeros(logits.numel() // experts, experts)
            self.bias = bias.scatter_(1, chosen.view(-1, self.top_k), BALANCED_LOGIT).view(logits.shape)
        return self.routing(logits + self.bias, padding_mask=padding_mask)


@torch.no_grad()
def fill_weights(models: list[torch.nn.Module], *, std: float = 0.02) -> None:
    """Random weights straight on the device: those of `model.init` take minutes on a CPU at 456B. Vectors become 1."""
    for model in models:
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.fill_(1.0)
            else:
                parameter.normal_(std=std)


@contextmanager
def _supplied(arrivals: Arrivals) -> Iterator[None]:
    group_type: Any = dist.ProcessGroup
    all_reduce = group_type.allreduce

    def done(group: Any) -> dist.Work:
        """A finished Work: the fake group's all-reduce touches no data."""
        return all_reduce(group, [torch.empty(1, device="cpu")])

    def ranks(group: dist.ProcessGroup) -> tuple[int, ...]:
        return tuple(dist.get_process_group_ranks(group))

    def allreduce(group: Any, tensors: list[Tensor], *options: Any) -> Any:
        n = group.size()
        arrivals.add(ranks(group), "all_reduce", 2 * (n - 1) / n * sum(t.nbytes for t in tensors))
        return done(group)

    def broadcast(group: Any, tensors: list[Tensor], *options: Any) -> Any:
        arrivals.add(ranks(group), "broadcast", sum(t.nbytes for t in tensors))
        return done(group)

    def gather_base(group: Any, output: Tensor, x: Tensor, *options: Any) -> Any:
        arrivals.add(ranks(group), "all_gather", output.nbytes - x.nbytes)
        if not _same_memory(output, x):
            _repeat(output, x)
        return done(group)

    def gather(group: Any, outputs: list[list[Tensor]], inputs: list[Tensor], *options: Any) -> Any:
        for parts, x in zip(outputs, inputs, strict=True):
            arrivals.add(ranks(group), "all_gather", sum(part.nbytes for part in parts) - x.nbytes)
            for part in parts:
                if not _same_memory(part, x):
                    _repeat(part, x)
        return done(group)

    def gathers(group: Any, outputs: list[Tensor], inputs: list[Tensor], *options: Any) -> Any:
        for output, x in zip(outputs, inputs, strict=True):
            gather_base(group, output, x)
        return done(group)

    def scatter_base(group: Any, output: Tensor, x: Tensor, *options: Any) -> Any:
        arrivals.add(ranks(group), "reduce_scatter", x.nbytes - output.nbytes)
        if not _same_memory(output, x):
            with torch.no_grad():
                output.copy_(x.chunk(group.size())[group.rank()])
        return done(group)

    def scatters(group: Any, outputs: list[Tensor], inputs: list[Tensor], *options: Any) -> Any:
        for output, x in zip(outputs, inputs, strict=True):
            scatter_base(group, output, x)
        return done(group)

    def all_to_all(group: Any, output: Tensor, x: Tensor, *splits: Any) -> Any:
        arrivals.add(ranks(group), "all_to_all", output.nbytes * (group.size() - 1) / group.size())
        _repeat(output, x)
        return done(group)

    def send(group: Any, tensors: list[Tensor], peer: int, tag: int) -> Any:
        return done(group)

    def receive(group: Any, tensors: list[Tensor], peer: int, tag: int) -> Any:
        ring = arrivals.ring(ranks(group), (dist.get_rank(), dist.get_global_rank(group, peer)))
        arrivals.add(ring, "receive", sum(t.nbytes for t in tensors))
        with torch.no_grad():
            for tensor in tensors:
                tensor.normal_(std=RECEIVED_STD)
        return done(group)

    methods = {
        allreduce: ("allreduce", "allreduce_coalesced"),
        broadcast: ("broadcast",),
        gather: ("allgather",),
        # The names that torch 2.11 and 2.13 call.
        gather_base: ("_allgather_base", "all_gather_single"),
        gathers: ("allgather_into_tensor_coalesced", "all_gather_single_coalesced"),
        scatter_base: ("_reduce_scatter_base", "reduce_scatter_single"),
        scatters: ("reduce_scatter_tensor_coalesced", "reduce_scatter_single_coalesced"),
        all_to_all: ("alltoall_base", "all_to_all_single"),
        send: ("send",),
        receive: ("recv",),
    }
    with ExitStack() as stack:
        for method, names in methods.items():
            for name in names:
                if hasattr(group_type, name):
                    stack.enter_context(patch.object(group_type, name, method))
        yield


def _same_memory(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


@torch.no_grad()
def _repeat(output: Tensor, x: Tensor) -> None:
    """The numbers of x, as often as output has room for; random ones if x is empty."""
    flat, source = output.view(-1), x.reshape(-1)
    if not len(source):
        output.normal_(std=RECEIVED_STD)
        return
    for start in range(0, len(flat), len(source)):
        part = flat[start : start + len(source)]
        part.copy_(source[: len(part)])
