"""Bitwise promises of the Triton kernels at M1's head width, and the traffic that they promise not to cause."""

import functools
from dataclasses import replace

import pytest
import torch
from m1_kernels import lightning_attention, triton_attention
from m1_kernels.triton_attention import CHUNK, WHOLE, _Plan, lightning_state_triton

from tests.gpu.lightning_checks import DEVICE, Inputs, assert_same_bits, make_inputs, triton
from tests.unit.kernels.checks import Guards

pytestmark = pytest.mark.gpu

D, HEADS, SEGMENT = 128, 8, 512
DOCUMENTS = (700, 0, 1, 2600, 63, 65, 64, 4607)
"""Long enough for spans that would be chosen by the number of tokens to differ between the pack and its documents."""
ALONE = (0, 1, 3, 4, 7)


@pytest.fixture(autouse=True)
def short_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_attention, "SEGMENT", SEGMENT)


def pack() -> Inputs:
    return make_inputs(sum(DOCUMENTS) + 92, HEADS, D, torch.bfloat16, documents=DOCUMENTS)


@pytest.mark.parametrize("strategy", ["fused", "segmented"])
def test_a_packed_document_has_the_bits_of_the_same_alone(strategy: str) -> None:
    inputs = pack()
    packed = triton(inputs, strategy)
    for document in ALONE:
        first, length = sum(DOCUMENTS[:document]), DOCUMENTS[document]
        alone = triton(inputs.span(first, first + length, document), strategy)
        mine = {
            name: x[document : document + 1] if "state" in name else x[:, first : first + length]
            for name, x in packed.items()
        }
        assert_same_bits(mine, alone)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("span, save", [(WHOLE, WHOLE), (WHOLE, 1024), (SEGMENT, SEGMENT)])
def test_whole_heads_have_the_bits_of_halves(
    span: int, save: int, packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = pack() if packed else make_inputs(4098, HEADS, D, torch.bfloat16)
    found = []
    for whole in (False, True):
        plan = _Plan(span, save, save, forward_whole=whole, dq_whole=whole)
        monkeypatch.setattr(_Plan, "of", lambda *_, plan=plan: plan)
        found.append(triton(inputs, "auto"))
    assert_same_bits(*found)


@pytest.mark.parametrize("strategy", ["fused", "segmented", "auto"])
def test_runs_repeat_bitwise(strategy: str) -> None:
    for inputs in (pack(), make_inputs(4098, HEADS, D, torch.bfloat16)):
        first = triton(inputs, strategy)
        for _ in range(5):
            assert_same_bits(triton(inputs, strategy), first)


@pytest.mark.parametrize("strategy, cut", [("fused", 33 * CHUNK), ("segmented", 5 * SEGMENT)])
def test_a_resumed_prefill_has_the_bits_of_the_whole_one(strategy: str, cut: int) -> None:
    inputs = make_inputs(4098, HEADS, D, torch.bfloat16)
    q, k, v = inputs.qkv.split(D, dim=-1)
    attend = functools.partial(
        lightning_attention, slopes=inputs.decay, return_final_state=True, implementation="triton", strategy=strategy
    )
    whole, final = attend(q, k, v, initial_state=inputs.initial)
    head, state = attend(*(x[:, :cut] for x in (q, k, v)), initial_state=inputs.initial)
    tail, resumed = attend(*(x[:, cut:] for x in (q, k, v)), initial_state=state)
    assert torch.equal(torch.cat([head, tail], dim=1), whole)
    assert torch.equal(resumed, final)


@pytest.mark.parametrize("reverse", [False, True])
def test_tokens_beyond_the_exact_zero_horizon_are_not_read(reverse: bool) -> None:
    """Spans of 4096 tokens with the slopes of layer 0: the first head sees 113 tokens, the last all of them."""
    inputs = make_inputs(8192, HEADS, D, torch.bfloat16, layer=0)
    _, k, v = inputs.qkv.split(D, dim=-1)
    state = functools.partial(lightning_state_triton, slopes=inputs.decay, reverse=reverse, segment=4096)
    assert torch.equal(state(k, v), state(k, v, horizon=False))
    unseen = slice(1024, 4096) if reverse else slice(4096, 7168)
    poisoned = v.clone()
    poisoned[:, unseen] = float("nan")
    assert state(k, poisoned, horizon=False).isnan().flatten(2).any(-1).all()
    assert state(k, poisoned)[:, 0].isfinite().all()
    assert state(k, poisoned)[:, -1].isnan().any()


@pytest.mark.parametrize("strategy", ["fused", "segmented"])
def test_nan_of_one_document_stays_there(strategy: str) -> None:
    inputs = pack()
    clean = triton(inputs, strategy)
    first, last = DOCUMENTS[0] + 1, DOCUMENTS[0] + 1 + DOCUMENTS[3]
    poisoned = replace(inputs, qkv=inputs.qkv.clone(), initial=inputs.initial.clone(), do=inputs.do.clone())
    poisoned.qkv[:, first:last] = poisoned.do[:, first:last] = poisoned.initial[3] = float("nan")
    dirty = triton(poisoned, strategy)
    for x in dirty.values():
        assert x.isnan().any()
    for run in (clean, dirty):
        for name, x in run.items():
            (x[3] if "state" in name else x[:, first:last]).zero_()
    assert_same_bits(dirty, clean)


@pytest.mark.parametrize("strategy", ["fused", "segmented"])
def test_every_buffer_is_written_before_it_is_read(strategy: str) -> None:
    """Deterministic algorithms fill new memory with NaN; nothing may complain of one that is not deterministic, or see them."""
    inputs = pack()
    expected = triton(inputs, strategy)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(4, device=DEVICE).isnan().all()
        actual = triton(inputs, strategy)
    finally:
        torch.use_deterministic_algorithms(False)
    assert_same_bits(actual, expected)


def test_views_of_the_packed_projection_are_read_in_place() -> None:
    inputs = make_inputs(16_384, HEADS, D, torch.bfloat16)
    q, k, v = inputs.qkv.split(D, dim=-1)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    lightning_attention(q, k, v, inputs.decay, implementation="triton", strategy="fused")
    assert torch.cuda.max_memory_allocated() - before < 1.01 * q.numel() * q.element_size()


@pytest.mark.parametrize("strategy", ["fused", "segmented", "auto"])
@pytest.mark.parametrize("edges", [[0, 20_000], [0, 640, 300, 9000], [100, 1500], [-7, 700, 1300], [3000, 4000]])
def test_wrong_edges_lead_out_of_no_tensor(edges: list[int], strategy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors have numbers on both sides that must stay; what lies before the first document and behind the last is zero."""
    guards, tokens = Guards(4 * HEADS * D * D), 1600
    monkeypatch.setattr(triton_attention, "torch", guards.module())
    documents = len(edges) - 1
    inputs = make_inputs(tokens, HEADS, D, torch.bfloat16, documents=(tokens // documents,) * documents)
    found = triton(replace(inputs, edges=torch.tensor(edges, dtype=torch.int32, device=DEVICE)), strategy)
    guards.assert_untouched(tensors=6)
    first, last = (min(max(edge, 0), tokens) for edge in (edges[0], edges[-1]))
    for name in ("o", "dq", "dk", "dv"):
        assert not found[name][:, :first].any() and not found[name][:, last:].any(), name
