"""The chunked torch path against the float64 recurrence, and what it promises beyond numbers."""

import pytest
import torch
from m1_kernels import chunked, lightning_attention, slopes

from tests.unit.kernels.checks import Case, assert_matches_oracle, head_errors, make_inputs, oracle, run

C = chunked.chunk_size(16)
FLOAT32_BOUND = 1e-6
HALF_BOUND = {torch.bfloat16: 2.5e-3, torch.float16: 3e-4}  # about the rounding of the outputs themselves
RAGGED = (5, 0, C + 3, 1, 1, 2 * C, 0, 17)


@pytest.mark.parametrize("with_states", [False, True])
@pytest.mark.parametrize("tokens", [1, 2, C - 1, C, C + 1, 2 * C + 1])
def test_dense_lengths(tokens: int, with_states: bool) -> None:
    case = Case(tokens=tokens, batch=2, with_states=with_states)
    assert_matches_oracle(lightning_attention, case, FLOAT32_BOUND)


def test_four_thousand_tokens_in_segments() -> None:
    assert_matches_oracle(lightning_attention, Case(tokens=4097, heads=1, dim=8, layer=78, layers=80), FLOAT32_BOUND)


@pytest.mark.parametrize("with_states", [False, True])
@pytest.mark.parametrize(
    "documents", [RAGGED, (C, C, C), (1,) * 9, (0, 0, 40), (3 * C + 1, 2), (0, 0)], ids=lambda d: "-".join(map(str, d))
)
def test_packed_documents(documents: tuple[int, ...], with_states: bool) -> None:
    case = Case(tokens=sum(documents), documents=documents, with_states=with_states)
    assert_matches_oracle(lightning_attention, case, FLOAT32_BOUND)


@pytest.mark.parametrize("layer", [0, 40, 78])
def test_slopes_of_m1_layers(layer: int) -> None:
    case = Case(tokens=C + 9, heads=64, dim=4, layer=layer, layers=80)
    assert_matches_oracle(lightning_attention, case, FLOAT32_BOUND)


@pytest.mark.parametrize("heads, dim", [(3, 8), (6, 24), (1, 64), (2, 96)])
def test_odd_head_counts_and_widths(heads: int, dim: int) -> None:
    assert_matches_oracle(lightning_attention, Case(tokens=67, heads=heads, dim=dim), FLOAT32_BOUND)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("documents", [None, RAGGED])
def test_half_precision(dtype: torch.dtype, documents: tuple[int, ...] | None) -> None:
    tokens = sum(documents) if documents else 2 * C + 1
    case = Case(tokens=tokens, documents=documents, dtype=dtype)
    results = run(lightning_attention, case, make_inputs(case))
    assert results["o"].dtype == results["dq"].dtype == dtype
    assert results["final_state"].dtype == results["dinitial_state"].dtype == torch.float32
    assert_matches_oracle(lightning_attention, case, HALF_BOUND[dtype])


def test_head_groups_do_not_change_results(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(tokens=sum(RAGGED), heads=5, documents=RAGGED)
    together = run(lightning_attention, case, make_inputs(case))
    monkeypatch.setitem(chunked.GROUP_ELEMENTS, "cpu", 1)
    one_by_one = run(lightning_attention, case, make_inputs(case))
    for name, expected in together.items():
        torch.testing.assert_close(one_by_one[name], expected, rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize("with_states", [False, True])
@pytest.mark.parametrize("tokens", [2 * C, 3 * C + 5])
def test_segments_hand_on_their_states(tokens: int, with_states: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(chunked.SEGMENT_TOKENS, "cpu", 2 * C)  # one chunk for each row of the batch
    case = Case(tokens=tokens, batch=2, with_states=with_states)
    assert len(chunked._segments(make_inputs(case).qkv[..., :16], None)) == -(-tokens // C)
    assert_matches_oracle(lightning_attention, case, FLOAT32_BOUND)


@pytest.mark.parametrize("documents", [None, (3, 0, 20)])
def test_gradcheck(documents: tuple[int, ...] | None) -> None:
    case = Case(tokens=23 if documents else 19, dim=2, documents=documents, dtype=torch.float64)
    inputs = make_inputs(case)
    q, k, v = (x.contiguous().requires_grad_() for x in inputs.qkv.split(2, dim=-1))
    decay = slopes(2, 0, 8)

    def function(q, k, v, initial):
        return lightning_attention(
            q, k, v, decay, initial_state=initial, cu_seqlens=case.cu_seqlens, return_final_state=True
        )

    assert torch.autograd.gradcheck(function, (q, k, v, inputs.initial.requires_grad_()))


def test_strided_and_contiguous_inputs_agree_bitwise() -> None:
    case = Case(tokens=C + 7, batch=2, heads=3)
    q, k, v = make_inputs(case).qkv.split(case.dim, dim=-1)
    assert not q.is_contiguous()
    decay = slopes(3, 0, 8)
    expected = lightning_attention(q.contiguous(), k.contiguous(), v.contiguous(), decay)
    assert torch.equal(lightning_attention(q, k, v, decay), expected)
    head_first = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    assert torch.equal(lightning_attention(*head_first, decay), expected)


def test_inputs_are_left_as_they_were() -> None:
    case = Case(tokens=16, heads=1)  # one chunk, one head: the grid has the layout of the input
    inputs = make_inputs(case)
    before = inputs.qkv.clone(), inputs.initial.clone(), inputs.do.clone(), inputs.dfinal.clone()
    run(lightning_attention, case, inputs)
    for x, y in zip((inputs.qkv, inputs.initial, inputs.do, inputs.dfinal), before):
        assert torch.equal(x, y)


def test_padding_after_the_last_document_is_never_read() -> None:
    case = Case(tokens=C + 20, documents=(C, 7))
    inputs = make_inputs(case)
    inputs.qkv[:, C + 7 :] = float("nan")
    inputs.do[:, C + 7 :] = float("nan")
    poisoned = run(lightning_attention, case, inputs)
    for name in ("o", "dq", "dk", "dv"):
        assert torch.equal(poisoned[name][:, C + 7 :], torch.zeros(1, 13, 2, 16)), name
    short = Case(tokens=C + 7, documents=(C, 7))
    trimmed = run(
        lightning_attention,
        short,
        type(inputs)(inputs.qkv[:, : C + 7], inputs.initial, inputs.do[:, : C + 7], inputs.dfinal),
    )
    for name, expected in trimmed.items():
        actual = poisoned[name] if "state" in name else poisoned[name][:, : C + 7]
        assert torch.equal(actual, expected), name


def test_a_document_does_not_see_its_neighbours() -> None:
    case = Case(tokens=sum(RAGGED), documents=RAGGED)
    inputs = make_inputs(case)
    clean = run(lightning_attention, case, inputs)
    start, end = 5, 5 + C + 3
    inputs.qkv[:, start:end] = float("nan")
    inputs.initial[2] = float("nan")
    poisoned = run(lightning_attention, case, inputs)
    for name, expected in clean.items():
        actual = poisoned[name]
        assert actual.isnan().any(), name
        if "state" in name:
            actual, expected = (x[[0, 1, 3, 4, 5, 6, 7]] for x in (actual, expected))
        else:
            actual, expected = (torch.cat([x[:, :start], x[:, end:]], dim=1) for x in (actual, expected))
        assert torch.equal(actual, expected), name


def test_packed_equals_alone() -> None:
    case = Case(tokens=sum(RAGGED), documents=RAGGED)
    inputs = make_inputs(case)
    packed = run(lightning_attention, case, inputs)
    start = 0
    for index, length in enumerate(RAGGED):
        span = slice(start, start + length)
        start += length
        one = slice(index, index + 1)
        own = type(inputs)(inputs.qkv[:, span], inputs.initial[one], inputs.do[:, span], inputs.dfinal[one])
        alone = run(lightning_attention, Case(tokens=length), own)
        for name, expected in alone.items():
            actual = packed[name][one] if "state" in name else packed[name][:, span]
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_resumed_prefill_equals_one_pass() -> None:
    case = Case(tokens=2 * C + 30, batch=2, with_states=False)
    q, k, v = make_inputs(case).qkv.split(case.dim, dim=-1)
    decay = slopes(2, 0, 8)
    whole, final = lightning_attention(q, k, v, decay, return_final_state=True)
    for cut in (1, C, C + 11):
        head, state = lightning_attention(q[:, :cut], k[:, :cut], v[:, :cut], decay, return_final_state=True)
        tail, last = lightning_attention(
            q[:, cut:], k[:, cut:], v[:, cut:], decay, initial_state=state, return_final_state=True
        )
        torch.testing.assert_close(torch.cat([head, tail], dim=1), whole, rtol=1e-5, atol=2e-5)
        torch.testing.assert_close(last, final, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("with_states", [False, True])
@pytest.mark.parametrize("documents", [None, RAGGED])
def test_repeated_runs_are_bitwise_equal(documents: tuple[int, ...] | None, with_states: bool) -> None:
    """Also with deterministic algorithms, which fill new memory with NaN, and refuse what is not deterministic."""
    case = Case(tokens=sum(RAGGED), documents=documents, with_states=with_states)
    first = run(lightning_attention, case, make_inputs(case))
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(1).isnan()
        second = run(lightning_attention, case, make_inputs(case))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("slope", [0.0, 3.0, 200.0])
def test_extreme_slopes_stay_finite(slope: float) -> None:
    q, k, v = make_inputs(Case(tokens=3 * C + 5, heads=1)).qkv.split(16, dim=-1)
    decay = torch.tensor([slope])
    o, final = lightning_attention(q, k, v, decay, return_final_state=True)
    expected, expected_final = lightning_attention(
        q.double(), k.double(), v.double(), decay, return_final_state=True, implementation="reference"
    )
    torch.testing.assert_close(o.double(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(final.double(), expected_final, rtol=1e-4, atol=1e-4)


def test_gradient_of_the_final_state_alone() -> None:
    case = Case(tokens=C + 4)
    inputs = make_inputs(case)

    def gradients(implementation: str) -> list[torch.Tensor]:
        leaves = [inputs.qkv.clone().requires_grad_(), inputs.initial.clone().requires_grad_()]
        q, k, v = leaves[0].split(16, dim=-1)
        _, final = lightning_attention(
            q,
            k,
            v,
            slopes(2, 0, 8),
            initial_state=leaves[1],
            return_final_state=True,
            implementation=implementation,
        )
        return list(torch.autograd.grad(final, leaves, inputs.dfinal))

    for actual, expected in zip(gradients("torch"), gradients("reference")):
        assert expected.abs().max() > 0.1
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_backward_keeps_nothing_but_the_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(chunked.KEPT_TOKENS, "cpu", 0)
    case = Case(tokens=4 * C)
    inputs = make_inputs(case)
    qkv = inputs.qkv.requires_grad_()
    decay = slopes(2, 0, 8)
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        lightning_attention(*qkv.split(16, dim=-1), decay, initial_state=inputs.initial)
    storages = {x.untyped_storage().data_ptr() for x in saved}
    assert storages == {x.untyped_storage().data_ptr() for x in (qkv, decay, inputs.initial)}


@pytest.mark.parametrize("documents", [None, RAGGED])
@pytest.mark.parametrize("with_states, used", [(False, False), (True, False), (True, True)])
def test_kept_states_are_those_computed_again(
    monkeypatch: pytest.MonkeyPatch, documents: tuple[int, ...] | None, with_states: bool, used: bool
) -> None:
    """used: the final state has a gradient."""
    case = Case(tokens=sum(documents) if documents else 3 * C + 5, documents=documents)
    inputs = make_inputs(case)
    products = []
    states_of = chunked._states
    monkeypatch.setattr(chunked, "_states", lambda *given: products.append(1) or states_of(*given))

    def gradients(kept_tokens: int) -> list[torch.Tensor]:
        monkeypatch.setitem(chunked.KEPT_TOKENS, "cpu", kept_tokens)
        products.clear()
        leaves = [
            inputs.qkv.clone().requires_grad_(),
            *([inputs.initial.clone().requires_grad_()] if with_states else []),
        ]
        results = chunked.lightning_attention_packed_chunked(
            leaves[0],
            slopes(2, 0, 8),
            initial_state=leaves[1] if with_states else None,
            cu_seqlens=case.cu_seqlens,
            return_final_state=with_states,
        )
        outputs = results if with_states else (results,)
        given = (inputs.do, inputs.dfinal) if used else (inputs.do,)
        return list(torch.autograd.grad(outputs[: len(given)], leaves, given))

    again = gradients(0)
    assert len(products) == 2
    assert all(map(torch.equal, gradients(case.tokens), again))
    assert len(products) == 1


@pytest.mark.parametrize("activation", ["silu", None])
@pytest.mark.parametrize("documents", [None, RAGGED, (C, C)])
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 2e-6), (torch.bfloat16, 5e-3)])
def test_packed_projection_equals_its_parts(
    dtype: torch.dtype, bound: float, documents: tuple[int, ...] | None, activation: str | None
) -> None:
    case = Case(tokens=sum(documents) if documents else C + 9, documents=documents, dtype=dtype)
    inputs = make_inputs(case)

    def results(packed: bool) -> list[torch.Tensor]:
        qkv, initial = inputs.qkv.clone().requires_grad_(), inputs.initial.clone().requires_grad_()
        options = {"initial_state": initial, "cu_seqlens": case.cu_seqlens, "return_final_state": True}
        decay = slopes(2, 0, 8)
        if packed:
            o, final = chunked.lightning_attention_packed_chunked(qkv, decay, activation=activation, **options)
        else:
            active = torch.nn.functional.silu(qkv) if activation else qkv
            o, final = lightning_attention(*active.split(16, dim=-1), decay, implementation="torch", **options)
        torch.autograd.backward([o, final], [inputs.do, inputs.dfinal])
        return [o.detach(), final.detach(), qkv.grad, initial.grad]

    for actual, expected, heads in zip(results(True), results(False), (2, 1, 2, 1), strict=True):
        assert actual.dtype == expected.dtype
        assert head_errors(actual, expected.double(), heads).max() <= bound


def test_documents_are_not_looped_over() -> None:
    def operators(documents: tuple[int, ...]) -> int:
        inputs = make_inputs(Case(tokens=sum(documents), heads=1, documents=documents))
        qkv = inputs.qkv.requires_grad_()
        edges = torch.tensor([0, *documents], dtype=torch.int32).cumsum(0).int()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            o, final = lightning_attention(
                *qkv.split(16, dim=-1), slopes(1, 0, 8), cu_seqlens=edges, return_final_state=True
            )
            torch.autograd.backward([o, final], [inputs.do, inputs.dfinal])
        return sum(event.count for event in profile.key_averages())

    few, many = (C, 5), (C, *(1 + n % 7 for n in range(300)))
    assert operators(many) < operators(few) + 20


def test_padding_of_a_packed_projection_is_never_read() -> None:
    case = Case(tokens=C + 20, documents=(C, 7))
    inputs = make_inputs(case)
    gradients = []
    for padding in (1.0, float("nan")):
        qkv, do = inputs.qkv.clone(), inputs.do.clone()
        qkv[:, C + 7 :] = do[:, C + 7 :] = padding
        qkv.requires_grad_()
        o = chunked.lightning_attention_packed_chunked(qkv, slopes(2, 0, 8), cu_seqlens=case.cu_seqlens)
        o.backward(do)
        assert torch.equal(o[:, C + 7 :], torch.zeros(1, 13, 2, 16))
        gradients.append(qkv.grad)
    assert torch.equal(*gradients) and not gradients[0][:, C + 7 :].any()


@pytest.mark.parametrize("implementation", ["torch", "triton", "reference"])
@pytest.mark.parametrize("edges", [[0], [0, 0], [0, 0, 0], None], ids=str)
def test_without_a_token_in_any_document(edges: list[int] | None, implementation: str) -> None:
    """Packs that are all padding, which may be NaN, and a batch without rows: zeros, and states as they came."""
    device = "cuda" if implementation == "triton" and torch.cuda.is_available() else "cpu"
    rows, documents = (0, 0) if edges is None else (1, len(edges) - 1)
    qkv = torch.full((rows, 5, 2, 48), float("nan"), device=device, requires_grad=True)
    initial = torch.randn(documents, 2, 16, 16, device=device, requires_grad=True)
    cu_seqlens = None if edges is None else torch.tensor(edges, dtype=torch.int32, device=device)
    o, final = lightning_attention(
        *qkv.split(16, dim=-1), slopes(2, 0, 8).to(device), initial_state=initial, cu_seqlens=cu_seqlens,
        return_final_state=True, implementation=implementation,
    )  # fmt: skip
    dfinal = torch.randn(final.shape, device=device)
    torch.autograd.backward([o, final], [torch.ones_like(o), dfinal])
    assert o.shape == (rows, 5, 2, 16) and not o.any() and qkv.grad.shape == qkv.shape and not qkv.grad.any()
    assert torch.equal(final, initial)
    assert torch.equal(initial.grad, dfinal) or not documents


def test_the_oracle_is_not_trivial() -> None:
    for name, expected in oracle(Case(tokens=C + 1)).items():
        assert expected.abs().mean() > 0.1, name


def test_a_pack_of_equal_documents_is_the_dense_batch():
    q, k, v = (torch.randn(1, 96, 3, 16, requires_grad=True) for _ in range(3))
    s, state = slopes(3, 0, 4), torch.randn(3, 3, 16, 16)
    packed = lightning_attention(
        q,
        k,
        v,
        s,
        initial_state=state,
        cu_seqlens=torch.tensor([0, 32, 64, 96], dtype=torch.int32),
        return_final_state=True,
    )
    dense = lightning_attention(
        *(x.view(3, 32, 3, 16) for x in (q, k, v)), s, initial_state=state, return_final_state=True
    )
    assert torch.equal(packed[0].view(3, 32, 3, 16), dense[0]) and torch.equal(packed[1], dense[1])
