"""Softmax attention against the formula in float64."""

import logging

import pytest
import torch
from m1_kernels import choice, softmax_attention, softmax_blocks
from m1_kernels.softmax_blocks import merge_attention, softmax_attention_backward, softmax_attention_forward
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

SCALE = 0.3


def formula(q, k, v, causal: bool) -> torch.Tensor:
    return formula_with_lse(q, k, v, causal)[0]


def formula_with_lse(q, k, v, causal: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """softmax(scale * q k^T) v and log sum exp, query heads grouped over key heads, queries at the end of the keys."""
    group = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(group, dim=2), v.repeat_interleave(group, dim=2)
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * SCALE
    if causal:
        visible = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).tril(k.shape[1] - q.shape[1])
        scores = scores.masked_fill(~visible, float("-inf"))
    return torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v), scores.logsumexp(-1)


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


@pytest.fixture(params=["flash", "plain"])
def kernel(request, monkeypatch) -> str:
    """CPU's flash kernel, and the matrix products that CUDA takes where flash cannot run, in slabs of a few queries."""
    if request.param == "plain":
        forward, backward = softmax_blocks._plain_forward, softmax_blocks._plain_backward
        monkeypatch.setattr(softmax_blocks, "_block_forward", lambda *x: forward(*x[:-1]))
        monkeypatch.setattr(softmax_blocks, "_block_backward", lambda *x: backward(*x[:-1]))
        monkeypatch.setattr(softmax_blocks, "SCORES_AT_ONCE", 150)
    return request.param


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("queries, keys, key_heads", [(9, 9, 2), (9, 9, 4), (1, 7, 1), (3, 7, 2), (1, 1, 4)])
def test_log_sum_exp_and_gradients_of_its_path(queries, keys, key_heads, causal, kernel) -> None:
    inputs = make(queries, keys, key_heads=key_heads)
    o, lse = softmax_attention(*inputs, scale=SCALE, causal=causal, return_lse=True)
    expected, expected_lse = formula_with_lse(*inputs, causal)
    torch.testing.assert_close(o, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-12, atol=1e-12)
    gradient = torch.randn_like(o)
    for actual, wanted in zip(
        torch.autograd.grad(o, inputs, gradient), torch.autograd.grad(expected, inputs, gradient)
    ):
        torch.testing.assert_close(actual, wanted, rtol=1e-11, atol=1e-11)


def test_log_sum_exp_of_a_pack(kernel) -> None:
    inputs = make(13, 13, batch=1)
    with torch.no_grad():
        for x in inputs:
            x[:, 11:] = float("nan")
    cu_seqlens = torch.tensor([0, 4, 4, 5, 11], dtype=torch.int32)
    o, lse = softmax_attention(*inputs, scale=SCALE, cu_seqlens=cu_seqlens, return_lse=True)
    torch.testing.assert_close(o, softmax_attention(*inputs, scale=SCALE, cu_seqlens=cu_seqlens), rtol=0, atol=1e-12)
    for start, end in ((0, 4), (4, 5), (5, 11)):
        alone = formula_with_lse(*(x[:, start:end] for x in inputs), True)[1]
        torch.testing.assert_close(lse[:, :, start:end], alone, rtol=1e-12, atol=1e-12)
    assert (lse[:, :, 11:] == -torch.inf).all()
    gradient = torch.randn_like(o)
    actual = torch.autograd.grad(o, inputs, gradient)
    wanted = torch.autograd.grad(softmax_attention(*inputs, scale=SCALE, cu_seqlens=cu_seqlens), inputs, gradient)
    for x, y in zip(actual, wanted):
        torch.testing.assert_close(x, y, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-6), (torch.bfloat16, 8e-3), (torch.float16, 1e-3)])
def test_log_sum_exp_is_fp32_below_fp64(dtype, bound, kernel) -> None:
    inputs = [x.detach().to(dtype) for x in make(9, 9)]
    o, lse = softmax_attention(*inputs, scale=SCALE, return_lse=True)
    expected, expected_lse = formula_with_lse(*(x.double() for x in inputs), True)
    assert o.dtype == dtype and lse.dtype == torch.float32
    # PyTorch's CPU kernel approximates exp for half precision
    torch.testing.assert_close(lse.double(), expected_lse, rtol=0, atol=2e-6 if dtype == torch.float32 else 2e-4)
    torch.testing.assert_close(o.double(), expected, rtol=bound, atol=bound)


def test_gradient_of_log_sum_exp_is_refused() -> None:
    inputs = make(5, 5)
    o, lse = softmax_attention(*inputs, scale=SCALE, return_lse=True)
    with pytest.raises(NotImplementedError, match="lse of softmax_attention has no gradient"):
        (o.sum() + lse.sum()).backward()


def test_blocks_of_keys_merge_forward_and_backward(kernel) -> None:
    """Two blocks of keys, packed with different cuts of queries and keys, give what all keys give at once."""
    q, k, v = make(6, 10, batch=1)
    expected, expected_lse = formula_with_lse(q, k, v, False)
    do = torch.randn_like(expected)
    whole = torch.tensor([0, 6], dtype=torch.int32)
    blocks = [(slice(0, 3), {}), (slice(3, 10), {"cu_seqlens_q": whole, "cu_seqlens_k": whole + whole.sign()})]
    with torch.no_grad():
        o = lse = None
        for keys, pack in blocks:
            part = softmax_attention_forward(q, k[:, keys], v[:, keys], scale=SCALE, causal=False, **pack)
            o, lse = part if o is None else merge_attention(o, lse, *part)
        torch.testing.assert_close(o, expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(lse, expected_lse, rtol=1e-12, atol=1e-12)
        parts = [
            softmax_attention_backward(do, q, k[:, keys], v[:, keys], o, lse, scale=SCALE, causal=False, **pack)
            for keys, pack in blocks
        ]
    dq, dk, dv = torch.autograd.grad(expected, (q, k, v), do)
    torch.testing.assert_close(sum(part[0] for part in parts), dq, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(torch.cat([part[1] for part in parts], 1), dk, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(torch.cat([part[2] for part in parts], 1), dv, rtol=1e-11, atol=1e-11)


FUSED = {
    "aten._scaled_dot_product_cudnn_attention.default": "cudnn",
    "aten._scaled_dot_product_cudnn_attention_backward.default": "cudnn",
    "aten._flash_attention_forward.default": "flash",
    "aten._flash_attention_backward.default": "flash",
}


class Fused(TorchDispatchMode):
    """Notes the fused kernels that are called, and with `causal` what each was told about the mask."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: list[str] = []
        self.causal: list[bool] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if str(function) in FUSED:
            self.kernels.append(FUSED[str(function)])
            named = dict(zip((argument.name for argument in function._schema.arguments), args))
            self.causal.append(named.get("is_causal", False))  # a default is left out of args
        return function(*args, **(kwargs or {}))


@pytest.fixture
def hopper(monkeypatch) -> None:
    """A Hopper GPU as far as the choice of a kernel goes; with fake tensors torch checks the calls, and nothing runs."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: softmax_blocks.CUDNN_VERSION)
    monkeypatch.setattr(torch.backends.cuda, "can_use_cudnn_attention", lambda block: True)


def fused_kernels(
    queries=2048, keys=1024, heads=8, width=128, dtype=torch.bfloat16, causal=False, pack=False, **options
) -> Fused:
    """Of a forward and a backward pass on fake CUDA tensors."""
    with FakeTensorMode(), Fused() as fused:
        q, do = torch.empty(2, 1, queries, heads, width, dtype=dtype, device="cuda")
        k, v = torch.empty(2, 1, keys, 2, width, dtype=dtype, device="cuda")
        if pack:
            edges = torch.empty(3, dtype=torch.int32, device="cuda")
            options |= {"cu_seqlens_q": edges, "cu_seqlens_k": edges, "max_seqlen_q": 1024, "max_seqlen_k": 1024}
        o, lse = softmax_attention_forward(q, k, v, scale=SCALE, causal=causal, **options)
        assert (o.shape, o.dtype, lse.shape, lse.dtype) == (q.shape, dtype, (1, heads, queries), torch.float32)
        gradients = softmax_attention_backward(do, q, k, v, o, lse, scale=SCALE, causal=causal, **options)
        assert [(x.shape, x.dtype) for x in gradients] == [(x.shape, dtype) for x in (q, k, v)]
    return fused


@pytest.mark.parametrize(
    "block, kernel",
    [
        ({}, "cudnn"),
        ({"queries": 1024, "dtype": torch.float16, "causal": True}, "cudnn"),
        ({"queries": 512}, "flash"),
        ({"keys": 512}, "flash"),
        ({"queries": 512, "implementation": "cudnn"}, "cudnn"),
        ({"queries": 2048 + 64}, "flash"),
        ({"keys": 1024 + 64}, "flash"),
        ({"width": 136}, "flash"),
        ({"width": 100}, None),
        ({"dtype": torch.float32}, None),
        ({"queries": 2**18, "heads": 64}, "flash"),
        ({"queries": 2**17, "heads": 64}, "cudnn"),
        ({"keys": 2**23}, "flash"),
        ({"keys": 2**22}, "cudnn"),
        ({"implementation": "flash"}, "flash"),
        ({"implementation": "plain"}, None),
        ({"pack": True}, "flash"),
    ],
)
def test_cudnn_computes_long_dense_blocks(block: dict, kernel: str | None, hopper) -> None:
    assert fused_kernels(**block).kernels == ([kernel] * 2 if kernel else [])


@pytest.mark.parametrize(
    "module, name, answer",
    [
        (torch.cuda, "get_device_capability", (8, 0)),
        (torch.cuda, "get_device_capability", (12, 0)),
        (torch.backends.cudnn, "version", 91002),
        (torch.backends.cudnn, "version", None),
        (torch.backends.cuda, "can_use_cudnn_attention", False),
    ],
)
def test_flash_takes_over_where_cudnn_may_not(module, name: str, answer, hopper, monkeypatch) -> None:
    monkeypatch.setattr(module, name, lambda *x: answer)
    assert fused_kernels().kernels == ["flash", "flash"]
    with pytest.raises(ValueError, match=r"implementation='cudnn' cannot run: .*; implementation='auto' picks another"):
        fused_kernels(implementation="cudnn")


def test_keys_before_the_queries_are_a_block_of_their_own(hopper) -> None:
    fused = fused_kernels(queries=1024, keys=3072, causal=True)
    assert fused.kernels == ["cudnn"] * 4 and fused.causal == [False, True] * 2


def test_choices_are_logged_once(hopper, caplog) -> None:
    choice._log_once.cache_clear()
    with caplog.at_level(logging.INFO, logger="m1_kernels"):
        for _ in range(2):
            fused_kernels()
            fused_kernels(queries=512)
    operators = "softmax attention of a block", "gradients of softmax attention of a block"
    assert [record.getMessage() for record in caplog.records] == [
        f"{operator} on cuda: {name} ({softmax_blocks.WHY[name]})"
        for name in ("cudnn", "flash")
        for operator in operators
    ]


def test_implementations_that_cannot_run_are_refused(hopper) -> None:
    x = torch.zeros(1, 4, 2, 8)
    edges = torch.tensor([0, 4], dtype=torch.int32)
    pack = {"cu_seqlens_q": edges, "cu_seqlens_k": edges}
    for options, message in (
        (
            {"implementation": "cudnn"},
            "'cudnn' cannot run: it takes float16 and bfloat16 on cuda, not torch.float32 on cpu",
        ),
        ({"implementation": "plain"}, "'plain' cannot run: it runs on cuda, not cpu"),
        ({"implementation": "fast"}, "'fast' is not available; use one of auto, cudnn, flash, plain"),
        (pack | {"implementation": "cudnn"}, "'cudnn' takes dense blocks, no cu_seqlens"),
        (pack | {"implementation": "plain"}, "'plain' cannot run: it runs on cuda, not cpu"),
    ):
        with pytest.raises(ValueError, match=message):
            softmax_attention_forward(x, x, x, scale=SCALE, causal=True, **options)
        with pytest.raises(ValueError, match=message):
            softmax_attention_backward(x, x, x, x, x, x[..., 0].mT, scale=SCALE, causal=True, **options)
    with pytest.raises(
        ValueError, match=r"'flash' cannot run: it takes float16 and bfloat16 on cuda, not torch\.float32"
    ):
        fused_kernels(dtype=torch.float32, implementation="flash")


@pytest.mark.parametrize(
    "queries, keys, message",
    [
        ((1, 4, 3, 8), (1, 4, 2, 8), "2 key/value heads must divide 3 query heads"),
        ((1, 4, 2, 8), (1, 3, 2, 8), "T=4 queries must not outnumber Tk=3 keys"),
        ((1, 4, 2, 8), (1, 4, 2, 16), r"q \(1, 4, 2, 8\) must be \[B, T, Hq, D\]"),
    ],
)
def test_blocks_that_do_not_fit_are_refused(queries: tuple[int, ...], keys: tuple[int, ...], message: str) -> None:
    q, k = torch.zeros(queries), torch.zeros(keys)
    with pytest.raises(ValueError, match=message):
        softmax_attention_forward(q, k, k, scale=SCALE, causal=True)
    with pytest.raises(ValueError, match=message):
        softmax_attention_backward(q, q, k, k, q, q[..., 0].mT, scale=SCALE, causal=True)


@pytest.mark.parametrize("queries, keys", [(0, 0), (0, 5), (3, 0)])
def test_blocks_without_queries_or_keys(queries: int, keys: int) -> None:
    q, k = torch.ones(2, queries, 2, 8), torch.ones(2, keys, 2, 8)
    o, lse = softmax_attention_forward(q, k, k, scale=SCALE, causal=False)
    assert o.shape == q.shape and lse.shape == (2, 2, queries) and not o.any() and (lse == -torch.inf).all()
    for x, gradient in zip((q, k, k), softmax_attention_backward(q, q, k, k, o, lse, scale=SCALE, causal=False)):
        assert gradient.shape == x.shape and not gradient.any()


def test_merging_into_rows_without_keys_takes_the_block() -> None:
    o, lse = torch.zeros(1, 3, 2, 4), torch.full((1, 2, 3), -torch.inf)
    block = torch.randn(1, 3, 2, 4), torch.randn(1, 2, 3)
    for actual, wanted in zip(merge_attention(o, lse, *block), block):
        torch.testing.assert_close(actual, wanted, rtol=0, atol=0)


def test_lengths_that_change_before_the_backward_are_noticed() -> None:
    inputs, cu_seqlens = make(6, 6, batch=1), torch.tensor([0, 2, 6], dtype=torch.int32)
    o, _ = softmax_attention(*inputs, scale=SCALE, cu_seqlens=cu_seqlens, return_lse=True)
    cu_seqlens[1] = 4
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        o.sum().backward()


def test_wrong_shapes_are_refused() -> None:
    q, k, v = make(5, 5)
    refused = [
        ((q, k, v[:, :3]), {}, "must be"),
        ((q[:, :, :3], k, v), {}, "must divide 3 query heads"),
        ((q, k[:, :3], v[:, :3]), {}, "must not outnumber"),
        ((q, k, v), {"cu_seqlens": torch.tensor([0, 5])}, "cu_seqlens needs B=1"),
        ((q[:1], k[:1], v[:1]), {"cu_seqlens": torch.tensor(5)}, r"must be int32 \[S\+1\]"),
        ((q[:1], k[:1], v[:1]), {"cu_seqlens": torch.tensor([0, 5], device="meta")}, "cu_seqlens on meta"),
    ]
    for arguments, options, message in refused:
        with pytest.raises(ValueError, match=message):
            softmax_attention(*arguments, scale=SCALE, **options)
