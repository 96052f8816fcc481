"""Decoding token by token against prefill."""

import pytest
import torch
from m1_kernels import lightning_attention, lightning_attention_step, slopes

from tests.unit.kernels.checks import Case, head_errors, make_inputs


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 2e-6), (torch.bfloat16, 3e-3)])
def test_decode_continues_prefill(dtype: torch.dtype, bound: float) -> None:
    case = Case(tokens=200, batch=2, heads=3, dtype=dtype)
    q, k, v = make_inputs(case).qkv.split(case.dim, dim=-1)
    decay = slopes(3, 6, 8)
    expected, final = lightning_attention(q, k, v, decay, return_final_state=True)
    prefix = 70
    _, state = lightning_attention(q[:, :prefix], k[:, :prefix], v[:, :prefix], decay, return_final_state=True)
    steps = [lightning_attention_step(q[:, t], k[:, t], v[:, t], state, decay) for t in range(prefix, case.tokens)]
    assert steps[0].dtype == dtype
    assert head_errors(torch.stack(steps, dim=1), expected[:, prefix:].double(), 2).max() <= bound
    assert head_errors(state, final.double(), 1).max() <= 2e-6


def test_inactive_slots_keep_their_state() -> None:
    q, k, v = (x[:, 0] for x in make_inputs(Case(tokens=1, batch=3)).qkv.split(16, dim=-1))
    q, k, v = q.clone(), k.clone(), v.clone()
    for x in (q, k, v):
        x[1] = float("nan")
    state = torch.randn(3, 2, 16, 16)
    before = state.clone()
    decay = slopes(2, 0, 8)
    o = lightning_attention_step(q, k, v, state, decay, active=torch.tensor([True, False, True]))
    assert torch.equal(state[1], before[1])
    assert torch.equal(o[1], torch.zeros(2, 16))
    alone = before[[0, 2]]
    expected = lightning_attention_step(q[[0, 2]], k[[0, 2]], v[[0, 2]], alone, decay)
    torch.testing.assert_close(o[[0, 2]], expected)
    torch.testing.assert_close(state[[0, 2]], alone)
    assert not torch.equal(state[0], before[0])


def test_a_low_precision_state_is_refused() -> None:
    q = torch.zeros(1, 2, 4, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"must be torch\.float32"):
        lightning_attention_step(q, q, q, torch.zeros(1, 2, 4, 4, dtype=torch.bfloat16), slopes(2, 0, 8))
