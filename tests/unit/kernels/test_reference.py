"""The recurrence against the closed form, written out as a T x T matrix of decays."""

import torch
from m1_kernels import lightning_attention_reference, slopes

from tests.unit.kernels.checks import Case, make_inputs


def closed_form(q, k, v, decay, initial):
    """o_i = e^{-s(i+1)} q_i S0 + sum_{j<=i} e^{-s(i-j)} (q_i . k_j) v_j for one document, [T, H, D]."""
    position = torch.arange(len(q))
    distance = position[:, None] - position[None, :]
    weights = torch.exp(-decay[:, None, None] * distance.clamp(min=0)) * (distance >= 0)
    inside = torch.einsum("ihd,jhd,hij,jhe->ihe", q, k, weights, v)
    carried = torch.exp(-decay[None, :] * (position[:, None] + 1))[..., None] * torch.einsum("ihd,hde->ihe", q, initial)
    return inside + carried


def test_reference_equals_closed_form() -> None:
    documents = (4, 0, 1, 9)
    case = Case(tokens=sum(documents), heads=3, dim=5, documents=documents, dtype=torch.float64)
    inputs = make_inputs(case)
    q, k, v = inputs.qkv.split(5, dim=-1)
    decay = slopes(3, 1, 8)
    o, final = lightning_attention_reference(
        q, k, v, decay, initial_state=inputs.initial, cu_seqlens=case.cu_seqlens, return_final_state=True
    )
    start = 0
    for index, length in enumerate(documents):
        span = slice(start, start + length)
        start += length
        expected = closed_form(q[0, span], k[0, span], v[0, span], decay.double(), inputs.initial[index])
        torch.testing.assert_close(o[0, span], expected, rtol=1e-12, atol=1e-12)
        # reading the final state with a unit query, one decay later, is one more output of the closed form
        probe = torch.eye(5, dtype=torch.float64)[:, None, :].expand(5, 3, 5)
        zero = torch.zeros(1, 3, 5, dtype=torch.float64)
        for row in range(5):
            extended = [torch.cat([x[0, span], y]) for x, y in zip((q, k, v), (probe[row : row + 1], zero, zero))]
            read = closed_form(*extended, decay.double(), inputs.initial[index])[-1]
            step = torch.exp(-decay.double())[:, None]
            torch.testing.assert_close(step * final[index, :, row], read, rtol=1e-12, atol=1e-12)


def test_gradcheck() -> None:
    case = Case(tokens=6, dim=2, documents=(2, 0, 4), dtype=torch.float64)
    inputs = make_inputs(case)
    q, k, v = (x.contiguous().requires_grad_() for x in inputs.qkv.split(2, dim=-1))

    def function(q, k, v, initial):
        return lightning_attention_reference(
            q, k, v, slopes(2, 0, 8), initial_state=initial, cu_seqlens=case.cu_seqlens, return_final_state=True
        )

    assert torch.autograd.gradcheck(function, (q, k, v, inputs.initial.requires_grad_()))
