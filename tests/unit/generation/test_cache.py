"""The hybrid cache against attention over whole sequences."""

import pytest
import torch
from m1_kernels import lightning_attention_reference, slopes
from torch import Tensor

from megatron_m1.generation.cache import HybridCache

HEADS, GROUPS, DIM, SCALE = 4, 2, 8, 0.35
LIGHTNING, SOFTMAX = 1, 2
DECAY = slopes(HEADS, 0, 2)


def make(slots: int = 4, capacity: int = 32, pad_to: int = 1) -> HybridCache:
    return HybridCache(
        {LIGHTNING: 0, SOFTMAX: 1}, slots=slots, capacity=capacity, heads=HEADS, groups=GROUPS, head_dim=DIM,
        dtype=torch.float32, device=torch.device("cpu"), pad_to=pad_to,
    )  # fmt: skip


def sequence(seed: int, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """q [T, H, D], k and v with heads enough for both kinds of layer (softmax takes the first GROUPS)."""
    torch.manual_seed(seed)
    q, k, v = (torch.randn(length, HEADS, DIM) for _ in range(3))
    return q, k, v


def expected(seed: int, length: int) -> tuple[Tensor, Tensor]:
    q, k, v = (x.double() for x in sequence(seed, length))
    lightning = lightning_attention_reference(q[None], k[None], v[None], DECAY)[0]
    keys, values = (x[:, :GROUPS].repeat_interleave(HEADS // GROUPS, dim=1) for x in (k, v))
    scores = torch.einsum("ihd,jhd->hij", q, keys) * SCALE
    scores = scores.masked_fill(torch.ones(length, length, dtype=torch.bool).triu(1), -torch.inf)
    return lightning, torch.einsum("hij,jhd->ihd", scores.softmax(-1), values)


def attend(cache: HybridCache, position_ids: Tensor, parts: list[tuple[int, int, int]]) -> tuple[Tensor, Tensor]:
    """Outputs [n, H, D] of both layers for tokens [start, stop) of the sequences `seed`; what pads is NaN-free garbage."""
    rows = [torch.cat([x[start:stop] for s, start, stop in parts for x in [sequence(s, 24)[i]]]) for i in range(3)]
    padding = position_ids.shape[1] - len(rows[0])
    q, k, v = (torch.cat([x, torch.full((padding, HEADS, DIM), 1e3)])[None] for x in rows)
    lightning = cache.lightning(LIGHTNING, q, k, v, DECAY)
    softmax = cache.softmax(SOFTMAX, q, k[:, :, :GROUPS], v[:, :, :GROUPS], scale=SCALE)
    return lightning[0, : len(rows[0])], softmax[0, : len(rows[0])]


def compare(outputs: tuple[Tensor, Tensor], parts: list[tuple[int, int, int]]) -> None:
    for kind in range(2):
        want = torch.cat([expected(seed, 24)[kind][start:stop] for seed, start, stop in parts])
        assert (outputs[kind] - want).abs().max() < 2e-5


@pytest.mark.parametrize("pad_to", [1, 4])
def test_ragged_prefill_and_decode_equal_whole_sequences(pad_to):
    cache = make(pad_to=pad_to)
    lengths = {7: 5, 8: 1, 9: 19}
    parts = [(seed, 0, length) for seed, length in lengths.items()]
    positions = cache.start_prefill(list(lengths.values()))
    assert positions[0, :25].tolist() == [*range(5), 0, *range(19)] and positions.shape[1] % pad_to == 0
    compare(attend(cache, positions, parts), parts)
    hidden = torch.arange(positions.shape[1]).view(-1, 1, 1)
    assert cache.predicting(hidden).flatten().tolist() == [4, 5, 24]
    for step in range(5):
        positions = cache.start_decode()
        parts = [(seed, length + step, length + step + 1) for seed, length in lengths.items()]
        assert positions[0, :3].tolist() == [start for _, start, _ in parts] and positions.shape[1] % pad_to == 0
        compare(attend(cache, positions, parts), parts)


def test_slots_are_refilled_without_a_trace_of_the_past():
    cache = make(slots=3)
    attend(cache, cache.start_prefill([20, 3, 6]), [(1, 0, 20), (2, 0, 3), (3, 0, 6)])
    cache.remove(0)  # sequence 3 moves to slot 0
    assert cache.lengths == [6, 3]
    parts = [(4, 0, 2)]
    compare(attend(cache, cache.start_prefill([2]), parts), parts)
    parts = [(3, 6, 7), (2, 3, 4), (4, 2, 3)]
    compare(attend(cache, cache.start_decode(), parts), parts)


def test_a_pass_of_padding_alone_touches_nothing():
    cache = make(pad_to=2)
    for positions in (cache.start_prefill([]), cache.start_decode()):
        assert positions.tolist() == [[0, 0]]
        outputs = attend(cache, positions, [(1, 0, 0)])
        assert all(len(out) == 0 for out in outputs)
        assert cache.predicting(torch.zeros(2, 1, 3)).shape == (1, 1, 3)
    parts = [(5, 0, 7)]
    compare(attend(cache, cache.start_prefill([7]), parts), parts)
