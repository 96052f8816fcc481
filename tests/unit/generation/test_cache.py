"""The hybrid cache against attention over whole sequences."""

import functools

import pytest
import torch
from m1_kernels import lightning_attention_reference, slopes
from torch import Tensor
from torch.nn.functional import silu

from megatron_m1.generation import steps
from megatron_m1.generation.blocks import BlockPool, block_runs, blocks_for
from megatron_m1.generation.cache import HybridCache

HEADS, GROUPS, DIM, SCALE = 4, 2, 8, 0.35
LIGHTNING, SOFTMAX = 1, 2
LENGTH = 150
DECAY = slopes(HEADS, 0, 2)


@pytest.fixture(params=["gathered", "in place", "device"])
def how(request, monkeypatch) -> str:
    """How decoding passes attend."""
    monkeypatch.setattr(steps, "IN_PLACE_ELEMENTS", 0 if request.param == "in place" else 1 << 30)
    return request.param


def make(how: str, slots: int = 4, longest: int = 200, blocks: int = 12) -> HybridCache:
    return HybridCache(
        {LIGHTNING: 0, SOFTMAX: 1}, slots=slots, blocks=blocks, longest=longest, heads=HEADS, groups=GROUPS,
        head_dim=DIM, dtype=torch.float32, device=torch.device("cpu"), on_device=how == "device",
    )  # fmt: skip


def sequence(seed: int, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """q [T, H, D], k and v with heads enough for both kinds of layer (softmax takes the first GROUPS).

    Seeds from 1000 on: those of one thousand P share their first P tokens.
    """
    torch.manual_seed(seed)
    q, k, v = (torch.randn(length, HEADS, DIM) for _ in range(3))
    if seed % 1000 and seed > 1000:
        shared = seed // 1000
        for own, parent in zip((q, k, v), sequence(shared * 1000, length), strict=True):
            own[:shared] = parent[:shared]
    return q, k, v


@functools.cache
def expected(seed: int, length: int) -> tuple[Tensor, Tensor]:
    """Outputs of both layers; the lightning layer's inputs go through SiLU first."""
    q, k, v = (x.double() for x in sequence(seed, length))
    lightning = lightning_attention_reference(*(silu(x)[None] for x in (q, k, v)), DECAY)[0]
    keys, values = (x[:, :GROUPS].repeat_interleave(HEADS // GROUPS, dim=1) for x in (k, v))
    scores = torch.einsum("ihd,jhd->hij", q, keys) * SCALE
    scores = scores.masked_fill(torch.ones(length, length, dtype=torch.bool).triu(1), -torch.inf)
    return lightning, torch.einsum("hij,jhd->ihd", scores.softmax(-1), values)


def inputs_of(parts: list[tuple[int, int, int]], tokens: int) -> list[Tensor]:
    """q, k, v [tokens, H, D] of tokens [start, stop) of the sequences `seed`, then large padding."""
    rows = [torch.cat([x[start:stop] for s, start, stop in parts for x in [sequence(s, LENGTH)[i]]]) for i in range(3)]
    return [torch.cat([x, torch.full((tokens - len(x), HEADS, DIM), 1e3)]) for x in rows]


def attend(cache: HybridCache, position_ids: Tensor, parts: list[tuple[int, int, int]]) -> tuple[Tensor, Tensor]:
    """Outputs [n, H, D] of both layers in a prefill."""
    real = sum(stop - start for _, start, stop in parts)
    q, k, v = (x[None] for x in inputs_of(parts, position_ids.shape[1]))
    lightning = cache.lightning(LIGHTNING, silu(q), silu(k), silu(v), DECAY)
    softmax = cache.softmax(SOFTMAX, q, k[:, :, :GROUPS], v[:, :, :GROUPS], scale=SCALE)
    return lightning[0, :real], softmax[0, :real]


def attend_step(cache: HybridCache, tokens: int, parts: list[tuple[int, int, int]]) -> tuple[Tensor, Tensor]:
    """Outputs [n, H, D] of both layers in a decoding pass; padding gives zeros."""
    q, k, v = inputs_of(parts, tokens)
    lightning = cache.lightning_step(LIGHTNING, torch.cat([q, k, v], dim=-1), DECAY)
    softmax = cache.softmax_step(SOFTMAX, q, k[:, :GROUPS], v[:, :GROUPS], scale=SCALE)
    assert not lightning[len(parts) :].any() and not softmax[len(parts) :].any()
    return lightning[: len(parts)], softmax[: len(parts)]


def start_decode(cache: HybridCache, pad_to: int = 1) -> Tensor:
    if not cache.on_device:
        return cache.start_decode(pad_to=pad_to)
    positions = cache.advance()
    padding = -len(positions) % pad_to if positions else pad_to
    return cache.start_device_decode(torch.tensor(positions + [-1] * padding))


def compare(outputs: tuple[Tensor, Tensor], parts: list[tuple[int, int, int]]) -> None:
    for kind in range(2):
        want = torch.cat([expected(seed, LENGTH)[kind][start:stop] for seed, start, stop in parts])
        assert (outputs[kind] - want).abs().max() <= 1e-6 * max(1.0, *want.abs().flatten().tolist())


def prefill(cache: HybridCache, first: int, parts: list[tuple[int, int, int]], pad_to: int = 1) -> None:
    positions = cache.start_prefill(first, [stop - start for _, start, stop in parts], pad_to=pad_to)
    real = [position for _, start, stop in parts for position in range(start, stop)]
    assert positions[0, : len(real)].tolist() == real and positions.shape[1] % pad_to == 0
    compare(attend(cache, positions, parts), parts)


def decode(cache: HybridCache, parts: list[tuple[int, int]], pad_to: int = 1) -> None:
    positions = start_decode(cache, pad_to)
    assert positions[0, : len(parts)].tolist() == [at for _, at in parts] and positions.shape[1] % pad_to == 0
    tokens = [(seed, at, at + 1) for seed, at in parts]
    compare(attend_step(cache, positions.shape[1], tokens), tokens)


@pytest.mark.parametrize("pad_to", [1, 4])
def test_ragged_prefill_and_decode_equal_whole_sequences(pad_to, how):
    cache = make(how)
    lengths = {7: 5, 8: 1, 9: 69}
    for _ in lengths:
        cache.add(100)
    prefill(cache, 0, [(seed, 0, length) for seed, length in lengths.items()], pad_to)
    hidden = torch.arange(80).view(-1, 1, 1)
    assert cache.predicting(hidden).flatten().tolist() == [4, 5, 74]
    for step in range(5):
        decode(cache, [(seed, length + step) for seed, length in lengths.items()], pad_to)


def test_prefill_in_chunks_between_decoding(how):
    cache = make(how)
    cache.add(100)
    prefill(cache, 0, [(1, 0, 70)])
    decode(cache, [(1, 70)])
    cache.add(200)
    cache.add(70)
    prefill(cache, 1, [(2, 0, 64), (3, 0, 3)])
    prefill(cache, 1, [(2, 64, 128)])
    prefill(cache, 1, [(2, 128, 131)])
    decode(cache, [(1, 71), (2, 131), (3, 3)])


@pytest.mark.parametrize("prefix", [64, 80, 140])
def test_forks_share_full_blocks_and_go_their_own_ways(prefix, how):
    cache = make(how)
    cache.add(prefix + 9)
    prefill(cache, 0, [(prefix * 1000, 0, prefix)])
    kept = cache.snapshot(0)
    used = 12 - cache.pool.free
    cache.fork(kept, prefix + 9)
    assert 12 - cache.pool.free == used + blocks_for(prefix + 9) - prefix // 64
    for at in range(prefix, prefix + 3):
        decode(cache, [(prefix * 1000, at), (prefix * 1000 + 1, at)])
    cache.remove(0)  # the fork moves to slot 0, and the blocks of the prompt stay
    cache.fork(kept, prefix + 9)
    cache.forget(kept)
    decode(cache, [(prefix * 1000 + 1, prefix + 3), (prefix * 1000 + 2, prefix)])
    cache.remove(1)
    cache.remove(0)
    assert cache.pool.free == 12


def test_slots_are_refilled_without_a_trace_of_the_past(how):
    cache = make(how)
    for _ in range(4):
        cache.add(80)
    prefill(cache, 0, [(1, 0, 70), (2, 0, 3), (3, 0, 6), (6, 0, 5)])
    cache.remove(0)  # sequence 6 moves to slot 0
    cache.remove(2)
    assert cache.lengths == [5, 3]
    cache.add(80)
    cache.add(20)
    prefill(cache, 2, [(4, 0, 64)])
    prefill(cache, 2, [(4, 64, 66), (5, 0, 2)])
    decode(cache, [(6, 5), (2, 3), (4, 66), (5, 2)])


def test_a_pass_of_padding_alone_touches_nothing(how):
    cache = make(how)
    positions = cache.start_prefill(0, [], pad_to=2)
    assert positions.tolist() == [[0, 0]]
    assert all(len(out) == 0 for out in attend(cache, positions, [(1, 0, 0)]))
    assert cache.predicting(torch.zeros(2, 1, 3)).shape == (1, 1, 3)
    assert start_decode(cache, pad_to=2).tolist() == [[0, 0]]
    q, k, v = inputs_of([(1, 0, 0)], 2)
    assert not cache.lightning_step(LIGHTNING, torch.cat([q, k, v], dim=-1), DECAY).any()
    assert not cache.softmax_step(SOFTMAX, q, k[:, :GROUPS], v[:, :GROUPS], scale=SCALE).any()
    assert len(cache.predicting_step(torch.zeros(2, 3))) >= 1
    cache.add(7)
    prefill(cache, 0, [(5, 0, 7)])


def test_blocks_come_in_runs_of_neighbours_where_there_are_any():
    pool = BlockPool(8)
    first, second, third = pool.take(2), pool.take(3), pool.take(1)
    assert (first, second, third, pool.free) == ([0, 1], [2, 3, 4], [5], 2)
    pool.share(second[:1])
    pool.release(first)
    pool.release(second)
    assert pool.free == 6  # block 2 has one more user
    assert pool.take(3) == [0, 1, 3] and block_runs([0, 1, 3]) == [(0, 2), (3, 1)]
    pool.release([2])
    assert pool.take(2) == [6, 7]
    with pytest.raises(AssertionError, match="3 blocks wanted, 2 free"):
        pool.take(3)
