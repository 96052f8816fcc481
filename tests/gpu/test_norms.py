"""The gated norm at M1's width, all 8192 channels of 64 heads, as the layer calls it."""

import pytest
import torch
from m1_kernels import gated_rms_norm

from tests.unit.kernels.pointwise_cases import DEVICE, assert_matches_fp64, leaves, plain_gated_rms_norm, run

pytestmark = pytest.mark.gpu

CHANNELS, EPS = 8192, 1e-5


def norm(x: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return gated_rms_norm(x, gate, weight, EPS, implementation="triton")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("rows", [1, 300])
def test_norm_matches_fp64(rows: int, dtype: torch.dtype) -> None:
    shapes = (rows, 2, CHANNELS), (rows, 2, CHANNELS), (CHANNELS,)
    inputs = leaves(*shapes, dtype=dtype, device=DEVICE)
    # The weight in float32, and with it the sum over rows that is its gradient.
    inputs[2] = inputs[2].detach().float().requires_grad_()
    assert_matches_fp64(norm, lambda x, g, w: plain_gated_rms_norm(x, g, w, EPS), inputs)


def test_repeated_runs_are_bitwise_equal() -> None:
    inputs = leaves((300, 2, CHANNELS), (300, 2, CHANNELS), (CHANNELS,), dtype=torch.bfloat16, device=DEVICE)
    assert all(map(torch.equal, run(norm, inputs), run(norm, inputs)))
