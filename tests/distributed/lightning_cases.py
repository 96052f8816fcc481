"""Lightning attention over several ranks: functions of one rank, for the `ranks` fixture."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from m1_kernels import lightning_attention_reference, slopes
from torch import Tensor

from megatron_m1 import platform
from megatron_m1.parallel.lightning_context import LightningContext
from megatron_m1.parallel.lightning_exchange import StateExchange
from megatron_m1.parallel.sequence_layout import SequenceLayout
from megatron_m1.parallel.state_chain import state_chains
from megatron_m1.parallel.traffic import Traffic

TOKENS, DIM = 48, 4
# Borders of chunks lie at multiples of 48 / 2W: 12 for two ranks, 8 for three, 6 for four, 3 for eight.
CU_SEQLENS = {
    "one document": [0, 48],
    "every kind of border": [0, 3, 4, 4, 11, 12, 30, 31, 36, 43],
    "longer than a rank, length 1": [0, 1, 2, 46, 47, 48],
    "no document crosses a border": [0, 6, 7, 12, 17, 18, 24, 30, 36, 42, 48],
    "many documents": [*range(11), *range(14, 34), *range(38, 49)],
    "crosses one border at most": [0, 8, 10, 16, 20, 28, 32, 40, 48],
}


@dataclass
class Case:
    layout: SequenceLayout
    cu_seqlens: list[int] | None
    rows: int = 1


def cases(world: int, rank: int) -> dict[str, Case]:
    found = {"dense": Case(SequenceLayout.dense(world=world, rank=rank, rows=3, tokens=TOKENS), None, rows=3)}
    for name, edges in CU_SEQLENS.items():
        found[name] = Case(SequenceLayout.pack(world=world, rank=rank, cu_seqlens=edges, tokens=TOKENS), edges)
    unit = 2 * world
    edges = [0, unit, unit, unit + 24 // unit * unit, TOKENS]
    found["per document"] = Case(SequenceLayout.per_document(world=world, rank=rank, cu_seqlens=edges), edges)
    return found


def inputs(case: Case, heads: int) -> list[Tensor]:
    """q, k, v and the gradient of the output, of the whole sequence; numbers that bf16 holds."""
    generator = torch.Generator().manual_seed(11)
    shape = (case.rows, TOKENS, heads, DIM)
    return [torch.randn(shape, generator=generator).bfloat16().to(platform.device(), torch.float64) for _ in range(4)]


def of_one_rank(case: Case, rates: Tensor) -> list[Tensor]:
    """o, dq, dk, dv of the whole sequence by the recurrent reference."""
    *qkv, do = inputs(case, len(rates))
    qkv = [x.requires_grad_() for x in qkv]
    edges = None if case.cu_seqlens is None else torch.tensor(sorted({*case.cu_seqlens, TOKENS}), dtype=torch.int32)
    edges = None if edges is None else edges.to(do.device)
    o = lightning_attention_reference(*qkv, rates.to(do.device), cu_seqlens=edges)
    o.backward(do)
    return [o.detach(), *(x.grad for x in qkv)]


def over_ranks(
    case: Case, rates: Tensor, group: dist.ProcessGroup, *, method: str, limit: bool = True, dtype=torch.float64
) -> tuple[list[Tensor], Traffic]:
    """o, dq, dk, dv of this rank's tokens."""
    context = LightningContext(group, rates.tolist(), method=method, limit=limit)
    *qkv, do = (case.layout.partition(x, 1).to(dtype) for x in inputs(case, len(rates)))
    qkv = [x.requires_grad_() for x in qkv]
    o = context.start(*qkv, rates.to(do.device), case.layout)()
    o.backward(do)
    return [o.detach(), *(x.grad for x in qkv)], context.traffic


def differences(rank: int, world: int) -> dict[tuple[str, str], float]:
    """Greatest difference, of o and every gradient, from one rank in fp64, by case and method."""
    rates = slopes(4, 0, 2)
    worst = {}
    for name, case in cases(world, rank).items():
        expected = [case.layout.partition(x, 1) for x in of_one_rank(case, rates)]
        for method in ("ring", "all_gather"):
            found, _ = over_ranks(case, rates, dist.group.WORLD, method=method)
            worst[name, method] = max(float((a - b).abs().max()) for a, b in zip(found, expected, strict=True))
    return worst


def in_bf16(rank: int, world: int) -> dict[tuple[str, str], tuple[float, bool]]:
    """By case and method: largest ||a-b||/||b|| of o and every gradient from one rank in fp64, and whether it sends what fp32 does."""
    rates = slopes(4, 0, 2)
    found = {}
    for name in ("dense", "every kind of border"):
        case = cases(world, rank)[name]
        expected = [case.layout.partition(x, 1) for x in of_one_rank(case, rates)]
        for method in ("ring", "all_gather"):
            ours, traffic = over_ranks(case, rates, dist.group.WORLD, method=method, dtype=torch.bfloat16)
            _, of_fp32 = over_ranks(case, rates, dist.group.WORLD, method=method, dtype=torch.float32)
            errors = [float((a.double() - b).norm() / b.norm()) for a, b in zip(ours, expected, strict=True)]
            found[name, method] = max(errors), traffic == of_fp32
    return found


# fp32, chunks of 6 or 12 tokens: heads that fade within a piece, within a chunk, within two, never; not in the order of their slopes.
RATES = torch.tensor([20.0, 0.01, 9.0, 120.0, 3.0])


@dataclass
class Limits:
    """What a limit by the horizon does to one case and method."""

    same: bool
    """Whether o and all gradients are bit by bit those without it."""
    limited: Traffic
    unlimited: Traffic


def limited_and_unlimited(rank: int, world: int) -> dict[tuple[str, str], Limits]:
    """By case and method."""
    found = {}
    for name, case in cases(world, rank).items():
        for method in ("ring", "all_gather"):
            (limited, few), (unlimited, many) = (
                over_ranks(case, RATES, dist.group.WORLD, method=method, limit=limit, dtype=torch.float32)
                for limit in (True, False)
            )
            same = all(torch.equal(a, b) for a, b in zip(limited, unlimited, strict=True))
            found[name, method] = Limits(same, few, many)
    return found


def exchanged_states(rank: int, world: int) -> list[tuple[Tensor, Tensor]]:
    """Entry states and gradients of the final states, fp32, of every case: by the ring, by the all-gather."""
    found, device, rates = [], platform.device(), RATES.to(platform.device())
    for case in cases(world, rank).values():
        chains = state_chains(case.layout, device)
        shape = (len(RATES), DIM, DIM)
        generator = torch.Generator().manual_seed(rank)
        leaving = torch.randn(len(chains.leaving), *shape, generator=generator).to(device)
        gradient = torch.randn(len(chains.entering), *shape, generator=generator).to(device)
        results = []
        for method in ("ring", "all_gather"):
            exchange = StateExchange(chains, rates, host_slopes=RATES.tolist(), group=dist.group.WORLD, method=method)
            states = leaving.clone().requires_grad_()
            entering = exchange.finish(exchange.start(states))
            entering.backward(gradient)
            results.append(torch.cat([entering.detach(), states.grad]).cpu())
        found.append(tuple(results))
    return found
