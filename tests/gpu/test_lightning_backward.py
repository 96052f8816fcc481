"""dk, dv and the gradient of initial states by the reverse sweep at M1's head width: spans, parts of spans, rows, short documents."""

from dataclasses import replace

import pytest
import torch
from m1_kernels import lightning_attention, lightning_attention_packed, triton_attention
from m1_kernels.triton_attention import WHOLE, _Plan

from tests.gpu.lightning_checks import (
    DEVICE,
    STATE_BOUND,
    Gate,
    Inputs,
    assert_same_bits,
    error_per_head,
    make_inputs,
    triton,
)

pytestmark = pytest.mark.gpu

D, HEADS, TOKENS = 128, 4, 2100
DOCUMENTS = (700, 0, 1, 256, 63, 65, 64, 3, 840)
SPANS = [(WHOLE, 1), (512, 1), (512, 4), (192, 3), (64, 1)]
"""(tokens, parts) of a span."""
GRADIENTS = ("dk", "dv", "dinitial_state")
GRADIENTS_OF_QKV = ("dq", "dk", "dv")


@pytest.fixture(params=SPANS, ids=lambda span: f"{span[0]}/{span[1]}" if span[0] < WHOLE else "whole")
def spans(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, parts = request.param
    plan = _Plan(WHOLE, WHOLE, tokens, parts=parts)
    monkeypatch.setattr(_Plan, "of", lambda *_: plan)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("documents", [None, DOCUMENTS], ids=["dense", "packed"])
def test_error_is_that_of_rounding_the_results(spans, documents, dtype: torch.dtype) -> None:
    inputs = make_inputs(TOKENS, HEADS, D, dtype, documents=documents)
    Gate.of(inputs).check(triton(inputs, "auto"))


@pytest.mark.parametrize("time_major", [False, True])
def test_rows_of_a_batch_have_the_bits_of_each_alone(spans, time_major: bool) -> None:
    assert_rows_have_the_bits_of_each_alone(time_major)


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("forward, save, parts", [(WHOLE, 512, 1), (512, 512, 1), (512, 512, 4)])
def test_rows_in_spans_of_the_forward_sweep_and_dq(
    forward: int, save: int, parts: int, whole: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = _Plan(forward, save, WHOLE, whole, whole, forward_parts=parts)
    monkeypatch.setattr(_Plan, "of", lambda *_: plan)
    assert_rows_have_the_bits_of_each_alone(False)


def assert_rows_have_the_bits_of_each_alone(time_major: bool) -> None:
    rows = [make_inputs(TOKENS, HEADS, D, torch.bfloat16, layer=layer) for layer in (0, 40, 78)]
    rows = [replace(row, decay=rows[0].decay) for row in rows]
    batch = Inputs(
        *(torch.cat([getattr(row, name) for row in rows]) for name in ("qkv", "initial", "do", "dfinal")), rows[0].decay
    )
    if time_major:
        turned = {name: getattr(batch, name).transpose(0, 1).contiguous().transpose(0, 1) for name in ("qkv", "do")}
        batch = replace(batch, **turned)
    together = triton(batch, "auto")
    for place, row in enumerate(rows):
        assert_same_bits({name: x[place : place + 1] for name, x in together.items()}, triton(row, "auto"))


@pytest.mark.parametrize("length", [1, 63, 64, 65, 127, 128, 129])
def test_short_documents(length: int) -> None:
    """So many that the error of a head is no accident of a few roundings, one of them alone with the same bits."""
    count = -(-1040 // length)
    inputs = make_inputs(count * length + 5, HEADS, D, torch.bfloat16, documents=(length,) * count)
    packed, gate = triton(inputs, "fused"), Gate.of(inputs)
    gate.check(packed)
    gate.check(triton(inputs, "auto"))
    for document in (0, count - 1):
        first = document * length
        mine = {
            name: x[document : document + 1] if "state" in name else x[:, first : first + length]
            for name, x in packed.items()
        }
        assert_same_bits(mine, triton(inputs.span(first, first + length, document), "fused"))


@pytest.mark.parametrize("documents", [None, DOCUMENTS], ids=["dense", "packed"])
def test_no_states_are_states_of_zero(spans, documents) -> None:
    inputs = make_inputs(TOKENS, HEADS, D, torch.bfloat16, documents=documents)
    inputs = replace(inputs, initial=torch.zeros_like(inputs.initial), dfinal=torch.zeros_like(inputs.dfinal))
    expected = triton(inputs, "auto")
    leaf = inputs.qkv.clone().requires_grad_()
    lightning_attention(
        *leaf.split(D, dim=-1), inputs.decay, cu_seqlens=inputs.edges, implementation="triton"
    ).backward(inputs.do)
    for name, x in zip(("dq", "dk", "dv"), leaf.grad.split(D, dim=-1), strict=True):
        assert torch.equal(x, expected[name]), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("documents", [None, DOCUMENTS], ids=["dense", "packed"])
def test_derivative_of_silu_is_that_of_each_value(spans, documents, dtype: torch.dtype) -> None:
    """Gradients of the packed projection are those of q, k, v times the derivative; both are rounded once from the same numbers."""
    inputs = make_inputs(TOKENS, HEADS, D, dtype, documents=documents)
    covered = sum(documents or (TOKENS,))
    special = torch.tensor(
        [-6e4, -100.0, -30.0, -12.0, -5.0, -1.278, -1e-3, 0.0, 1e-3, 5.0, 12.0, 100.0], device=DEVICE
    )
    qkv = 4 * inputs.qkv
    # Large ones in q alone and seldom: sums over them would hide all others.
    qkv[:, 5::97, :, : 2 * len(special) : 2] = special.to(dtype)
    leaf = qkv.clone().requires_grad_()
    lightning_attention_packed(
        leaf, inputs.decay, initial_state=inputs.initial, cu_seqlens=inputs.edges, implementation="triton"
    ).backward(inputs.do)
    call = triton_attention._Call.of(inputs.do, inputs.decay, inputs.edges)
    activated = replace(inputs, qkv=triton_attention._silu(call, qkv), dfinal=torch.zeros_like(inputs.dfinal))
    plain = triton(activated, "auto")
    x = qkv.double().requires_grad_()
    torch.nn.functional.silu(x).sum().backward()
    rounding = torch.finfo(dtype).eps
    for name, ours, derivative in zip(
        GRADIENTS_OF_QKV, leaf.grad.split(D, dim=-1), x.grad.split(D, dim=-1), strict=True
    ):
        expected = (plain[name].double() * derivative)[:, :covered]
        tiny = 1e-30 * plain[name].double()[:, :covered].abs() + torch.finfo(dtype).smallest_normal
        assert ((ours.double()[:, :covered] - expected).abs() <= 1.05 * (rounding * expected.abs() + tiny)).all(), name
        assert not ours[:, covered:].any()


def test_gradients_of_final_states_alone(spans) -> None:
    """Where o has no gradient all dk and dv come from the state, which decays little: layer 78."""
    inputs = make_inputs(TOKENS, HEADS, D, torch.bfloat16, layer=78)
    inputs = replace(inputs, do=torch.zeros_like(inputs.do))
    found, gate = triton(inputs, "auto"), Gate.of(inputs)
    assert not found["dq"].any()
    for name in GRADIENTS:
        error, rounded = (error_per_head(x[name], gate.exact[name], name) for x in (found, gate.rounded))
        assert (error <= (STATE_BOUND if "state" in name else 1.5 * rounded)).all(), name


@pytest.mark.parametrize("heads, documents", [(64, None), (8, None), (8, (5000, 1, 64, 2000, 1000))])
def test_runs_repeat_bitwise(heads: int, documents) -> None:
    """As auto plans them: 64 heads in two spans of four parts."""
    inputs = make_inputs(8192, heads, D, torch.bfloat16, documents=documents)
    first = triton(inputs, "auto")
    for _ in range(10):
        assert_same_bits(triton(inputs, "auto"), first)


@pytest.mark.parametrize("documents", [None, (5000, 1, 64, 2000, 1000)], ids=["dense", "packed"])
def test_auto_plans_parts(documents, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_attention._Call, "processors", 132)
    inputs = make_inputs(8192, 64, D, torch.bfloat16, documents=documents)
    call = triton_attention._Call.of(inputs.do, inputs.decay, inputs.edges)
    if call.specialised:
        plan = _Plan.of(call, "auto")
        assert plan.backward < 8192 and plan.parts > 1
    Gate.of(inputs).check(triton(inputs, "auto"))


def test_padding_is_zeroed_and_never_read(spans) -> None:
    """In front of the first document too; NaN there and in neighbours stays there."""
    inputs = make_inputs(TOKENS, HEADS, D, torch.bfloat16, documents=(700, 65, TOKENS - 765))
    edges = torch.tensor([100, 700, 765, 2000], dtype=torch.int32, device=DEVICE)
    inputs = replace(inputs, edges=edges)
    found = []
    for poison in (1.0, float("nan")):
        run = replace(inputs, qkv=inputs.qkv.clone(), do=inputs.do.clone())
        for x in (run.qkv, run.do):
            x[:, :100] = x[:, 700:765] = x[:, 2000:] = poison
        found.append(triton(run, "auto"))
    clean, dirty = found
    for name in GRADIENTS:
        if "state" in name:
            assert dirty[name][1].isnan().any() and torch.equal(dirty[name][[0, 2]], clean[name][[0, 2]])
            continue
        assert dirty[name][:, 700:765].isnan().any()
        for part in (slice(0, 700), slice(765, None)):
            assert torch.equal(dirty[name][:, part], clean[name][:, part]), (name, part)
        assert not dirty[name][:, :100].any() and not dirty[name][:, 2000:].any()
