"""The Triton kernels of the gated norm and SwiGLU against float64 autograd; in Triton's interpreter where there is no GPU."""

import pytest
import torch
from m1_kernels import gated_rms_norm, swiglu, triton_norm

from tests.unit.kernels.pointwise_cases import (
    DEVICE,
    assert_matches_fp64,
    leaves,
    plain_gated_rms_norm,
    plain_swiglu,
    run,
)

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
EPS = 0.1


def norm(x: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return gated_rms_norm(x, gate, weight, EPS, implementation="triton")


def plain(x: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return plain_gated_rms_norm(x, gate, weight, EPS)


def glu(gate_up: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return swiglu(gate_up, scale, implementation="triton")


@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_matches_fp64(dtype: torch.dtype) -> None:
    assert_matches_fp64(norm, plain, leaves((3, 2, 100), (3, 2, 100), (100,), dtype=dtype, device=DEVICE))


@pytest.mark.parametrize("shape", [(7,), (1, 3), (5, 64), (2, 1, 3, 17), (0, 8), (3, 0, 8)], ids=str)
def test_norm_of_any_shape(shape: tuple[int, ...]) -> None:
    assert_matches_fp64(norm, plain, leaves(shape, shape, shape[-1:], dtype=torch.float32, device=DEVICE))


def test_norm_of_strided_inputs_writes_what_its_neighbours_need() -> None:
    """x as lightning attention leaves it, [b, s, H * D] seen as [s, b, H * D]; gate half of a wider projection; weight spread out."""
    x, gate, weight = leaves((2, 5, 24), (5, 2, 48), (48,), dtype=torch.float32, device=DEVICE)
    views = [v.detach().requires_grad_() for v in (x.transpose(0, 1), gate[..., 24:], weight[::2])]
    assert [v.stride() for v in views] == [(24, 120, 1), (96, 48, 1), (2,)]
    assert_matches_fp64(norm, plain, views)
    out, dx, *_ = run(norm, views)
    assert out.is_contiguous() and dx.stride() == views[0].stride()
    scattered = x.transpose(1, 2), gate[..., :24].permute(1, 2, 0), weight[:5]
    assert_matches_fp64(norm, plain, [v.detach().requires_grad_() for v in scattered])


def test_gradient_of_the_weight_is_the_sum_over_all_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_norm, "_programs", lambda *_: 70)
    assert_matches_fp64(norm, plain, leaves((75, 100), (75, 100), (100,), dtype=torch.float32, device=DEVICE))


def test_norm_of_an_expanded_gradient() -> None:
    inputs = leaves((3, 2, 6), (3, 2, 6), (6,), dtype=torch.float32, device=DEVICE)
    for a, b in zip(
        torch.autograd.grad(norm(*inputs).sum(), inputs), torch.autograd.grad(plain(*inputs).sum(), inputs)
    ):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_norm_with_mixed_dtypes() -> None:
    x, gate, weight = leaves((4, 12), (4, 12), (12,), dtype=torch.float32, device=DEVICE)
    inputs = [x.detach().bfloat16().requires_grad_(), gate.detach().half().requires_grad_(), weight]
    assert_matches_fp64(norm, plain, inputs)


def test_offsets_beyond_31_bits() -> None:
    """Three rows 2^30 elements apart, in 4 GiB that are never touched elsewhere."""
    far = torch.empty(2**31 + 16, dtype=torch.bfloat16, device=DEVICE).as_strided((3, 16), (2**30, 1))
    x, gate, weight = leaves((3, 16), (3, 16), (16,), dtype=torch.bfloat16, device=DEVICE)
    scale = x.detach()[:, 0].float().requires_grad_()
    far.copy_(x.detach())
    far.requires_grad_()
    for operator, near_inputs, far_inputs in [
        (norm, [x, gate, weight], [far, gate, weight]),
        (norm, [gate, x, weight], [gate, far, weight]),
        (glu, [x, scale], [far, scale]),
    ]:
        assert all(map(torch.equal, run(operator, far_inputs), run(operator, near_inputs)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_swiglu_matches_fp64(dtype: torch.dtype) -> None:
    gate_up, scale = leaves((5, 4200), (5,), dtype=dtype, device=DEVICE)
    assert_matches_fp64(glu, plain_swiglu, [gate_up, scale.detach().float().requires_grad_()])


@pytest.mark.parametrize("shape", [(1, 2), (3, 14), (0, 8)], ids=str)
def test_swiglu_of_any_shape(shape: tuple[int, int]) -> None:
    assert_matches_fp64(glu, plain_swiglu, leaves(shape, shape[:1], dtype=torch.float32, device=DEVICE))


def test_swiglu_of_strided_inputs() -> None:
    gate_up, scale = leaves((3, 20), (3, 4), dtype=torch.float32, device=DEVICE)
    views = [gate_up.detach()[:, 4:].requires_grad_(), scale.detach()[:, 1].requires_grad_()]
    assert_matches_fp64(glu, plain_swiglu, views)
    assert_matches_fp64(glu, plain_swiglu, [gate_up.detach()[:, ::2].requires_grad_(), views[1]])


@pytest.mark.parametrize("operator, shapes", [(norm, [(9, 40), (9, 40), (40,)]), (glu, [(9, 40), (9,)])])
def test_repeated_runs_are_bitwise_equal(operator, shapes) -> None:
    inputs = leaves(*shapes, dtype=torch.bfloat16, device=DEVICE)
    assert all(map(torch.equal, run(operator, inputs), run(operator, inputs)))
