"""The Triton kernels of lightning attention: in the interpreter without a GPU, compiled where there is one."""

import functools
from collections.abc import Callable

import pytest
import torch
from m1_kernels import lightning_attention, lightning_attention_packed, slopes, triton_attention
from m1_kernels.triton_attention import CHUNK, lightning_state_triton

from tests.unit.kernels.checks import Case, assert_matches_oracle, make_inputs, run

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


@pytest.mark.parametrize("layer", [0, 78])
def test_slopes_of_m1_layers(layer: int) -> None:
    case = Case(tokens=C + 9, heads=8, dim=16, layer=layer, layers=80)
    assert_matches_oracle(triton_with("segmented"), case, FLOAT32_BOUND)


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


@pytest.mark.parametrize("strategy", ["fused", "segmented"])
def test_a_packed_document_is_bitwise_the_same_alone(strategy: str) -> None:
    q, k, v, decay = pack()
    first, last = 37, 37 + 2 * CHUNK + 5
    edges = torch.tensor([0, first, last, q.shape[1]], dtype=torch.int32, device=DEVICE)
    packed = gradients(q, k, v, decay, cu_seqlens=edges, strategy=strategy)
    alone = gradients(*(x[:, first:last] for x in (q, k, v)), decay, strategy=strategy)
    for together, single in zip(packed, alone, strict=True):
        assert torch.equal(together[:, first:last], single)


@pytest.mark.parametrize("strategy", ["fused", "auto"])
def test_runs_repeat_bitwise(strategy: str) -> None:
    for once, again in zip(gradients(*pack(), strategy=strategy), gradients(*pack(), strategy=strategy), strict=True):
        assert torch.equal(once, again)


def test_a_resumed_prefill_is_bitwise_the_whole_one() -> None:
    q, k, v, decay = pack()
    whole, final = attend(q, k, v, decay, strategy="fused")
    cut = 3 * CHUNK
    head, state = attend(*(x[:, :cut] for x in (q, k, v)), decay, strategy="fused")
    tail, resumed = attend(*(x[:, cut:] for x in (q, k, v)), decay, strategy="fused", initial_state=state)
    assert torch.equal(torch.cat([head, tail], dim=1), whole)
    assert torch.equal(resumed, final)


def test_nan_of_neighbours_and_padding_stays_there() -> None:
    q, k, v, decay = pack()
    edges = torch.tensor([0, 70, 71, 200], dtype=torch.int32, device=DEVICE)
    clean = gradients(q, k, v, decay, cu_seqlens=edges, strategy="segmented")
    poisoned = [x.clone() for x in (q, k, v)]
    for x in poisoned:
        x[:, 70] = float("nan")
        x[:, 200:] = float("nan")
    dirty = gradients(*poisoned, decay, cu_seqlens=edges, strategy="segmented")
    for expected, x in zip(clean, dirty, strict=True):
        assert torch.equal(x[:, :70], expected[:, :70])
        assert torch.equal(x[:, 71:200], expected[:, 71:200])
        assert not x[:, 200:].any()


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
