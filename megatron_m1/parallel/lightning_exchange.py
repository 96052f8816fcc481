"""Lightning states from rank to rank: what the chunks of a sequence leave becomes what the next ones start from.

A piece that leaves state F (from zero entry) after a piece that was entered with S passes on S' = e^{-s * length} S + F. Only these
D x D states travel, along the borders of `state_chain`; gradients travel back by the transposed recurrence. Two ways:
    `ring`        from chunk to chunk, each waiting for the one before it alone.
    `all_gather`  every rank gets every F in one collective and runs the recurrence itself.
Both run the same arithmetic in the same order: their results are equal bit by bit.

Horizon: where s * length > 104 float32's e^{-s * length} is exactly 0. Of such heads no chunk needs more than its neighbour's F, so
they go to the neighbour alone, at once, and take no part in the chain or in the collective. The result is equal bit by bit.

Source: LASP (arXiv 2404.02882) for the ring, LASP-2 (arXiv 2502.07563) for the all-gather; neither has the horizon, packing or zig-zag.
"""

import abc
import functools
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_m1.parallel.state_chain import Border, Chain, StateChains
from megatron_m1.parallel.traffic import Traffic, method_by_size
from megatron_m1.platform.streams import SideStream

__all__ = ["StateExchange", "exchange_method", "horizon"]


def horizon(dtype: torch.dtype) -> float:
    """The smallest round x from which on exp(-x) is exactly 0 in `dtype` (float32 or float64)."""
    return {torch.float32: 104.0, torch.float64: 746.0}[dtype]


def exchange_method(method: str, *, chains: StateChains, world: int, state_bytes: int) -> str:
    """`ring` or `all_gather`, for `auto` by size: `all_gather` has one latency instead of 2W-1, but brings every rank
    (W-1) * (states per rank) * state_bytes; above AUTO_RING_BYTES the ring's one state per hop, hidden behind the work inside the
    chunks, is cheaper."""
    received = (world - 1) * max(chains.most_leaving, chains.most_entering) * state_bytes
    return method_by_size(method, received, of="lightning states", world=world)


class StateExchange:
    """One exchange forward and, in autograd's backward pass, one back.

    token = start(states); work that needs no entry state; entry_states = finish(token). The backward pass starts with the gradient
    of finish and waits at that of start, so it overlaps with the backward of what was done in between.
    Every rank of `group` must call both, in the same order, also with no states of its own.

    slopes: fp32 [H] on the device; host_slopes: the same numbers.  method: `ring` or `all_gather`.
    limit: keep heads within their horizon.
    """

    def __init__(
        self,
        chains: StateChains,
        slopes: Tensor,
        *,
        host_slopes: Sequence[float],
        group: dist.ProcessGroup,
        method: str,
        limit: bool = True,
        traffic: Traffic | None = None,
    ) -> None:
        kind = {"ring": _Ring, "all_gather": _AllGather}[method]
        traffic = traffic or Traffic()
        self._travel: _Travel | None = None
        self._forward, self._backward = (
            functools.partial(kind, chain, put_in, taken, slopes, host_slopes, group, limit, traffic, backward)
            for chain, put_in, taken, backward in (
                (chains.forward, chains.most_leaving, len(chains.entering), False),
                (chains.backward, chains.most_entering, len(chains.leaving), True),
            )
        )

    def start(self, states: Tensor) -> Tensor:
        """A token for `finish`. states: [leaving pieces, H, D, D], their final states from zero entry."""
        return _Start.apply(states, self)

    def finish(self, token: Tensor) -> Tensor:
        """[entering pieces, H, D, D], the states that they start from."""
        return _Finish.apply(token, self)

    def _begin(self, direction: Callable[[], "_Travel"], states: Tensor) -> None:
        self._travel = direction()
        self._travel.start(states)

    def _end(self) -> Tensor:
        """What has arrived. The buffers go: this exchange stays with the graph until the backward pass of all layers is through."""
        travel, self._travel = self._travel, None
        assert travel is not None, "finish comes after start, once"
        return travel.finish()


class _Start(torch.autograd.Function):
    @staticmethod
    def forward(ctx, states: Tensor, exchange: StateExchange) -> Tensor:
        ctx.exchange = exchange
        exchange._begin(exchange._forward, states)
        return states.new_zeros(())

    @staticmethod
    @once_differentiable
    def backward(ctx, _: Tensor) -> tuple[Tensor, None]:
        return ctx.exchange._end(), None


class _Finish(torch.autograd.Function):
    @staticmethod
    def forward(ctx, token: Tensor, exchange: StateExchange) -> Tensor:
        ctx.exchange = exchange
        return exchange._end()

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        ctx.exchange._begin(ctx.exchange._backward, gradient)
        return gradient.new_zeros(()), None


class _Travel(abc.ABC):
    """One direction of one exchange: `start(states)`, then `finish()`."""

    def __init__(
        self,
        chain: Chain,
        most: int,
        taken: int,
        slopes: Tensor,
        host_slopes: Sequence[float],
        group: dist.ProcessGroup,
        limit: bool,
        traffic: Traffic,
        backward: bool,
    ) -> None:
        self.chain, self.most, self.taken, self.group = chain, most, taken, group
        self.traffic, self.backward = traffic, backward
        self.slopes, self.host_slopes, self.limit = slopes, host_slopes, limit
        self.rank, self.world = group.rank(), group.size()

    @abc.abstractmethod
    def start(self, states: Tensor) -> None: ...

    @abc.abstractmethod
    def finish(self) -> Tensor: ...

    def begin(self, states: Tensor) -> None:
        self.order = _order(tuple(self.host_slopes), states.device)
        self.states = states if self.order is None else states.index_select(1, self.order)
        rates = self.slopes if self.order is None else self.slopes[self.order]
        # e^{-s * length} [lengths, H, 1, 1] of all borders.
        self.decays = (self.chain.lengths[:, None] * -rates.double()).exp().to(states.dtype)[:, :, None, None]

    def heads_beyond(self, shortest: int | None) -> int:
        """How many heads, the last ones in `order`, still hold something after `shortest` tokens."""
        if not self.limit:
            return len(self.host_slopes)
        if shortest is None:
            return 0
        return sum(slope * shortest <= horizon(self.states.dtype) for slope in self.host_slopes)

    def passed_on(self, place: int, states: Tensor, arriving: Tensor | None, first_head: int) -> Tensor:
        """What crosses border `place`: states [n, heads from first_head on, D, D], plus the faded `arriving` ones of the border before."""
        border = self.chain.borders[place]
        if not border.lengths:
            return states
        assert arriving is not None, "a document that crosses two borders comes through the chunk between them"
        decays, arriving = self.decays[self.chain.spans[place], first_head:], arriving[border.previous]
        if len(border.lengths) == border.count:
            return torch.addcmul(states, decays, arriving)
        passed = states.clone()
        passed[border.onward] = torch.addcmul(states[border.onward], decays, arriving)
        return passed

    def result(self) -> Tensor:
        return self.states.new_zeros(self.taken, *self.states.shape[1:])

    def in_callers_order(self, states: Tensor) -> Tensor:
        return states if self.order is None else states.index_select(1, self.order.argsort())

    def exchange_pairs(self, sends: list[tuple[Tensor, int]], receives: list[tuple[Tensor, int]]) -> list[dist.Work]:
        """Start messages to and from ranks of the group, in one batch."""
        operations = []
        for operation, messages in ((dist.isend, sends), (dist.irecv, receives)):
            for tensor, peer in messages:
                peer = dist.get_global_rank(self.group, peer)
                operations.append(dist.P2POp(operation, tensor, peer, group=self.group))
        sent_bytes = sum(tensor.nbytes for tensor, _ in sends)
        self.traffic.count(sent_bytes, backward=self.backward, messages=len(sends))
        return dist.batch_isend_irecv(operations) if operations else []


class _AllGather(_Travel):
    def start(self, states: Tensor) -> None:
        self.begin(states)
        heads = states.shape[1]
        far = self.heads_beyond(min((length for b in self.chain.borders for length in b.lengths), default=None))
        self.near = heads - far
        self.traffic.chained_heads += far
        self.traffic.neighbour_heads += self.near
        self.works: list[dist.Work] = []
        self.mine = self.gathered = None
        if far:
            self.mine = self.states.new_zeros(self.most, far, *states.shape[2:])
            self.mine[: len(states)] = self.states[:, self.near :]
            gathered = self.mine.new_empty(self.world * self.most, *self.mine.shape[1:])
            self.works = [dist.all_gather_into_tensor(gathered, self.mine, group=self.group, async_op=True)]
            self.gathered = gathered.unflatten(0, (self.world, self.most))
            self.traffic.count((self.world - 1) * self.mine.nbytes, backward=self.backward)
        self.received: dict[int, Tensor] = {}
        if self.near:
            self._to_neighbours()

    def _to_neighbours(self) -> None:
        sends, receives = [], []
        for place, border in enumerate(self.chain.borders):
            if not border.count:
                continue
            if border.source == self.rank:
                message = self.states[border.source_rows, : self.near].contiguous()
                if border.target == self.rank:
                    self.received[place] = message
                else:
                    sends.append((message, border.target))
            elif border.target == self.rank:
                self.received[place] = self.states.new_empty(border.count, self.near, *self.states.shape[2:])
                receives.append((self.received[place], border.source))
        self.works += self.exchange_pairs(sends, receives)

    def finish(self) -> Tensor:
        for work in self.works:
            work.wait()
        result = self.result()
        for place, states in self.received.items():
            result[self.chain.borders[place].target_rows, : self.near] = states
        if self.gathered is not None:
            self._scan(self.gathered, result[:, self.near :])
        return self.in_callers_order(result)

    def _scan(self, gathered: Tensor, result: Tensor) -> None:
        """The recurrence over the borders; what crosses to this rank goes to `result`."""
        last = max((i for i, b in enumerate(self.chain.borders) if b.target == self.rank and b.count), default=-1)
        arriving = None
        for place, border in enumerate(self.chain.borders[: last + 1]):
            arriving = self.passed_on(place, gathered[border.source][border.source_rows], arriving, self.near)
            if border.target == self.rank:
                result[border.target_rows] = arriving


class _Ring(_Travel):
    def start(self, states: Tensor) -> None:
        """Send at once what no other state has to arrive for."""
        self.begin(states)
        heads = states.shape[1]
        self.near: dict[int, Tensor] = {}
        sends, receives = [], []
        self.side = SideStream()
        self.side.fork(self.states, self.decays)
        with self.side.queue():
            for place, border in self._own_borders():
                near = heads - self.heads_beyond(border.shortest)
                if border.source == self.rank:
                    self.traffic.chained_heads += heads - near
                    self.traffic.neighbour_heads += near
                    self.near[place] = self.states[border.source_rows, :near].contiguous()
                else:
                    self.near[place] = self._empty(border, near)
                if near and border.source == self.rank != border.target:
                    sends.append((self.near[place], border.target))
                elif near and border.source != self.rank:
                    receives.append((self.near[place], border.source))
            self.works = self.exchange_pairs(sends, receives)

    def finish(self) -> Tensor:
        """Take part in the chain, which comes through this rank once for each of its chunks."""
        with self.side.queue():
            for work in self.works:
                work.wait()
            result, sending = self.result(), []
            arrived: dict[int, Tensor] = {}
            for place, border in self._own_borders():
                states = self.near[place]
                if states.shape[1] < result.shape[1]:
                    far = self._far(place, states.shape[1], arrived.get(place - 1))
                    if border.source == self.rank != border.target:
                        sending += self.exchange_pairs([(far, border.target)], [])
                    states = torch.cat([states, far], dim=1)
                if border.target == self.rank:
                    arrived[place] = states
                    result[border.target_rows] = states
            for work in sending:
                work.wait()
            result = self.in_callers_order(result)
        self.side.join(result)
        return result

    def _far(self, place: int, near: int, arrived: Tensor | None) -> Tensor:
        """The states of the heads from `near` on that cross a border, received, or made from those that crossed the one before."""
        border = self.chain.borders[place]
        if border.source != self.rank:
            states = self._empty(border, self.states.shape[1] - near)
            for work in self.exchange_pairs([], [(states, border.source)]):
                work.wait()
            return states
        arriving = None if arrived is None else arrived[:, near:]
        return self.passed_on(place, self.states[border.source_rows, near:], arriving, near).contiguous()

    def _own_borders(self) -> list[tuple[int, Border]]:
        borders = enumerate(self.chain.borders)
        return [(place, b) for place, b in borders if b.count and self.rank in (b.source, b.target)]

    def _empty(self, border: Border, heads: int) -> Tensor:
        return self.states.new_empty(border.count, heads, *self.states.shape[2:])


@functools.cache
def _order(host_slopes: tuple[float, ...], device: torch.device) -> Tensor | None:
    """Heads by falling slope, so that those whose states fade within a chunk come first; None: they stand so already.

    Cached: to make it on a device waits for the device, after which every queue may read it.
    """
    order = sorted(range(len(host_slopes)), key=lambda head: -host_slopes[head])
    return None if order == list(range(len(order))) else torch.tensor(order, device=device)
