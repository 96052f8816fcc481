"""SiLU on a GPU with specialised sweeps: in the forward sweep, and by the pass of its own that has the same bits."""

import itertools
from collections.abc import Sequence

import pytest
import torch
from m1_kernels import lightning_attention_packed, slopes, triton_attention
from m1_kernels.triton_attention import WHOLE, _Call, _packed_forward, _Plan, _silu

from tests.gpu.lightning_checks import DEVICE, error_per_head
from tests.unit.kernels.checks import ulps_apart

pytestmark = pytest.mark.gpu

D, HEADS, TOKENS = 128, 4, 4098
DOCUMENTS = (700, 0, 1, 2048, 63, 65, 64, 1, 1120)
COVERED = sum(DOCUMENTS)
PLAN = _Plan(WHOLE, WHOLE, WHOLE)
SAVED = _Plan(WHOLE, 1024, WHOLE)
Results = tuple[torch.Tensor | None, ...]


@pytest.fixture(autouse=True)
def hopper() -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("no specialised sweeps on this GPU")


def projection(dtype: torch.dtype = torch.bfloat16, batch: int = 1, *, documents: Sequence[int] | None = None):
    """[B, T, H, 3D], normal random numbers, in bfloat16 times 4: the tails of SiLU. In float16 o would overflow. Padding is NaN."""
    generator = torch.Generator(DEVICE).manual_seed(batch)
    x = torch.randn(batch, TOKENS, HEADS, 3 * D, device=DEVICE, generator=generator)
    x = x.mul_(4 if dtype == torch.bfloat16 else 1).to(dtype)
    if documents is not None:
        x[:, sum(documents) :] = float("nan")
    return x


def given(batch: int, documents: Sequence[int] | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Slopes, initial states, cu_seqlens."""
    decay = slopes(64, 40, 80)[torch.linspace(0, 63, HEADS).long()].to(DEVICE)
    count, edges = batch, None
    if documents is not None:
        count = len(documents)
        edges = torch.tensor([0, *itertools.accumulate(documents)], dtype=torch.int32, device=DEVICE)
    return decay, torch.linspace(-1, 1, count * HEADS * D * D, device=DEVICE).view(count, HEADS, D, D), edges


@pytest.fixture(autouse=True)
def states_of_zeros(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of a pack leave some places as they are."""
    states = _Call.states
    monkeypatch.setattr(_Call, "states", lambda call, segment: states(call, segment).zero_())


def run(
    qkv: torch.Tensor,
    plan: _Plan = PLAN,
    documents: Sequence[int] | None = None,
    *,
    activate: bool = True,
    keeping: bool = True,
) -> Results:
    """o, final state, states where spans meet, activated qkv; None where there is none."""
    decay, initial, edges = given(len(qkv), documents)
    call = _Call.of(qkv[..., :D], decay, edges)
    return _packed_forward(call, plan, qkv, initial, activate=activate, keeping=keeping, saving=True, leaving=True)


def silu(qkv: torch.Tensor) -> torch.Tensor:
    """By the pass of its own."""
    return _silu(_Call.of(qkv[..., :D], given(1, None)[0], None), qkv)


def assert_equal(found: Results, expected: Results) -> None:
    for one, other in zip(found, expected, strict=True):
        assert (one is None and other is None) or torch.equal(one, other)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_the_pass_is_torch_to_a_rounding_on_every_number(dtype: torch.dtype) -> None:
    """In any order; below -43 it is zero to 1e-17."""
    every = torch.arange(-32768, 32768, dtype=torch.int16).view(dtype)
    numbers = every[~every.isnan()]
    x = torch.zeros(1, 171, 1, 3 * D, dtype=dtype)
    x.view(-1)[: len(numbers)] = numbers[torch.randperm(len(numbers), generator=torch.Generator().manual_seed(0))]
    x = x.to(DEVICE)
    found = silu(x)
    apart = ulps_apart(found, torch.nn.functional.silu(x))[x >= -43]
    assert apart.max() <= 1 and (apart > 0).float().mean() < 1e-3
    assert found[x < -43].double().abs().max() < 1e-17 and not found.isnan().any()


def test_the_pass_takes_any_order_in_memory() -> None:
    """Its result is in that order too where it is dense, with tokens in front of heads."""
    x = projection(batch=2)[:, :77]  # 77 * 2 * 4 * 384 is no multiple of a program's elements
    expected = silu(x.contiguous())
    for order in ((0, 1, 2), (1, 0, 2), (0, 2, 1), (2, 0, 1)):
        turned = x.permute(*order, 3).contiguous().permute(*torch.tensor(order).argsort().tolist(), 3)
        found = silu(turned)
        assert torch.equal(found, expected)
        assert found.stride() == (turned if order == (1, 0, 2) else expected).stride()
    assert torch.equal(silu(x), expected)


@pytest.mark.parametrize(
    "dtype, documents, plan",
    [
        (torch.bfloat16, None, PLAN),
        (torch.float16, None, PLAN),
        (torch.bfloat16, DOCUMENTS, SAVED),
    ],
    ids=["bf16 dense", "fp16 dense", "bf16 packed"],
)
def test_the_sweep_has_the_bits_of_a_pass_and_a_sweep(dtype: torch.dtype, documents, plan: _Plan) -> None:
    qkv = projection(dtype, 1 if documents else 2, documents=documents)
    covered = sum(documents or (TOKENS,))
    *found, activated = run(qkv, plan, documents)
    apart = silu(qkv)
    assert torch.equal(activated[:, :covered], apart[:, :covered])
    assert_equal(found, run(apart, plan, documents, activate=False)[:3])
    assert (found[2] is None) == (plan.save == WHOLE) and not found[0][:, covered:].any()
    *others, kept = run(qkv, plan, documents, keeping=False)
    assert_equal(others, found)
    assert kept is None


def test_no_gradient_depends_on_who_applies_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sweep, or the pass in front of whole heads; kept, or computed again in the backward."""
    qkv, do = projection(documents=DOCUMENTS), projection(documents=DOCUMENTS)[..., :D].contiguous()
    decay, initial, edges = given(1, DOCUMENTS)
    expected: Results = ()
    for whole, recompute in itertools.product((False, True), repeat=2):
        plan = _Plan(WHOLE, 1024, WHOLE, forward_whole=whole)
        monkeypatch.setattr(_Plan, "of", lambda *_, plan=plan: plan)
        leaf, state = qkv.clone().requires_grad_(), initial.clone().requires_grad_()
        o, final = lightning_attention_packed(
            leaf, decay, initial_state=state, cu_seqlens=edges, return_final_state=True,
            recompute_activation=recompute, implementation="triton",
        )  # fmt: skip
        found = (o, final, *torch.autograd.grad((o, final), (leaf, state), (do, initial)))
        assert all(x.isfinite().all() and x.any() for x in found)
        assert not found[0][:, COVERED:].any() and not found[2][:, COVERED:].any()
        assert_equal(found, expected or found)
        expected = found


def test_only_rows_of_documents_are_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory of one token more on both sides, and of padding, keeps its numbers."""
    qkv = projection(documents=DOCUMENTS)
    room = torch.full((1, TOKENS + 2, HEADS, 3 * D), 7.0, device=DEVICE, dtype=torch.bfloat16)
    output_like, expected = triton_attention._output_like, silu(qkv)
    monkeypatch.setattr(
        triton_attention, "_output_like", lambda x: room[:, 1:-1] if x.shape[-1] == 3 * D else output_like(x)
    )
    activated = run(qkv, SAVED, DOCUMENTS)[3]
    assert activated.data_ptr() == room[:, 1:].data_ptr()
    assert (room[:, 0] == 7).all() and (room[:, 1 + COVERED :] == 7).all()
    assert torch.equal(activated[:, :COVERED], expected[:, :COVERED])


def test_time_major_projections_are_read_in_place() -> None:
    straight = projection(batch=2)
    turned = straight.transpose(0, 1).contiguous().transpose(0, 1)
    found = run(turned)
    assert found[3].stride() == turned.stride()
    assert_equal(found, run(straight))


def test_runs_repeat_bitwise_and_in_a_graph() -> None:
    qkv = projection(documents=DOCUMENTS)
    decay, initial, edges = given(1, DOCUMENTS)
    call = _Call.of(qkv[..., :D], decay, edges)
    options = {"activate": True, "keeping": True, "saving": True, "leaving": True}

    def step() -> Results:
        o, final, states, activated = _packed_forward(call, SAVED, qkv, initial, **options)
        return o, final, states, activated[:, :COVERED]

    first = step()
    for _ in range(5):
        assert_equal(step(), first)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = step()
    graph.replay()
    assert_equal(kept, first)


def test_nan_stays_in_its_pair_of_channels_of_v() -> None:
    qkv = projection(batch=2)
    clean = run(qkv)
    qkv[0, 100, 1, 2 * D + 5] = float("nan")
    dirty = run(qkv)
    assert dirty[3][0, 100, 1, 2 * D + 4 : 2 * D + 6].isnan().all() and dirty[3].isnan().sum() == 2
    assert dirty[0][0, 100:, 1, 4:6].isnan().all()
    for x in (clean[0], dirty[0]):
        x[0, :, 1, 4:6] = 0
    assert torch.equal(clean[0], dirty[0])


def test_the_operator_takes_it() -> None:
    """With the error of the same operator after torch's SiLU; without gradients nothing of qkv's size is allocated."""
    qkv = projection(batch=2)
    decay, initial, _ = given(2, None)
    exact = lightning_attention_packed(qkv.double(), decay, initial_state=initial.double(), implementation="torch")
    options = {
        "initial_state": initial,
        "return_final_state": True,
        "implementation": "triton",
        "strategy": "fused",
    }
    apart = lightning_attention_packed(torch.nn.functional.silu(qkv), decay, activation=None, **options)[0]
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    ours = lightning_attention_packed(qkv, decay, **options)[0]
    assert torch.cuda.max_memory_allocated() - before < 0.5 * qkv.numel() * qkv.element_size()
    assert (error_per_head(ours, exact, "o") <= 1.05 * error_per_head(apart, exact, "o")).all()
