"""Triton kernels of the routing of a decoding step: the choice of experts, then the sort of the pairs by counting."""

import torch
import triton
import triton.language as tl

__all__ = ["compile_cases", "route"]


def route(logits: torch.Tensor, top_k: int) -> tuple[torch.Tensor, ...]:
    """The fields of `routing.Routed`. Two launches, fit for CUDA graphs."""
    tokens, experts = logits.shape
    device, pairs = logits.device, tokens * top_k
    chosen = torch.empty(tokens, top_k, dtype=torch.int64, device=device)
    sorted_tokens, places = torch.empty(2, pairs, dtype=torch.int64, device=device)
    shares, sorted_shares = torch.empty(2, pairs, dtype=torch.float32, device=device)
    ends = torch.zeros(experts, dtype=torch.int32, device=device)
    if tokens:
        _choose_kernel[(tokens,)](
            logits, chosen, shares, *logits.stride(), E=experts, K=top_k, BLOCK_E=triton.next_power_of_2(experts),
            BLOCK_K=triton.next_power_of_2(top_k), num_warps=1,
        )  # fmt: skip
        _sort_kernel[(max(pairs, experts),)](
            chosen, shares, sorted_tokens, sorted_shares, places, ends, pairs, E=experts, K=top_k,
            BLOCK_P=triton.next_power_of_2(pairs), num_warps=4 if pairs > 128 else 1,
        )  # fmt: skip
    return chosen, sorted_tokens, sorted_shares, places, ends


@triton.jit
def _choose_kernel(
    logits, chosen, shares, token_stride, expert_stride,
    E: tl.constexpr, K: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    experts = tl.arange(0, BLOCK_E)
    values = tl.load(logits + token * token_stride + experts * expert_stride, mask=experts < E, other=float("-inf"))
    first = tl.max(values, axis=0)
    left = values
    places = tl.arange(0, BLOCK_K)
    mine = tl.zeros([BLOCK_K], tl.int64)
    weights = tl.zeros([BLOCK_K], tl.float32)
    for place in tl.static_range(K):
        # A token whose logits are not numbers takes any expert there is; its own logits say so later.
        best = tl.minimum(tl.argmax(left, axis=0), E - 1)
        weight = tl.exp(tl.sum(tl.where(experts == best, values, 0.0), axis=0) - first)
        mine = tl.where(places == place, best.to(tl.int64), mine)
        weights = tl.where(places == place, weight, weights)
        left = tl.where(experts == best, float("-inf"), left)
    at = token * K + places
    tl.store(chosen + at, mine, mask=places < K)
    tl.store(shares + at, weights / tl.sum(weights, axis=0), mask=places < K)


@triton.jit(do_not_specialize=["pairs"])
def _sort_kernel(
    chosen, shares, sorted_tokens, sorted_shares, places, ends, pairs,
    E: tl.constexpr, K: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Program i: the place of pair i, and the end of expert i."""
    mine = tl.program_id(0)
    others = tl.arange(0, BLOCK_P)
    experts = tl.load(chosen + others, mask=others < pairs, other=E)
    if mine < pairs:
        expert = tl.load(chosen + mine)
        before = (experts < expert) | ((experts == expert) & (others < mine))
        place = tl.sum(before.to(tl.int32), axis=0)
        tl.store(places + mine, place.to(tl.int64))
        tl.store(sorted_tokens + place, (mine // K).to(tl.int64))
        tl.store(sorted_shares + place, tl.load(shares + mine))
    if mine < E:
        tl.store(ends + mine, tl.sum((experts <= mine).to(tl.int32), axis=0))


def compile_cases() -> list[tuple[str, triton.JITFunction, dict[str, str], dict[str, object], dict[str, int]]]:
    """(name, kernel, signature, constexprs, options) of both kernels with M1's experts, for offline compilation; see `triton_norm`."""
    kinds = {"logits": "*fp32:16", "shares": "*fp32:16", "sorted_shares": "*fp32:16", "ends": "*i32:16"}
    kinds |= {"token_stride": "i32:16", "pairs": "i32"}
    choosing: dict[str, object] = {"E": 32, "K": 2, "BLOCK_E": 32, "BLOCK_K": 2, "expert_stride": 1}
    sorting: dict[str, object] = {"E": 32, "K": 2, "BLOCK_P": 256}
    cases = []
    for kernel, constants, warps in ((_choose_kernel, choosing, 1), (_sort_kernel, sorting, 4)):
        signature = {
            str(name): "constexpr" if name in constants else kinds.get(name, "*i64:16") for name in kernel.arg_names
        }
        name = f"route{kernel.__name__.removesuffix('_kernel')}[32]"
        cases.append((name, kernel, signature, constants, {"num_warps": warps}))
    return cases
