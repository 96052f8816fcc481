"""Decoding token by token: the recurrence, masked slots, a pool of states, on the torch path and in Triton."""

from collections.abc import Callable

import pytest
import torch
from m1_kernels import lightning_attention, lightning_attention_step, slopes
from m1_kernels.decode import STEP

from tests.unit.kernels.checks import Case, head_errors, make_inputs

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Step = Callable[..., torch.Tensor]


@pytest.fixture(params=list(STEP))
def step(request: pytest.FixtureRequest) -> Step:
    """lightning_attention_step of one implementation, on tensors of the CPU."""

    def run(*tensors: torch.Tensor, **options: torch.Tensor) -> torch.Tensor:
        q, k, v, state, decay = (x.to(DEVICE) for x in tensors)
        options = {name: x.to(DEVICE) for name, x in options.items()}
        out = lightning_attention_step(q, k, v, state, decay, implementation=request.param, **options)
        tensors[3].copy_(state)
        return out.cpu()

    return run


def token_inputs(batch: int, heads: int, dim: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """q, k, v [B, H, D], views of one packed projection."""
    return [
        x[:, 0] for x in make_inputs(Case(tokens=1, batch=batch, heads=heads, dim=dim, dtype=dtype)).qkv.split(dim, -1)
    ]


def exact_step(q, k, v, state, decay):
    """(out, next state) in float64."""
    q, k, v, state = (x.double() for x in (q, k, v, state))
    state = torch.exp(-decay.double())[:, None, None] * state + k[..., :, None] * v[..., None, :]
    return torch.einsum("bhk,bhkv->bhv", q, state), state


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-6), (torch.bfloat16, 4e-3), (torch.float16, 5e-4)])
@pytest.mark.parametrize("dim", [16, 96])
def test_one_step_matches_fp64(step: Step, dtype: torch.dtype, bound: float, dim: int) -> None:
    q, k, v = token_inputs(3, 2, dim, dtype)
    assert not q.is_contiguous()
    state, decay = torch.randn(3, 2, dim, dim), slopes(2, 3, 8)
    out, expected = exact_step(q, k, v, state, decay)
    actual = step(q, k, v, state, decay)
    assert actual.dtype == dtype and actual.shape == (3, 2, dim)
    assert head_errors(actual, out, 1).max() <= bound
    assert head_errors(state, expected, 1).max() <= 1e-6
    transposed = [x.transpose(0, 1).contiguous().transpose(0, 1).mT.contiguous().mT for x in (q, k, v)]
    again = state.clone()
    torch.testing.assert_close(step(*transposed, again, decay), step(q, k, v, state, decay), rtol=0, atol=0)
    assert torch.equal(again, state)


@pytest.mark.parametrize("dtype, tokens, bound", [(torch.float32, 4200, 5e-6), (torch.bfloat16, 200, 3e-3)])
def test_decode_continues_prefill(dtype: torch.dtype, tokens: int, bound: float) -> None:
    case = Case(tokens=tokens, batch=2, heads=3, dtype=dtype)
    q, k, v = make_inputs(case).qkv.split(case.dim, dim=-1)
    decay = slopes(3, 6, 8)
    expected, final = lightning_attention(q, k, v, decay, return_final_state=True)
    prefix = 70
    _, state = lightning_attention(q[:, :prefix], k[:, :prefix], v[:, :prefix], decay, return_final_state=True)
    steps = [lightning_attention_step(q[:, t], k[:, t], v[:, t], state, decay) for t in range(prefix, case.tokens)]
    assert steps[0].dtype == dtype
    assert head_errors(torch.stack(steps, dim=1), expected[:, prefix:].double(), 2).max() <= bound
    assert head_errors(state, final.double(), 1).max() <= 5e-6


@pytest.mark.parametrize("implementation, tokens, bound", [("torch", 4000, 1e-6), ("triton", 30, 1e-7)])
def test_thousands_of_steps_do_not_drift(implementation: str, tokens: int, bound: float) -> None:
    """A state that only decays, in four heads of M1's last lightning layer. The mean over a state shows drift and hides roundings: with
    exp(-slope) rounded to float32 it is 1e-4 after 4000 tokens, 8e-7 after 30.
    """
    decay = slopes(64, 78, 80)[[20, 40, 48, 63]].to(DEVICE)
    start = (torch.rand(1, 4, 16, 16, generator=torch.Generator().manual_seed(0)) + 1.0).to(DEVICE)
    state, zero = start.clone(), torch.zeros(1, 4, 16, device=DEVICE)
    for _ in range(tokens):
        lightning_attention_step(zero, zero, zero, state, decay, implementation=implementation)
    expected = start.double() * torch.exp(-decay.double() * tokens)[:, None, None]
    drift = ((state.double() - expected) / expected).mean((0, 2, 3))
    assert drift.abs().max() <= bound, drift


def test_masked_slots_keep_every_bit_and_yield_zero(step: Step) -> None:
    q, k, v = (x.clone() for x in token_inputs(3, 2, 16, torch.float32))
    for x in (q, k, v):
        x[1] = float("nan")
    state, decay = torch.randn(3, 2, 16, 16), slopes(2, 0, 8)
    state[1, 0, 0, :2] = torch.tensor([-0.0, float("nan")])
    before = state.clone()
    out = step(q, k, v, state, decay, active=torch.tensor([True, False, True]))
    assert torch.equal(state[1].view(torch.int32), before[1].view(torch.int32))
    assert torch.equal(out[1], torch.zeros(2, 16))
    live, exact = exact_step(q[[0, 2]], k[[0, 2]], v[[0, 2]], before[[0, 2]], decay)
    assert head_errors(out[[0, 2]], live, 1).max() <= 1e-6
    assert head_errors(state[[0, 2]], exact, 1).max() <= 1e-6
    assert not torch.equal(state[0], before[0])


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_slots_pick_rows_of_a_pool(step: Step, dtype: torch.dtype) -> None:
    q, k, v = (x.clone() for x in token_inputs(4, 2, 16, torch.float32))
    # Row 0 is what a row of -1 would reach.
    guarded, decay = torch.randn(7, 2, 16, 16), slopes(2, 0, 8)
    guard, pool = guarded[0].clone(), guarded[1:]
    before, slots = pool.clone(), torch.tensor([5, -1, 0, 2], dtype=dtype)
    q[1] = float("nan")
    out = step(q, k, v, pool, decay, slots=slots, active=torch.tensor([True, True, True, False]))
    used, rows = [0, 2], [5, 0]
    live, exact = exact_step(q[used], k[used], v[used], before[rows], decay)
    assert head_errors(out[used], live, 1).max() <= 1e-6
    assert head_errors(pool[rows], exact, 1).max() <= 1e-6
    assert torch.equal(out[[1, 3]], torch.zeros(2, 2, 16))
    assert torch.equal(pool[[1, 2, 3, 4]], before[[1, 2, 3, 4]])
    assert torch.equal(guarded[0], guard)


def test_a_slot_past_the_pool_touches_no_memory() -> None:
    """The kernel cannot refuse it on a GPU; it is as none."""
    q, k, v = (x.to(DEVICE) for x in token_inputs(3, 2, 16, torch.float32))
    guarded, slots = torch.randn(5, 2, 16, 16, device=DEVICE), torch.tensor([1, 3, 2**31 - 1], dtype=torch.int32)
    before, decay = guarded.clone(), slopes(2, 0, 8).to(DEVICE)
    out = lightning_attention_step(q, k, v, guarded[:2], decay, slots=slots.to(DEVICE), implementation="triton")
    assert not out[1:].any() and out[0].any()
    assert torch.equal(guarded[[0, 2, 3, 4]], before[[0, 2, 3, 4]]) and not torch.equal(guarded[1], before[1])


def test_without_sequences(step: Step) -> None:
    empty = torch.zeros(0, 2, 16)
    assert step(empty, empty, empty, torch.zeros(0, 2, 16, 16), slopes(2, 0, 8)).shape == (0, 2, 16)


def test_wrong_inputs_are_refused_with_a_remedy() -> None:
    q, state, decay = torch.zeros(1, 2, 4), torch.zeros(1, 2, 4, 4), slopes(2, 0, 8)
    low = q.bfloat16()
    refused = [
        ((low, low, low, state.bfloat16(), decay), {}, r"must be torch\.float32"),
        ((q, low, q, state, decay), {}, "must share one dtype"),
        ((q, q, q, state.expand(2, -1, -1, -1), decay), {}, r"must be torch\.float32 \(1, 2, 4, 4\)"),
        ((q, q, q, state.mT, decay), {}, "must be contiguous"),
        ((q, q, q, state, decay[:1]), {}, r"must be float32 \[2\]"),
        ((q, q, q, state, -decay), {}, "must be >= 0"),
        ((q, q, q, state, decay.to("meta")), {}, "slopes on meta"),
        ((q, q, q, state, decay), {"slots": torch.tensor([1])}, "slot 1 is past the 1 rows of state"),
        ((q, q, q, state, decay), {"active": torch.ones(1)}, r"must be bool \[1\]"),
        ((q, q, q, state, decay), {"slots": torch.zeros(2, dtype=torch.int32)}, r"must be int32 \[1\]"),
        ((q, q, q, state, decay), {"implementation": "fla"}, "use one of auto, triton, torch"),
    ]
    for inputs, options, message in refused:
        with pytest.raises(ValueError, match=message):
            lightning_attention_step(*inputs, **options)
