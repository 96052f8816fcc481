"""SiLU inside the forward sweep of the packed operator, at M1's head width."""

import itertools
from collections.abc import Sequence

import pytest
import torch
from m1_kernels import lightning_attention_packed, slopes, triton_attention
from m1_kernels.triton_attention import WHOLE, _Call, _packed_forward, _Plan

from tests.gpu.lightning_checks import DEVICE, error_per_head

pytestmark = pytest.mark.gpu

D, HEADS, TOKENS = 128, 4, 4098
DOCUMENTS = (700, 0, 1, 2048, 63, 65, 64, 1, 1120)
PLANS = {"whole documents": _Plan(WHOLE, WHOLE, WHOLE), "saved states": _Plan(WHOLE, 1024, WHOLE)}
Results = tuple[torch.Tensor, ...]


def projection(dtype: torch.dtype, batch: int = 1, *, time_major: bool = False) -> torch.Tensor:
    """[B, T, H, 3D], normal random numbers, in bfloat16 times 4: SiLU's curve and its tails. In float16 o would overflow."""
    generator = torch.Generator(DEVICE).manual_seed(batch)
    shape = (TOKENS, batch, HEADS, 3 * D) if time_major else (batch, TOKENS, HEADS, 3 * D)
    x = torch.randn(shape, device=DEVICE, generator=generator).mul_(4 if dtype == torch.bfloat16 else 1).to(dtype)
    return x.transpose(0, 1) if time_major else x


def run(
    qkv: torch.Tensor,
    plan: _Plan,
    documents: Sequence[int] | None = None,
    *,
    activate: bool = True,
    saving: bool = True,
) -> Results:
    """o, final state, states where spans meet, activated qkv; None where there is none."""
    edges, count = None, len(qkv)
    if documents is not None:
        edges, count = (
            torch.tensor([0, *itertools.accumulate(documents)], dtype=torch.int32, device=DEVICE),
            len(documents),
        )
    decay = slopes(64, 40, 80)[torch.linspace(0, 63, HEADS).long()].to(DEVICE)
    initial = torch.linspace(-1, 1, count * HEADS * D * D, device=DEVICE).view(count, HEADS, D, D)
    call = _Call.of(qkv[..., :D], decay, edges)
    return _packed_forward(call, plan, qkv, initial, activate=activate, saving=saving, leaving=True)


def ulps_apart(actual: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    def order(x: torch.Tensor) -> torch.Tensor:
        bits = x.view(torch.int16).int()
        return torch.where(bits < 0, -(bits & 0x7FFF), bits)

    return (order(actual) - order(expected)).abs()


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
@pytest.mark.parametrize("documents", [None, DOCUMENTS], ids=["dense", "packed"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_results_are_those_of_the_activated_tensor(dtype: torch.dtype, documents, plan: _Plan) -> None:
    """Which is torch's to a rounding; padding is NaN and no result of it written but zeros."""
    qkv = projection(dtype, 1 if documents else 2)
    covered = sum(documents or (TOKENS,))
    qkv[:, covered:] = float("nan")
    o, final, states, activated = run(qkv, plan, documents)
    apart = ulps_apart(activated[:, :covered], torch.nn.functional.silu(qkv[:, :covered]))
    assert apart.max() <= 1 and (apart > 0).float().mean() < 1e-3
    live = activated.clone()
    live[:, covered:] = float("nan")
    for actual, expected in zip((o, final, states), run(live, plan, documents, activate=False)):
        assert (actual is None and expected is None) or torch.equal(actual, expected)
    assert (states is None) == (plan.save == WHOLE) and not o[:, covered:].any()
    alone, final_alone, _, kept = run(qkv, plan, documents, saving=False)
    assert torch.equal(alone, o) and torch.equal(final_alone, final) and kept is None


@pytest.mark.parametrize("documents", [None, DOCUMENTS], ids=["dense", "packed"])
def test_only_rows_of_documents_are_written(documents, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory of one token more on both sides, and of padding, keeps its numbers."""
    qkv = projection(torch.bfloat16)
    room = torch.full((1, TOKENS + 2, HEADS, 3 * D), 7.0, device=DEVICE, dtype=torch.bfloat16)
    output_like = triton_attention._output_like
    monkeypatch.setattr(
        triton_attention, "_output_like", lambda x: room[:, 1:-1] if x.shape[-1] == 3 * D else output_like(x)
    )
    activated = run(qkv, PLANS["whole documents"], documents)[3]
    covered = sum(documents or (TOKENS,))
    assert activated.data_ptr() == room[:, 1:].data_ptr()
    assert (room[:, 0] == 7).all() and (room[:, 1 + covered :] == 7).all()
    assert ulps_apart(activated[:, :covered], torch.nn.functional.silu(qkv[:, :covered])).max() <= 1


def test_time_major_projections_are_read_in_place() -> None:
    qkv = projection(torch.bfloat16, 2, time_major=True)
    plan = PLANS["whole documents"]
    turned, straight = run(qkv, plan), run(qkv.contiguous(), plan)
    assert turned[3].stride() == torch.nn.functional.silu(qkv).stride() == qkv.stride()
    for one, other in zip(turned, straight):
        assert (one is None and other is None) or torch.equal(one, other)


def test_runs_repeat_bitwise_and_in_a_graph() -> None:
    qkv, plan = projection(torch.bfloat16), PLANS["whole documents"]
    first = run(qkv, plan, DOCUMENTS)
    covered = sum(DOCUMENTS)

    def same(found: Results) -> bool:
        return all(
            (one is None and other is None) or torch.equal(one[:, :covered], other[:, :covered])
            for one, other in zip(found, first)
        )

    for _ in range(5):
        assert same(run(qkv, plan, DOCUMENTS))
    graph = torch.cuda.CUDAGraph()
    edges = torch.tensor([0, *itertools.accumulate(DOCUMENTS)], dtype=torch.int32, device=DEVICE)
    decay = slopes(64, 40, 80)[torch.linspace(0, 63, HEADS).long()].to(DEVICE)
    call = _Call.of(qkv[..., :D], decay, edges)
    initial = torch.linspace(-1, 1, len(DOCUMENTS) * HEADS * D * D, device=DEVICE).view(-1, HEADS, D, D)
    with torch.cuda.graph(graph):
        kept = _packed_forward(call, plan, qkv, initial, activate=True, saving=True, leaving=True)
    graph.replay()
    assert same(kept)


def test_nan_stays_in_its_pair_of_channels_of_v() -> None:
    qkv = projection(torch.bfloat16)
    clean = run(qkv, PLANS["whole documents"])
    qkv[:, 100, 1, 2 * D + 5] = float("nan")
    dirty = run(qkv, PLANS["whole documents"])
    assert dirty[3][0, 100, 1, 2 * D + 4 : 2 * D + 6].isnan().all() and dirty[3].isnan().sum() == 2
    assert dirty[0][:, 100:, 1, 4:6].isnan().all()
    for x in (clean[0], dirty[0]):
        x[:, :, 1, 4:6] = 0
    assert torch.equal(clean[0], dirty[0])


def test_the_operator_takes_it() -> None:
    """With the error of the same operator after a pass of its own; without gradients nothing of qkv's size is allocated."""
    qkv = projection(torch.bfloat16)
    decay = slopes(64, 40, 80)[torch.linspace(0, 63, HEADS).long()].to(DEVICE)
    exact = lightning_attention_packed(qkv.double(), decay, implementation="torch")
    options = {"implementation": "triton", "strategy": "fused"}
    apart = lightning_attention_packed(torch.nn.functional.silu(qkv), decay, activation=None, **options)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    ours = lightning_attention_packed(qkv, decay, **options)
    assert torch.cuda.max_memory_allocated() - before < 0.5 * qkv.numel() * qkv.element_size()
    assert (error_per_head(ours, exact, "o") <= 1.05 * error_per_head(apart, exact, "o")).all()
