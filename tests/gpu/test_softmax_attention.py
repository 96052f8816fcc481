"""Softmax attention with log-sum-exp on CUDA: cuDNN, flash, varlen flash, and the plain path, against the formula in float64."""

import logging

import pytest
import torch
from m1_kernels import (
    choice,
    merge_attention,
    softmax_attention,
    softmax_attention_backward,
    softmax_attention_forward,
    softmax_blocks,
)

pytestmark = pytest.mark.gpu

SCALE = 0.125
HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] in (9, 10)
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


def chosen(caplog) -> list[str]:
    """Kernels of dense blocks that were logged since the last call, forward and backward."""
    names = [r.getMessage().split(": ")[1].split()[0] for r in caplog.records if "of a block on cuda" in r.getMessage()]
    caplog.clear()
    choice._log_once.cache_clear()
    return names


@pytest.fixture
def kernels(caplog):
    choice._log_once.cache_clear()
    caplog.set_level(logging.INFO, logger="m1_kernels")
    return lambda: chosen(caplog)


CASES = [(dtype, times, "auto") for dtype in BOUNDS for times in (1, 8)] + [
    (dtype, 8, "flash") for dtype in (torch.bfloat16, torch.float16)
]


@pytest.mark.parametrize("dtype, times, implementation", CASES)
def test_blocks_of_keys_with_a_merged_log_sum_exp(dtype, times: int, implementation: str, kernels) -> None:
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
    expected = "cudnn" if times == 8 and implementation == "auto" and HOPPER else "flash"
    expected = expected if dtype in softmax_blocks.HALF else "plain"
    o = lse = None
    for rows, keys, options in blocks:
        part = softmax_attention_forward(
            q[:, rows], k[:, keys], v[:, keys], scale=SCALE, implementation=implementation, **options
        )
        if o is None:
            o, lse = part[0].to(part[1].dtype), part[1]
        else:
            o[:, rows], lse[:, :, rows] = merge_attention(o[:, rows], lse[:, :, rows], *part)
    o = o.to(dtype)
    gradients = [torch.zeros_like(x, dtype=lse.dtype) for x in (q, k, v)]
    for rows, keys, options in blocks:
        parts = softmax_attention_backward(
            do[:, rows], q[:, rows], k[:, keys], v[:, keys], o[:, rows], lse[:, :, rows], scale=SCALE,
            implementation=implementation, **options,
        )  # fmt: skip
        for gradient, part, at in zip(gradients, parts, (rows, keys, keys)):
            gradient[:, at] += part
    assert kernels() == [expected, expected]
    assert_close([o, lse, *gradients], formula(q, k, v, do, visible), dtype)


@pytest.mark.skipif(not HOPPER, reason="cuDNN is taken on Hopper and datacenter Blackwell")
@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize(
    "queries, keys, key_heads", [(1024, 2048, 2), (2048, 1024, 2), (1152, 3200, 1), (1024, 1024, 8), (3072, 3072, 2)]
)
def test_cudnn_at_lengths_heads_and_strides_of_its_own(queries, keys, key_heads, width: int, kernels) -> None:
    """Half blocks of the zig-zag, tiles that are no power of two, any grouping, slices of a longer row and of a projection."""
    q, k, v, do = make(queries, keys, width, torch.bfloat16, batch=2, key_heads=key_heads)
    packed = torch.cat([k, v], dim=2)
    k, v = packed.split(key_heads, dim=2)
    longer = torch.cat([q[:, :128], q], dim=1)
    q = longer[:, 128:]
    for causal in {False, queries == keys}:
        visible = torch.ones(queries, keys, dtype=torch.bool, device="cuda")
        options = {"scale": SCALE, "causal": causal, "implementation": "cudnn"}
        o, lse = softmax_attention_forward(q, k, v, **options)
        gradients = softmax_attention_backward(do, q, k, v, o, lse, **options)
        assert_close([o, lse, *gradients], formula(q, k, v, do, visible.tril() if causal else visible), torch.bfloat16)
    assert kernels() == ["cudnn", "cudnn"]


@pytest.mark.skipif(not HOPPER, reason="cuDNN is taken on Hopper and datacenter Blackwell")
def test_cudnn_stays_finite_where_all_scores_are_very_negative() -> None:
    """Queries that point away from every key, as of a head with massive activations: exp(0 - lse) is beyond fp32."""
    q, k, v, do = make(1024, 1152, 128, torch.bfloat16)
    q[..., 0], k[..., 0] = 40, -40
    visible = torch.ones(1024, 1152, dtype=torch.bool, device="cuda")
    options = {"scale": SCALE, "causal": False, "implementation": "cudnn"}
    o, lse = softmax_attention_forward(q, k, v, **options)
    assert lse.max() < -150
    gradients = softmax_attention_backward(do, q, k, v, o, lse, **options)
    assert all(x.isfinite().all() for x in (o, *gradients))
    # without the channel of the large values, in which rounding of delta is all there is to dq
    actual, expected = [o, lse, *gradients], formula(q, k, v, do, visible)
    for results in (actual, expected):
        results[2] = results[2][..., 1:]
    assert_close(actual, expected, torch.bfloat16)


@pytest.mark.skipif(not HOPPER, reason="cuDNN is taken on Hopper and datacenter Blackwell")
def test_deterministic_algorithms_rule_cudnn_out_and_repeat(kernels) -> None:
    q, k, v, do = make(2048, 2048, 128, torch.bfloat16)
    torch.use_deterministic_algorithms(True)
    try:
        runs = [with_gradients(q, k, v, do) for _ in range(2)]
    finally:
        torch.use_deterministic_algorithms(False)
    assert kernels() == ["flash", "flash"]
    assert all(torch.equal(a, b) for a, b in zip(*runs))
    with_gradients(q, k, v, do)
    assert kernels() == ["cudnn", "cudnn"]


@pytest.mark.skipif(not HOPPER, reason="cuDNN is taken on Hopper and datacenter Blackwell")
def test_cudnn_neither_waits_for_the_gpu_nor_keeps_a_graph_from_being_captured(kernels) -> None:
    q, k, v, do = make(1024, 2048, 128, torch.bfloat16)

    def run() -> list[torch.Tensor]:
        o, lse = softmax_attention_forward(q, k, v, scale=SCALE, causal=False)
        return [o, lse, *softmax_attention_backward(do, q, k, v, o, lse, scale=SCALE, causal=False)]

    expected = run()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    graph.replay()
    assert kernels() == ["cudnn", "cudnn"]
    assert_close(captured, [x.double() for x in expected], torch.bfloat16)


@pytest.mark.skipif(not HOPPER, reason="cuDNN is taken on Hopper and datacenter Blackwell")
def test_dense_layers_without_context_parallelism_run_cudnn_as_well() -> None:
    q, k, v, _ = make(2048, 2048, 128, torch.bfloat16)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as trace:
        softmax_attention(q, k, v, scale=SCALE)
    assert "aten::_scaled_dot_product_cudnn_attention" in {event.key for event in trace.key_averages()}
