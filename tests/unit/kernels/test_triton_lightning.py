"""The Triton kernels of lightning attention: in the interpreter without a GPU, compiled where there is one."""

import functools
import itertools
import math
import os
import subprocess
import sys
import types
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import m1_kernels
import pytest
import torch
from m1_kernels import lightning_attention, lightning_attention_packed, slopes, triton_attention
from m1_kernels.chunked import lightning_attention_chunked
from m1_kernels.triton_attention import CHUNK, lightning_state_triton
from m1_kernels.triton_states import read_states_triton

from tests.unit.kernels.checks import Case, Guards, Inputs, assert_matches_oracle, head_errors, make_inputs, oracle, run

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


@pytest.mark.parametrize("documents", [None, 7])
def test_the_backward_keeps_the_inputs_and_a_state_where_spans_meet(documents: int | None) -> None:
    """Not one for every document of a pack."""
    qkv = torch.randn(1, 3 * CHUNK, 1, 48, device=DEVICE, requires_grad=True)
    decay = slopes(1, 0, 8).to(DEVICE)
    edges = None
    if documents is not None:
        edges = torch.tensor([*range(documents), 3 * CHUNK], dtype=torch.int32, device=DEVICE)
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        lightning_attention(
            *qkv.split(16, dim=-1), decay, cu_seqlens=edges, implementation="triton", strategy="segmented"
        )
    assert {x.untyped_storage().data_ptr() for x in saved[:3]} == {qkv.untyped_storage().data_ptr()}
    given = [decay.shape] if edges is None else [decay.shape, edges.shape]
    assert [x.shape for x in saved[3:]] == [(2, 1, 16, 16), *given]


class Planned(triton_attention._Call):
    """A call of M1's widths on a GPU of 132 multiprocessors, none of which need be there."""

    processors = 132
    capability = 90
    specialised = True

    @classmethod
    def plan(cls, tokens: int, heads: int, documents: int | None = None, batch: int = 1) -> triton_attention._Plan:
        edges = None if documents is None else torch.zeros(documents + 1, dtype=torch.int32)
        count = batch if documents is None else documents
        call = cls(batch, tokens, heads, 128, count, slopes(heads, 0, 8), edges, torch.bfloat16, torch.device("cpu"))
        return triton_attention._Plan.of(call, "auto")


class PlannedElsewhere(Planned):
    specialised = False


@pytest.mark.parametrize("planned", [Planned, PlannedElsewhere])
@pytest.mark.parametrize("documents", [None, 1, 7, 20, 500])
def test_auto_fills_the_device_whatever_the_documents(planned: type[Planned], documents: int | None) -> None:
    """A pack's longest document may be nearly all of it: eight heads alone are 16 programs."""
    tokens = 65_536
    few, many = planned.plan(tokens, 8, documents), planned.plan(tokens, 64, documents)
    for pack, heads in ((few, 8), (many, 64)):
        dense = planned.plan(tokens, heads)
        halves = 2 if planned.specialised and documents is not None and documents > 1 else 1
        assert (pack.backward * halves, pack.parts * halves) == (dense.backward, dense.parts)
        assert replace(pack, backward=dense.backward, parts=dense.parts) == dense
    for span, whole in ((few.forward, few.forward_whole), (few.save, few.dq_whole), (few.backward, True)):
        programs = 8 if planned.specialised and whole else 16
        assert span % CHUNK == 0 and 0.8 * 132 <= tokens // span * programs <= 4 * 132, (span, programs)
    assert many.forward == triton_attention.WHOLE
    if planned.specialised:
        assert many.save == tokens // 2 and many.dq_whole and not many.forward_whole


def test_auto_leaves_documents_whole_where_rows_fill_the_device_or_are_short() -> None:
    whole = triton_attention.WHOLE
    assert Planned.plan(65_536, 8, batch=7).forward == whole
    assert Planned.plan(65_536, 8, batch=6).forward < whole
    assert Planned.plan(256, 8) == triton_attention._Plan(whole, whole, whole)
    assert Planned.plan(512, 8).forward == whole
    assert Planned.plan(1024, 8).forward == 256
    assert Planned.plan(2048, 8).forward == 256
    assert PlannedElsewhere.plan(1024, 8).forward == whole
    assert PlannedElsewhere.plan(1025, 8).forward < whole


@pytest.mark.parametrize(
    "batch, tokens, heads, forward, dq",
    [
        (1, 65_536, 64, (1, 1, False), (2, True)),
        (2, 65_536, 64, (1, 1, True), (1, True)),
        (3, 65_536, 32, (1, 1, True), (4, True)),
        (1, 65_536, 16, (8, 2, True), (8, True)),
        (1, 65_536, 8, (16, 2, True), (16, True)),
        (1, 8192, 8, (16, 1, True), (16, True)),
        (1, 4096, 16, (8, 1, True), (8, True)),
        (1, 4096, 8, (16, 1, True), (16, True)),
        (1, 2048, 8, (8, 1, False), (8, False)),
        (1, 1024, 8, (4, 1, False), (4, False)),
        (1, 512, 8, (1, 1, False), (2, False)),
    ],
)
def test_spans_of_forward_and_dq(
    batch: int, tokens: int, heads: int, forward: tuple[int, int, bool], dq: tuple[int, bool]
) -> None:
    """Whole heads where they fill 132 multiprocessors; dq in spans from states that the forward sweep saves."""
    plan = Planned.plan(tokens, heads, batch=batch)
    assert (-(-tokens // plan.forward), plan.forward_parts, plan.forward_whole) == forward
    assert (-(-tokens // plan.save), plan.dq_whole) == dq


@pytest.mark.parametrize("strategy", triton_attention.STRATEGIES)
@pytest.mark.parametrize("batch, tokens", [(0, 64), (1, 0)])
def test_nothing_at_all_has_a_plan(batch: int, tokens: int, strategy: str) -> None:
    call = Planned(batch, tokens, 8, 128, batch, slopes(8, 0, 8), None, torch.bfloat16, torch.device("cpu"))
    assert triton_attention._Plan.of(call, strategy).forward_parts == 1


@pytest.mark.parametrize("strategy, heads, whole", [("fused", 64, False), ("fused", 128, True), ("segmented", 8, True)])
def test_named_strategies_choose_whole_heads_by_shape(strategy: str, heads: int, whole: bool) -> None:
    """Never spans, which change bits."""
    call = Planned(1, 65_536, heads, 128, 1, slopes(heads, 0, 8), None, torch.bfloat16, torch.device("cpu"))
    span = triton_attention.SEGMENT if strategy == "segmented" else triton_attention.WHOLE
    expected = triton_attention._Plan(span, span, span, whole, whole)
    assert triton_attention._Plan.of(call, strategy) == expected


@pytest.mark.parametrize(
    "batch, tokens, heads, spans, parts",
    [
        (1, 65_536, 64, 2, 4),
        (1, 8192, 64, 2, 4),
        (2, 32_768, 64, 1, 1),
        (1, 65_536, 100, 1, 1),
        (1, 65_536, 70, 5, 1),
        (1, 65_536, 16, 8, 2),
        (1, 65_536, 8, 16, 2),
        (1, 8192, 8, 16, 1),
        (1, 2048, 8, 8, 1),
        (1, 1024, 8, 4, 1),
        (1, 256, 8, 1, 1),
    ],
)
def test_spans_of_the_reverse_sweep(batch: int, tokens: int, heads: int, spans: int, parts: int) -> None:
    """Programs of whole heads in full waves on 132 multiprocessors; about 528 programs, of half a head, sum the states of parts."""
    plan = Planned.plan(tokens, heads, batch=batch)
    assert plan.parts == parts
    if spans == 1:
        assert plan.backward == triton_attention.WHOLE
    else:
        assert -(-tokens // plan.backward) == spans and plan.backward % (parts * CHUNK) == 0
    uneven = Planned.plan(tokens + 1, heads, batch=batch)
    assert spans == 1 or (uneven.backward % (uneven.parts * CHUNK) == 0 and uneven.backward * spans > tokens)


@pytest.mark.parametrize("documents", [None, (256, 44, 0, 64, 130, 129, 1, 240)])
@pytest.mark.parametrize("reverse", [False, True])
def test_states_of_parts_are_summed_where_spans_meet(documents: tuple[int, ...] | None, reverse: bool) -> None:
    """As if spans had no parts; what no border of spans needs stays as it was."""
    part, span = CHUNK, 2 * CHUNK
    case = Case(tokens=864, heads=2, documents=documents)
    inputs = make_inputs(case)
    q, k, _ = (x.to(DEVICE) for x in inputs.qkv.chunk(3, dim=-1))
    edges = None if documents is None else torch.tensor([0, *documents]).cumsum(0).int().to(DEVICE)
    call = triton_attention._Call.of(q, slopes(2, 0, 8).to(DEVICE), edges)
    begins = [0] if edges is None else edges.tolist()[:-1]
    lengths = documents or (case.tokens,)
    initial = torch.randn(len(lengths), 2, case.dim, case.dim, device=DEVICE)
    found = []
    for size in (part, span):
        states = call.states(size).fill_(777)
        call.local_states(states, q, k, size, reverse=reverse, span=span)
        call.scan(states, size, initial, None, reverse=reverse, span=span)
        found.append(states)
    borders = [begin + at for begin, length in zip(begins, lengths) for at in range(span, length, span)]
    for at in borders:
        ours, expected = (states[at // size - 1] for states, size in zip(found, (part, span)))
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    needed = {
        (begin + at) // part - 1
        for begin, length in zip(begins, lengths)
        for at in range(part, length, part)
        if (at >= span if reverse else at <= (length - 1) // span * span)
    }
    for place, state in enumerate(found[0]):
        assert bool((state == 777).all()) == (place not in needed), place


@pytest.mark.parametrize("documents", [None, (1, 300, 0, 131)])
def test_sweeps_start_from_states_closer_than_their_spans(
    documents: tuple[int, ...] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    span = 2 * CHUNK
    plan = triton_attention._Plan(span, span, span, forward_parts=2)
    monkeypatch.setattr(triton_attention._Plan, "of", lambda *_: plan)
    assert_matches_oracle(triton_with("auto"), Case(tokens=440, heads=1, documents=documents), FLOAT32_BOUND)


@pytest.mark.parametrize("documents", [None, (1, 1100, 0, 3)])
def test_auto_in_spans_matches_the_oracle(documents: tuple[int, ...] | None, monkeypatch: pytest.MonkeyPatch) -> None:
    spans = []
    local_states = triton_attention._Call.local_states
    monkeypatch.setattr(
        triton_attention._Call,
        "local_states",
        lambda call, states, *x, **options: (spans.append(len(states)), local_states(call, states, *x, **options)),
    )
    case = Case(tokens=1110, heads=1, documents=documents, layer=6)
    inputs = make_inputs(case)
    exact = Inputs(*(x.double() for x in (inputs.qkv, inputs.initial, inputs.do, inputs.dfinal)))
    expected = run(lightning_attention_chunked, replace(case, dtype=torch.float64), exact)
    for name, actual in run(triton_with("auto"), case, inputs).items():
        assert head_errors(actual, expected[name], 1 if "state" in name else 2).max() <= FLOAT32_BOUND, name
    assert DEVICE == "cuda" or (len(spans) == 2 and min(spans) > 1)


@pytest.mark.parametrize("strategy", ["fused", "segmented"])
@pytest.mark.parametrize("edges", [[0, 20_000], [0, 64, 30, 9000], [10, 150], [10, 5, 150], [-7, 70, 130], [300, 400]])
def test_wrong_edges_lead_out_of_no_tensor(edges: list[int], strategy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards around every tensor that the kernels write keep their numbers; the kernels cannot refuse such edges on a GPU."""
    guards = Guards(4 * CHUNK * 256)
    monkeypatch.setattr(triton_attention, "torch", guards.module())
    tokens, documents = 160, len(edges) - 1
    qkv = torch.randn(1, tokens, 1, 48, device=DEVICE, requires_grad=True)
    initial = torch.randn(documents, 1, 16, 16, device=DEVICE, requires_grad=True)
    o, final = triton_attention.lightning_attention_triton(
        *qkv.split(16, dim=-1), slopes(1, 0, 8).to(DEVICE), initial_state=initial, return_final_state=True,
        cu_seqlens=torch.tensor(edges, dtype=torch.int32, device=DEVICE), strategy=strategy,
    )  # fmt: skip
    torch.autograd.backward([o, final], [torch.ones_like(o), torch.ones_like(final)])
    guards.assert_untouched(tensors=6)
    if edges == sorted(edges):
        inside = [min(max(edge, 0), tokens) for edge in edges]
        # What is no document's is zero, in front as behind, and all is written.
        for x in (o, qkv.grad, final, initial.grad):
            assert not (x == 777).any()
        for x in (o, qkv.grad):
            assert not x[:, : inside[0]].any() and not x[:, inside[-1] :].any()


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("changed", ["slopes", "cu_seqlens"])
def test_what_changes_before_the_backward_is_noticed(changed: str, packed: bool) -> None:
    qkv = torch.randn(1, 64, 1, 48, device=DEVICE, requires_grad=True)
    given = {
        "slopes": slopes(1, 0, 8).to(DEVICE),
        "cu_seqlens": torch.tensor([0, 20, 64], dtype=torch.int32, device=DEVICE),
    }
    if packed:
        o = lightning_attention_packed(qkv, **given, implementation="triton")
    else:
        o = lightning_attention(*qkv.split(16, dim=-1), **given, implementation="triton")
    with torch.no_grad():
        given[changed][0] += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        o.sum().backward()


@pytest.mark.parametrize(
    "implementation, edges",
    [("torch", [0, 30, 70]), ("triton", [0, 30, 70]), ("triton", [0, 0]), ("triton", [0]), ("triton", [7, 30, 70])],
)
def test_padding_of_a_packed_projection_is_never_read(implementation: str, edges: list[int]) -> None:
    device = DEVICE if implementation == "triton" else "cpu"
    generator = torch.Generator().manual_seed(6)
    qkv, do = torch.randn(1, 80, 2, 48, generator=generator), torch.randn(1, 80, 2, 16, generator=generator)
    cu_seqlens, found = torch.tensor(edges, dtype=torch.int32, device=device), []
    for padding in (1.0, float("nan")):
        for outside in (slice(0, edges[0]), slice(edges[-1], None)):
            qkv[:, outside] = do[:, outside] = padding
        # Heads in front of tokens: padding is no one stretch of memory.
        leaf = qkv.to(device).transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
        o = lightning_attention_packed(
            leaf, slopes(2, 0, 8).to(device), cu_seqlens=cu_seqlens, implementation=implementation
        )
        o.backward(do.to(device))
        found.append([o.detach(), leaf.grad])
    for clean, poisoned in zip(*found, strict=True):
        assert torch.equal(clean, poisoned)
        assert not poisoned[:, : edges[0]].any() and not poisoned[:, edges[-1] :].any()
        assert poisoned.any() == (edges[-1] > 0)


@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")
@pytest.mark.parametrize("dtype, size", [(torch.float16, 6e4), (torch.float16, 7e4), (torch.bfloat16, 7e4)])
@pytest.mark.parametrize("large", ["scores", "state"])
def test_float16_holds_scores_and_states_up_to_its_own_limit(large: str, dtype: torch.dtype, size: float) -> None:
    """Outputs of about 60: the torch path has no such limit, nor has bfloat16."""
    q = torch.full((1, 1, 1, 16), (size / 16) ** 0.5 if large == "scores" else 1e-3 / 16, dtype=dtype)
    k, v = (q, torch.full_like(q, 1e-3)) if large == "scores" else (torch.zeros_like(q), torch.zeros_like(q))
    initial = torch.full((1, 1, 16, 16), 0.0 if large == "scores" else size)
    decay = torch.zeros(1)
    ours = triton_with("fused")(q, k, v, decay, initial_state=initial)
    expected = lightning_attention(q, k, v, decay, initial_state=initial)
    assert expected.isfinite().all() and expected.max() < 100
    if dtype == torch.float16 and size > 65504:
        assert not ours.isfinite().any()
    else:
        torch.testing.assert_close(ours, expected, rtol=2e-2, atol=0)


def test_views_of_a_packed_projection_are_read_in_place() -> None:
    qkv = torch.randn(2, 5, 3, 3 * 24, device=DEVICE).bfloat16()
    for x in qkv.split(24, dim=-1):
        assert triton_attention._readable(x) is x
    shifted = qkv[..., 1:25]  # not at a multiple of 16 bytes
    assert triton_attention._readable(shifted).is_contiguous()


@pytest.mark.parametrize("name", ["byte", "stride"])
def test_contiguous_input_that_no_descriptor_takes_is_copied(name: str) -> None:
    """One that begins between multiples of 16 bytes, or has a dimension of size 1 with a stride between them."""
    x = torch.randn(1 + 40 * 16, device=DEVICE)
    given = x[1:].view(1, 40, 1, 16) if name == "byte" else x[:-1].view(1, 40, 16, 1).mT
    assert given.is_contiguous()
    decay = slopes(1, 0, 8).to(DEVICE)
    found, expected = (
        lightning_attention(y, y, y, decay, implementation="triton") for y in (given, x.new_tensor(given.tolist()))
    )
    assert torch.equal(found, expected)


def test_time_major_input_is_read_in_place() -> None:
    q, k, v, decay = pack()
    batch = [x.reshape(2, -1, 2, 16).contiguous() for x in (q, k, v)]
    expected, _ = attend(*batch, decay, strategy="fused")
    turned = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in batch]
    o, _ = attend(*turned, decay, strategy="fused")
    assert o.stride() == turned[0].stride()
    assert torch.equal(o, expected)


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 0, 2), (0, 2, 1), (2, 0, 1)])
def test_gradients_of_a_packed_projection_have_tokens_in_front_of_heads(order: tuple[int, int, int]) -> None:
    """Whatever order its dimensions B, T and H have in memory; time-major stays time-major."""
    qkv, decay = torch.randn(2, 70, 3, 48, device=DEVICE), slopes(3, 0, 8).to(DEVICE)
    found = []
    for x in (qkv, qkv.permute(*order, 3).contiguous().permute(*torch.tensor(order).argsort().tolist(), 3)):
        o = lightning_attention_packed(x.requires_grad_(), decay, implementation="triton")
        found.append(torch.autograd.grad(o, x, torch.ones_like(o))[0])
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)
    time_major = torch.empty(70, 2, 3, 48).transpose(0, 1)
    assert found[1].stride() == (time_major if order == (1, 0, 2) else qkv).stride()


def test_recomputed_activation_takes_no_memory_and_changes_no_bits() -> None:
    qkv, decay = torch.randn(2, 70, 3, 48, device=DEVICE, requires_grad=True), slopes(3, 0, 8).to(DEVICE)
    gradients, kept = [], []
    for recompute in (False, True):
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept[-1].append(x.numel()) or x, lambda x: x):
            kept.append([])
            o = lightning_attention_packed(qkv, decay, recompute_activation=recompute, implementation="triton")
        gradients.append(torch.autograd.grad(o, qkv, torch.ones_like(o))[0])
    assert torch.equal(*gradients)
    assert [sizes.count(qkv.numel()) for sizes in kept] == [2, 1]


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


def last_weights(tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(slopes [H], last [H]): e^{-s n} is not zero in float32 up to n = last, one of as many numbers in turn as a chunk has tokens.

    A GPU's exp2 gives zero below 2^-126, the interpreter's below 2^-150.
    """
    last = torch.arange(tokens - C, tokens, device=DEVICE)
    return (125.75 if DEVICE == "cuda" else 149.25) * math.log(2) / last, last


@pytest.mark.parametrize("reverse", [False, True])
def test_the_last_token_within_the_horizon_counts(reverse: bool) -> None:
    """A huge value there alone, wherever in a chunk that is; one token further it is worth nothing."""
    decay, last = last_weights(128)
    heads, tokens = torch.arange(C, device=DEVICE), 3 * CHUNK
    k = torch.ones(1, tokens, C, 16, device=DEVICE)
    found = []
    for beyond in (0, 1):
        v = torch.zeros_like(k)
        gap = last + beyond
        v[0, gap - 1 if reverse else tokens - 1 - gap, heads] = 2.0**100
        states = [
            lightning_state_triton(k, v, decay, reverse=reverse, segment=tokens, horizon=horizon)
            for horizon in (True, False)
        ]
        assert torch.equal(*states)
        found.append(states[0].flatten(2).amax(-1))
    assert (found[0] > 0).all() and not found[1].any()


@pytest.mark.parametrize("reverse", [False, True])
def test_a_state_is_read_up_to_the_horizon_and_no_further(reverse: bool) -> None:
    """With the bits of a read that knows none; what lies a chunk beyond it is not touched."""
    decay, last = last_weights(128)
    heads, tokens = torch.arange(C, device=DEVICE), 5 * CHUNK
    states, edges = torch.ones(2, C, 16, 16, device=DEVICE), torch.tensor([0, tokens, tokens + 9], dtype=torch.int32)

    def read(q: torch.Tensor, horizon: bool) -> torch.Tensor:
        out = torch.zeros_like(q)
        options = {"cu_seqlens": edges.to(DEVICE), "reverse": reverse, "horizon": horizon}
        read_states_triton(q, states, decay, out=out, **options)
        return out[0, :tokens]

    for beyond in (0, 1):
        place = tokens - 1 - last - beyond if reverse else last - 1 + beyond
        q = torch.zeros(1, tokens + 9, C, 16, device=DEVICE)
        q[0, place, heads] = 2.0**100
        out = read(q, True)
        assert torch.equal(out, read(q, False))
        assert bool((out[place, heads] > 0).all()) == (beyond == 0)
    far = slice(0, tokens - 128 - CHUNK) if reverse else slice(128 + CHUNK, tokens)
    q[:, far] = float("nan")
    assert read(q, False)[far].isnan().all() and read(q, True).isfinite().all()


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


@pytest.fixture
def specialised(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, dict[str, Any]]]:
    """Programs and keywords of the specialised sweeps that a test launches; none runs."""
    launched: list[tuple[int, dict[str, Any]]] = []

    class Sweep:
        def __getitem__(self, grid: tuple[int]) -> Any:
            return lambda *_, **keywords: launched.append((grid[0], keywords))

    modules = {
        "gluon_lightning": types.SimpleNamespace(descriptor=lambda x, *_: x, sweep=Sweep()),
        "gluon_backward": types.SimpleNamespace(reverse_sweep=Sweep()),
    }
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, f"m1_kernels.{name}", module)
        monkeypatch.setattr(m1_kernels, name, module, raising=False)
    return launched


@pytest.mark.parametrize("whole", [False, True])
def test_a_whole_head_takes_half_as_many_programs(specialised: list, whole: bool) -> None:
    call = Planned(1, 256, 3, 128, 1, slopes(3, 0, 8), None, torch.bfloat16, torch.device("cpu"))
    x = torch.empty(1, 256, 3, 128, dtype=torch.bfloat16, device="meta")
    call.sweep(x, x, x, x, segment=128, whole=whole)
    ((programs, given),) = specialised
    assert (programs, given["HALVES"], given["BV"]) == ((6, 2, 64) if whole else (12, 1, 64))


@pytest.mark.parametrize("stateful", [False, True])
def test_one_sweep_takes_dk_and_dv(specialised: list, stateful: bool) -> None:
    """From the states of parts, where heads do not fill the device, and into the gradient of the initial state."""
    call = Planned(1, 8192, 64, 128, 1, slopes(64, 0, 8), None, torch.bfloat16, torch.device("cpu"))
    x = torch.empty(1, 8192, 64, 128, dtype=torch.bfloat16, device="meta")
    passes: list[tuple[int, ...]] = []
    call_of = type("Recorded", (Planned,), {})
    call_of.local_states = lambda call, states, q, do, part, *, reverse, span, early: passes.append(
        (len(states), part, span)
    )
    call_of.scan = lambda call, states, part, initial, left, *, reverse, span: passes.append((part, span))
    call.__class__ = call_of
    plan = triton_attention._Plan.of(call, "auto")
    state = torch.empty(1, 64, 128, 128) if stateful else None
    triton_attention._backward(call, plan, x, x, x, x, state, x, x, x, state, None)
    assert passes == [(7, 1024, 4096), (1024, 4096)]
    (_, dq), (programs, given) = specialised
    assert dq["TRANSPOSED"] and "TRANSPOSED" not in given
    assert (programs, given["ENTRY"], given["LEAVING"]) == (128, 2 + stateful, stateful)


@pytest.mark.parametrize("keeping", [False, True])
def test_sweeps_of_half_heads_of_whole_documents_apply_silu(
    specialised: list, keeping: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is a pass of its own in front of others."""
    quiet = {"local_states": lambda *_, **__: None, "scan": lambda *_, **__: None}
    call = type("Quiet", (Planned,), quiet)(
        1, 256, 3, 128, 1, slopes(3, 0, 8), None, torch.bfloat16, torch.device("cpu")
    )  # fmt: skip
    qkv, apart = (torch.empty(1, 256, 3, 384, dtype=torch.bfloat16, device="meta") for _ in range(2))
    monkeypatch.setattr(triton_attention, "_silu", lambda *_: apart)
    whole, half = (triton_attention._Plan(*[triton_attention.WHOLE] * 3, forward_whole=w) for w in (True, False))
    spans = triton_attention._Plan(128, 128, 128)
    for plan, activate in itertools.product((whole, half, spans), (False, True)):
        specialised.clear()
        *_, activated = triton_attention._packed_forward(
            call, plan, qkv, None, activate=activate, keeping=keeping, saving=keeping, leaving=False
        )
        ((_, given),) = specialised
        assert given["ACTIVATE"] == (activate and plan is half)
        assert ("KeptRows" in given) == (given["ACTIVATE"] and keeping)
        if given["ACTIVATE"] and keeping:
            assert activated is given["KeptRows"] and activated.shape == qkv.shape and activated is not apart
        else:
            assert activated is (apart if activate and keeping else None)


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 0, 2), (0, 2, 1), (2, 0, 1)])
@pytest.mark.parametrize("batch", [1, 2])
def test_silu_of_a_dense_projection_is_one_stretch_of_memory(
    batch: int, order: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Contiguous or time-major it is read in place; others are copied."""
    call = Planned(batch, 7, 3, 128, batch, slopes(3, 0, 8), None, torch.bfloat16, torch.device("cpu"))
    x = torch.randn(batch, 7, 3, 384).permute(*order, 3).contiguous()
    x = x.permute(*torch.tensor(order).argsort().tolist(), 3)
    read = []

    def forward(x: torch.Tensor, out: torch.Tensor) -> None:
        read.append(x.data_ptr())
        memory = [y.as_strided((y.numel(),), (1,)) for y in (x, out)]
        memory[1].copy_(torch.nn.functional.silu(memory[0]))

    module = types.SimpleNamespace(forward=forward)
    monkeypatch.setitem(sys.modules, "m1_kernels.triton_silu", module)
    monkeypatch.setattr(m1_kernels, "triton_silu", module, raising=False)
    found = triton_attention._silu(call, x)
    assert (
        torch.equal(found, torch.nn.functional.silu(x)) and found.stride() == triton_attention._output_like(x).stride()
    )
    in_place = order in ((0, 1, 2), (1, 0, 2))
    assert (read == [x.data_ptr()]) == in_place


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_launches_before_the_kernel_in_front_has_ended(capability: int) -> None:
    """Only of what follows a kernel of the same call, and where the GPU can; never in the interpreter. Asked in a process that has none."""
    code = f"""
import torch
from m1_kernels import compile_launches, triton_attention
from m1_kernels.triton_attention import _Call, _Plan
x, decay, plan = torch.empty(1, 1024, 8, 128, dtype=torch.bfloat16), torch.ones(8), _Plan(256, 256, 256)
for interpreted in (False, True):
    triton_attention.interpreting = lambda: interpreted
    with compile_launches._recording({capability}) as launched:
        call = _Call.of(x, decay, None)
        _, states = triton_attention._forward(call, plan, x, x, x, x, None, saving=True, leaving=False)
        triton_attention._backward(call, plan, x, x, x, x, None, x, x, x, None, states)
    for kernel, _, given in launched:
        print(kernel.fn.__name__, given["PDL"], given.get("launch_pdl", False))
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "TRITON_INTERPRET": "0"},
    )
    backward = ["reverse_sweep"] if capability == 90 else ["sweep", "sweep"]
    names = ["local_states", "scan_states", "sweep", "sweep", "local_states", "scan_states", *backward]
    first = (0, 3)  # of the forward, of the backward pass
    able = capability >= 90
    expected = [f"{name} {able} {able and place not in first}" for place, name in enumerate(names)]
    assert done.stdout.splitlines() == expected + [f"{name} False False" for name in names]


def test_nothing_is_kept_without_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of a leaf, which says that it needs its gradient."""
    kept = []
    forward = triton_attention._forward
    monkeypatch.setattr(
        triton_attention,
        "_forward",
        lambda *given, **options: kept.append(options["saving"]) or forward(*given, **options),
    )
    packed = triton_attention._packed_forward
    monkeypatch.setattr(
        triton_attention,
        "_packed_forward",
        lambda *given, **options: kept.append(options["keeping"]) or packed(*given, **options),
    )
    qkv, decay = torch.randn(1, 70, 2, 48, device=DEVICE, requires_grad=True), slopes(2, 0, 8).to(DEVICE)
    for enabled in (True, False):
        with torch.set_grad_enabled(enabled):
            o = lightning_attention_packed(qkv, decay, implementation="triton")
            lightning_attention(*qkv.split(16, dim=-1), decay, implementation="triton")
        assert o.requires_grad == enabled
        assert kept == [enabled] * 3  # keeping and saving; saving
        kept.clear()


def test_kernels_are_compiled_once_for_packs_of_all_sizes() -> None:
    """Not again where the number of tokens or documents is 1 or a multiple of 16. Asked in a process that interprets no kernel."""
    code = """
from m1_kernels.gluon_backward import reverse_sweep
from m1_kernels.gluon_lightning import sweep as specialised
from m1_kernels.triton_lightning import local_states, scan_states, sweep, zero_padding
from m1_kernels.triton_states import _read_states
for kernel in (specialised, reverse_sweep, local_states, scan_states, sweep, zero_padding, _read_states):
    sizes = [parameter for parameter in kernel.params if parameter.name in ("T", "documents")]
    assert sizes and all(parameter.do_not_specialize for parameter in sizes), kernel
"""
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "TRITON_INTERPRET": "0"})
