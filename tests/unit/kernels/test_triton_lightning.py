"""The Triton kernels of lightning attention: in the interpreter without a GPU, compiled where there is one."""

import functools
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from m1_kernels import lightning_attention, lightning_attention_packed, slopes, triton_attention
from m1_kernels.chunked import lightning_attention_chunked
from m1_kernels.triton_attention import CHUNK, lightning_state_triton

from tests.unit.kernels.checks import Case, Inputs, assert_matches_oracle, head_errors, make_inputs, oracle, run

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FLOAT32_BOUND = 1e-6
# The interpreter truncates where a GPU rounds to bfloat16.
HALF_BOUND = {torch.bfloat16: 2.5e-3 if DEVICE == "cuda" else 8e-3, torch.float16: 4e-4}
C = 32  # chunk of the float32 kernels
RAGGED = (5, 0, C + 3, 1, 2 * C, 0, 100)


@pytest.fixture(autouse=True)
def short_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_attention, "SEGMENT", CHUNK)


def triton_with(strategy: str) -> Callable:
    """lightning_attention on the Triton kernels, its tensors moved to their device and back."""

    def operator(q, k, v, slopes, *, initial_state=None, cu_seqlens=None, **options):
        there = [x.to(DEVICE) for x in (q, k, v, slopes)]
        moved = [None if x is None else x.to(DEVICE) for x in (initial_state, cu_seqlens)]
        results = lightning_attention(
            *there, initial_state=moved[0], cu_seqlens=moved[1], implementation="triton", strategy=strategy, **options
        )
        return results.to(q.device) if torch.is_tensor(results) else tuple(x.to(q.device) for x in results)

    return operator


@pytest.mark.parametrize("strategy", ["fused", "segmented"])
@pytest.mark.parametrize("tokens", [1, C - 1, C, C + 1, 4 * C + 1])
def test_dense_lengths(tokens: int, strategy: str) -> None:
    assert_matches_oracle(triton_with(strategy), Case(tokens=tokens, batch=2), FLOAT32_BOUND)


@pytest.mark.parametrize("strategy", ["fused", "segmented", "auto"])
@pytest.mark.parametrize("with_states", [False, True])
def test_packed_documents_with_padding_behind(strategy: str, with_states: bool) -> None:
    case = Case(tokens=sum(RAGGED) + 40, documents=RAGGED, with_states=with_states)
    assert_matches_oracle(triton_with(strategy), case, FLOAT32_BOUND)


@pytest.mark.parametrize("documents", [(0, 0), (0, 0, 40)])
def test_empty_documents(documents: tuple[int, ...]) -> None:
    case = Case(tokens=sum(documents), documents=documents)
    assert_matches_oracle(triton_with("segmented"), case, FLOAT32_BOUND)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("strategy, dim", [("fused", 96), ("segmented", 64)])
def test_half_precision(dtype: torch.dtype, strategy: str, dim: int) -> None:
    case = Case(tokens=2 * CHUNK + 9, heads=1, dim=dim, dtype=dtype)
    results = run(triton_with(strategy), case, make_inputs(case))
    assert results["o"].dtype == results["dq"].dtype == dtype
    assert results["final_state"].dtype == torch.float32
    assert_matches_oracle(triton_with(strategy), case, HALF_BOUND[dtype])


def test_more_value_blocks_than_one() -> None:
    assert_matches_oracle(triton_with("segmented"), Case(tokens=70, heads=1, dim=128), FLOAT32_BOUND)


def test_widest_heads() -> None:
    assert_matches_oracle(triton_with("fused"), Case(tokens=C + 1, heads=1, dim=256), FLOAT32_BOUND)


@pytest.mark.parametrize("strategy", ["fused", "segmented"])
@pytest.mark.parametrize("tokens", [2, 2 * C + 1])
def test_short_lengths_of_one_head(tokens: int, strategy: str) -> None:
    assert_matches_oracle(triton_with(strategy), Case(tokens=tokens, heads=1), FLOAT32_BOUND)


def test_four_thousand_tokens() -> None:
    case = Case(tokens=4097, heads=1, dtype=torch.float16, layer=78, layers=80)
    inputs = make_inputs(case)
    exact = Inputs(*(x.double() for x in (inputs.qkv, inputs.initial, inputs.do, inputs.dfinal)))
    expected = run(lightning_attention_chunked, replace(case, dtype=torch.float64), exact)
    for name, actual in run(triton_with("fused"), case, inputs).items():
        assert head_errors(actual, expected[name], 1 if "state" in name else 2).max() <= HALF_BOUND[torch.float16], name


@pytest.mark.parametrize("layer", [0, 40, 78])
def test_slopes_of_m1_layers(layer: int) -> None:
    """The first, the last and two more of M1's 64 heads."""
    case = Case(tokens=C + 9, heads=4, layer=layer, layers=80, out_of=64)
    assert_matches_oracle(triton_with("segmented"), case, FLOAT32_BOUND)


@pytest.mark.parametrize("strategy", ["fused", "segmented"])
def test_error_is_that_of_rounding_the_results(strategy: str) -> None:
    """At most 1.5 times that of a float32 computation on the same float16 inputs; bfloat16 is truncated in the interpreter."""
    case = Case(tokens=2 * CHUNK + 9, heads=2, dim=32, dtype=torch.float16, layer=40, layers=80, out_of=64)
    inputs = make_inputs(case)
    ours, rounded = (run(operator, case, inputs) for operator in (triton_with(strategy), lightning_attention_chunked))
    for name, exact in oracle(case).items():
        head = 1 if "state" in name else 2
        bound = 1e-5 if "state" in name else 1.5 * head_errors(rounded[name], exact, head)
        assert (head_errors(ours[name], exact, head) <= bound).all(), name


@functools.cache
def pack() -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(3)
    tokens = 4 * CHUNK
    qkv = torch.randn(1, tokens, 2, 3 * 16, generator=generator).bfloat16().to(DEVICE)
    return (*qkv.split(16, dim=-1), slopes(2, 0, 8).to(DEVICE))


def attend(q, k, v, decay, **options):
    return lightning_attention(q, k, v, decay, implementation="triton", return_final_state=True, **options)


def gradients(q, k, v, decay, **options) -> list[torch.Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    o, final = attend(*leaves, decay, **options)
    (o.float().square().sum() + final.square().sum()).backward()
    return [o.detach(), *(x.grad for x in leaves)]


@pytest.mark.parametrize("strategy, documents", [("fused", (37, 300, 250)), ("segmented", (37, 0, 133, 1, 40))])
def test_a_packed_document_is_bitwise_the_same_alone(
    strategy: str, documents: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """So few processors that a span which filled them would be longer in the pack than in its documents."""
    monkeypatch.setattr(triton_attention._Call, "processors", 1)
    if strategy == "fused":
        monkeypatch.setattr(triton_attention, "SEGMENT", 4096)
    case = Case(tokens=sum(documents), heads=1, documents=documents, dtype=torch.bfloat16)
    inputs = make_inputs(case)
    packed = run(triton_with(strategy), case, inputs)
    longest = documents.index(max(documents))
    for document in {longest, len(documents) - 2}:
        first, length = sum(documents[:document]), documents[document]
        span, one = slice(first, first + length), slice(document, document + 1)
        own = Inputs(inputs.qkv[:, span], inputs.initial[one], inputs.do[:, span], inputs.dfinal[one])
        alone = run(triton_with(strategy), replace(case, tokens=length, documents=None), own)
        for name, expected in alone.items():
            assert torch.equal(packed[name][one] if "state" in name else packed[name][:, span], expected), name


@pytest.mark.parametrize("strategy", ["segmented", "auto"])
def test_runs_repeat_bitwise(strategy: str) -> None:
    for once, again in zip(gradients(*pack(), strategy=strategy), gradients(*pack(), strategy=strategy), strict=True):
        assert torch.equal(once, again)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("strategy", ["fused", "segmented"])
def test_a_resumed_prefill_is_bitwise_the_whole_one(strategy: str, dtype: torch.dtype) -> None:
    """Cut at a multiple of CHUNK; segmented, of SEGMENT, which is the same here."""
    q, k, v, decay = pack()
    q, k, v = (x.to(dtype) for x in (q, k, v))
    whole, final = attend(q, k, v, decay, strategy=strategy)
    cut = 3 * CHUNK
    head, state = attend(*(x[:, :cut] for x in (q, k, v)), decay, strategy=strategy)
    tail, resumed = attend(*(x[:, cut:] for x in (q, k, v)), decay, strategy=strategy, initial_state=state)
    assert torch.equal(torch.cat([head, tail], dim=1), whole)
    assert torch.equal(resumed, final)


@pytest.mark.parametrize("strategy", ["fused", "segmented"])
def test_nan_of_neighbours_and_padding_stays_there(strategy: str) -> None:
    """In inputs, states and output gradients, and in new memory, which deterministic algorithms fill; the rest keeps its bits."""
    documents, last = (40, 1, 70), 111
    case = Case(tokens=last + 9, heads=1, documents=documents, dtype=torch.bfloat16)
    inputs = make_inputs(case)
    clean = run(triton_with(strategy), case, inputs)
    for x in (inputs.qkv, inputs.do):
        x[:, 40] = x[:, last:] = float("nan")
    for x in (inputs.initial, inputs.dfinal):
        x[1] = float("nan")
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(1).isnan()
        dirty = run(triton_with(strategy), case, inputs)
    finally:
        torch.use_deterministic_algorithms(False)
    for name, x in dirty.items():
        assert x.isnan().any(), name
        if "state" in name:
            assert torch.equal(x[[0, 2]], clean[name][[0, 2]]), name
        else:
            assert torch.equal(x[:, :40], clean[name][:, :40]), name
            assert torch.equal(x[:, 41:last], clean[name][:, 41:last]), name
            assert not x[:, last:].any(), name


def test_the_backward_keeps_the_inputs_and_one_state_per_span() -> None:
    qkv = torch.randn(1, 3 * CHUNK, 1, 48, device=DEVICE, requires_grad=True)
    decay = slopes(1, 0, 8).to(DEVICE)
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        lightning_attention(*qkv.split(16, dim=-1), decay, implementation="triton", strategy="segmented")
    assert {x.untyped_storage().data_ptr() for x in saved[:3]} == {qkv.untyped_storage().data_ptr()}
    assert [x.shape for x in saved[3:]] == [(3, 1, 16, 16)]


def test_views_of_a_packed_projection_are_read_in_place() -> None:
    qkv = torch.randn(2, 5, 3, 3 * 24, device=DEVICE).bfloat16()
    for x in qkv.split(24, dim=-1):
        assert triton_attention._readable(x) is x
    shifted = qkv[..., 1:25]  # not at a multiple of 16 bytes
    assert triton_attention._readable(shifted).is_contiguous()


def test_time_major_input_is_read_in_place() -> None:
    q, k, v, decay = pack()
    batch = [x.reshape(2, -1, 2, 16).contiguous() for x in (q, k, v)]
    expected, _ = attend(*batch, decay, strategy="fused")
    turned = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in batch]
    o, _ = attend(*turned, decay, strategy="fused")
    assert o.stride() == turned[0].stride()
    assert torch.equal(o, expected)


@pytest.mark.parametrize("reverse", [False, True])
def test_tokens_beyond_the_exact_zero_horizon_are_skipped_with_equal_bits(reverse: bool) -> None:
    _, k, v, _ = pack()
    decay = torch.tensor([3.0, 0.01], device=DEVICE)  # head 0: weights below 2^-150 from 35 tokens on
    state = functools.partial(lightning_state_triton, slopes=decay, reverse=reverse, segment=2 * CHUNK)
    assert torch.equal(state(k, v), state(k, v, horizon=False))
    skipped = slice(CHUNK, 2 * CHUNK) if reverse else slice(2 * CHUNK, 3 * CHUNK)  # of the first, of the last span
    poisoned = v.clone()
    poisoned[:, skipped] = float("nan")
    assert state(k, poisoned, horizon=False).isnan().all()
    assert state(k, poisoned)[:, 0].isfinite().all()
    assert state(k, poisoned)[:, 1].isnan().all()


def test_packed_projection_with_silu_matches_separate_operators() -> None:
    generator = torch.Generator().manual_seed(5)
    qkv = torch.randn(2, 70, 2, 48, generator=generator)
    do = torch.randn(2, 70, 2, 16, generator=generator)
    decay = slopes(2, 0, 8)

    def results(device: str, implementation: str) -> list[torch.Tensor]:
        leaf = qkv.to(device).requires_grad_()
        o = lightning_attention_packed(leaf, decay.to(device), implementation=implementation)
        o.backward(do.to(device))
        return [o.detach().cpu(), leaf.grad.cpu()]

    for ours, expected in zip(results(DEVICE, "triton"), results("cpu", "torch"), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
