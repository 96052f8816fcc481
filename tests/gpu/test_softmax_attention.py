"""Softmax attention with log-sum-exp on CUDA: flash, varlen flash, and the plain path, against the formula in float64."""

import pytest
import torch
from m1_kernels import (
    merge_attention,
    softmax_attention,
    softmax_attention_backward,
    softmax_attention_forward,
    softmax_blocks,
)

pytestmark = pytest.mark.gpu

SCALE = 0.125
HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)
BOUNDS = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-5, torch.float64: 1e-12}
"""||a - b|| / ||b||."""


def make(queries: int, keys: int, width: int, dtype: torch.dtype, batch: int = 1, heads: int = 8, key_heads: int = 2):
    generator = torch.Generator().manual_seed(queries + keys)
    shapes = [(queries, heads), (keys, key_heads), (keys, key_heads), (queries, heads)]
    tensors = [torch.randn(batch, *shape, width, generator=generator, dtype=torch.float64) for shape in shapes]
    return [x.to("cuda", dtype) for x in tensors]


def formula(q, k, v, do, visible: torch.Tensor) -> list[torch.Tensor]:
    """o, lse, dq, dk, dv in float64."""
    q, k, v = inputs = [x.detach().double().requires_grad_() for x in (q, k, v)]
    group = q.shape[2] // k.shape[2]
    scores = torch.einsum("bihd,bjhd->bhij", q, k.repeat_interleave(group, 2)) * SCALE
    scores = scores.masked_fill(~visible, -torch.inf)
    o = torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v.repeat_interleave(group, 2))
    return [o.detach(), scores.logsumexp(-1).detach(), *torch.autograd.grad(o, inputs, do.double())]


def assert_close(actual, expected, dtype: torch.dtype) -> None:
    for name, a, b in zip(("o", "lse", "dq", "dk", "dv"), actual, expected, strict=True):
        a = a.detach()
        assert a.shape == b.shape and a.isfinite().all(), name
        # queries with a single key have dq = 0, and rounding in its place
        error = float((a.double() - b).norm() / b.norm().clamp_min(0.05 * b.numel() ** 0.5))
        assert error <= BOUNDS[dtype], (name, error)


def with_gradients(q, k, v, do, **options) -> list[torch.Tensor]:
    inputs = [x.detach().requires_grad_() for x in (q, k, v)]
    o, lse = softmax_attention(*inputs, scale=SCALE, return_lse=True, **options)
    assert lse.dtype == (torch.float64 if q.dtype == torch.float64 else torch.float32)
    return [o, lse, *torch.autograd.grad(o, inputs, do)]


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("width", [64, 128, 96, 7])
@pytest.mark.parametrize("queries, keys", [(130, 130), (5, 130), (1, 130), (1, 1)])
def test_dense(queries: int, keys: int, width: int, dtype: torch.dtype) -> None:
    tensors = make(queries, keys, width, dtype, batch=2)
    for causal in (True, False):
        visible = torch.ones(queries, keys, dtype=torch.bool, device="cuda")
        visible = visible.tril(keys - queries) if causal else visible
        assert_close(with_gradients(*tensors, causal=causal), formula(*tensors, visible), dtype)


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("edges", [[0, 100, 100, 101, 300], list(range(301))])
def test_pack_with_poisoned_padding(edges: list[int], dtype: torch.dtype) -> None:
    tensors = make(310, 310, 128, dtype)
    for x in tensors[:3]:
        x[:, 300:] = float("nan")
    cu_seqlens = torch.tensor(edges, dtype=torch.int32, device="cuda")
    longest = int(cu_seqlens.diff().max())
    actual = with_gradients(*tensors, cu_seqlens=cu_seqlens, max_seqlen=longest)
    document = torch.bucketize(torch.arange(300, device="cuda"), cu_seqlens[1:], right=True)
    visible = (document[:, None] == document).tril()
    expected = formula(*(x[:, :300] for x in tensors), visible)
    o, lse, *gradients = actual
    assert (lse[:, :, 300:] == -torch.inf).all()
    for x in (o, *gradients):
        assert (x[:, 300:] == 0).all()
    assert_close([o[:, :300], lse[:, :, :300], *(x[:, :300] for x in gradients)], expected, dtype)


def test_pack_in_half_precision_does_not_wait_for_the_gpu() -> None:
    tensors = make(310, 310, 128, torch.bfloat16)
    cu_seqlens = torch.tensor([0, 100, 101, 300], dtype=torch.int32, device="cuda")
    with_gradients(*tensors, cu_seqlens=cu_seqlens, max_seqlen=199)
    torch.cuda.set_sync_debug_mode("error")
    try:
        with_gradients(*tensors, cu_seqlens=cu_seqlens, max_seqlen=199)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("cudnn", [False, True])
@pytest.mark.parametrize("times", [1, 8])
@pytest.mark.parametrize("dtype", BOUNDS)
def test_blocks_of_keys_with_a_merged_log_sum_exp(dtype: torch.dtype, times: int, cudnn: bool) -> None:
    """A causal block, a full one over a part of the queries, and a pack with other lengths; long enough for cuDNN, or not."""
    n = [times * x for x in range(449)]
    q, k, v, do = make(n[192], n[448], 128, dtype)
    ends = [0, n[92], n[192]], [0, n[30], n[128]]
    edges_q, edges_k = (torch.tensor(x, dtype=torch.int32, device="cuda") for x in ends)
    pack = {"cu_seqlens_q": edges_q, "cu_seqlens_k": edges_k, "max_seqlen_q": n[100], "max_seqlen_k": n[98]}
    visible = torch.zeros(n[192], n[448], dtype=torch.bool, device="cuda")
    visible[:, : n[192]] = torch.ones(n[192], n[192], dtype=torch.bool, device="cuda").tril()
    visible[n[64] :, n[192] : n[320]] = True
    visible[: n[92], n[320] : n[350]] = True
    visible[n[92] :, n[350] :] = True
    blocks = [
        (slice(0, n[192]), slice(0, n[192]), {"causal": True}),
        (slice(n[64], n[192]), slice(n[192], n[320]), {"causal": False}),
        (slice(0, n[192]), slice(n[320], n[448]), {"causal": False, **pack}),
    ]
    dense = softmax_blocks._cudnn_takes(q[:, : n[128]], k[:, : n[128]], v[:, : n[128]], False)
    assert dense == (times == 8 and dtype in (torch.bfloat16, torch.float16) and HOPPER)
    o = lse = None
    for rows, keys, options in blocks:
        part = softmax_attention_forward(q[:, rows], k[:, keys], v[:, keys], scale=SCALE, cudnn=cudnn, **options)
        if o is None:
            o, lse = part[0].to(part[1].dtype), part[1]
        else:
            o[:, rows], lse[:, :, rows] = merge_attention(o[:, rows], lse[:, :, rows], *part)
    o = o.to(dtype)
    gradients = [torch.zeros_like(x, dtype=lse.dtype) for x in (q, k, v)]
    for rows, keys, options in blocks:
        parts = softmax_attention_backward(
            do[:, rows], q[:, rows], k[:, keys], v[:, keys], o[:, rows], lse[:, :, rows], scale=SCALE, cudnn=cudnn,
            **options,
        )  # fmt: skip
        for gradient, part, at in zip(gradients, parts, (rows, keys, keys)):
            gradient[:, at] += part
    assert_close([o, lse, *gradients], formula(q, k, v, do, visible), dtype)
