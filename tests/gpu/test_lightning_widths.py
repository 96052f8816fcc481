"""Every head width in every dtype: a ragged pack with empty and one-token documents, states, all gradients, NaN in the padding."""

import pytest
import torch
from m1_kernels import triton_attention

from tests.gpu.lightning_checks import Gate, make_inputs, triton

pytestmark = pytest.mark.gpu

TOKENS, HEADS, SEGMENT = 512, 4, 128
DOCUMENTS = (130, 0, 1, 64, 65, 200)


@pytest.mark.parametrize("strategy", ["fused", "segmented"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("dim", [64, 96, 128, 256], ids="D{}".format)
def test_widths_and_dtypes(dim: int, dtype: torch.dtype, strategy: str, monkeypatch) -> None:
    monkeypatch.setattr(triton_attention, "SEGMENT", SEGMENT)
    inputs = make_inputs(TOKENS, HEADS, dim, dtype, documents=DOCUMENTS)
    Gate.of(inputs).check(triton(inputs, strategy))
