"""Softmax attention against the formula in float64."""

import pytest
import torch
from m1_kernels import softmax_attention
from torch.profiler import ProfilerActivity, profile

SCALE = 0.3


def formula(q, k, v, causal: bool) -> torch.Tensor:
    """softmax(scale * q k^T) v, query heads grouped over key heads, queries at the end of the keys."""
    group = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(group, dim=2), v.repeat_interleave(group, dim=2)
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * SCALE
    if causal:
        visible = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).tril(k.shape[1] - q.shape[1])
        scores = scores.masked_fill(~visible, float("-inf"))
    return torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v)


def make(queries: int, keys: int, batch: int = 2, query_heads: int = 4, key_heads: int = 2) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(queries * 100 + keys)
    shapes = [(queries, query_heads), (keys, key_heads), (keys, key_heads)]
    return [
        torch.randn(batch, *shape, 8, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes
    ]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("queries, keys, key_heads", [(9, 9, 2), (9, 9, 4), (9, 9, 1), (1, 7, 2), (3, 7, 2), (1, 1, 4)])
def test_dense_forward_and_backward(queries: int, keys: int, key_heads: int, causal: bool) -> None:
    inputs = make(queries, keys, key_heads=key_heads)
    o = softmax_attention(*inputs, scale=SCALE, causal=causal)
    expected = formula(*inputs, causal)
    torch.testing.assert_close(o, expected, rtol=1e-10, atol=1e-10)
    gradient = torch.randn_like(o)
    for actual, wanted in zip(
        torch.autograd.grad(o, inputs, gradient), torch.autograd.grad(expected, inputs, gradient)
    ):
        torch.testing.assert_close(actual, wanted, rtol=1e-9, atol=1e-9)


def test_packed_documents_are_separate_and_padding_is_not_read() -> None:
    lengths = [4, 0, 1, 6]
    inputs = make(13, 13, batch=1)
    with torch.no_grad():
        for x in inputs:
            x[:, 11:] = float("nan")
    cu_seqlens = torch.tensor([0, 4, 4, 5, 11], dtype=torch.int32)
    o = softmax_attention(*inputs, scale=SCALE, cu_seqlens=cu_seqlens)
    expected = torch.cat(
        [
            formula(*parts, True)
            for parts in zip(*(x[:, :11].split(lengths, dim=1) for x in inputs))
            if parts[0].numel()
        ],
        dim=1,
    )
    torch.testing.assert_close(o[:, :11], expected, rtol=1e-10, atol=1e-10)
    assert torch.equal(o[:, 11:], torch.zeros_like(o[:, 11:]))
    gradient = torch.randn_like(o)
    actual = torch.autograd.grad(o, inputs, gradient)
    wanted = torch.autograd.grad(expected, inputs, gradient[:, :11])
    for x, y in zip(actual, wanted):
        torch.testing.assert_close(x[:, :11], y[:, :11], rtol=1e-9, atol=1e-9)
        assert torch.equal(x[:, 11:], torch.zeros_like(x[:, 11:]))


@pytest.mark.parametrize("packed", [False, True])
def test_cpu_runs_the_flash_kernel_without_copies(packed: bool) -> None:
    qkv = torch.randn(1, 64, 8, 16)
    q, k, v = qkv.split([4, 2, 2], dim=2)
    cu_seqlens = torch.tensor([0, 40, 64], dtype=torch.int32) if packed else None
    with profile(activities=[ProfilerActivity.CPU]) as trace:
        softmax_attention(q, k, v, scale=SCALE, cu_seqlens=cu_seqlens)
    operators = {event.key for event in trace.key_averages()}
    assert "aten::_scaled_dot_product_flash_attention_for_cpu" in operators
    copies = {"aten::repeat_interleave", "aten::contiguous", "aten::clone", "aten::copy_", "aten::bmm"}
    assert not operators & copies


def test_wrong_shapes_are_refused() -> None:
    q, k, v = make(5, 5)
    refused = [
        ((q, k, v[:, :3]), {}, "must be"),
        ((q[:, :, :3], k, v), {}, "must divide 3 query heads"),
        ((q, k[:, :3], v[:, :3]), {}, "must not outnumber"),
        ((q, k, v), {"cu_seqlens": torch.tensor([0, 5])}, "cu_seqlens needs B=1"),
    ]
    for arguments, options, message in refused:
        with pytest.raises(ValueError, match=message):
            softmax_attention(*arguments, scale=SCALE, **options)
