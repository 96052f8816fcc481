"""The Triton kernels of lightning attention at M1's head width: errors with the slopes of its layers, mutants, 262,145 tokens."""

from collections.abc import Callable

import pytest
import torch
from m1_kernels import lightning_attention, lightning_attention_packed, slopes, triton_attention

from tests.gpu.lightning_checks import DEVICE, Gate, error_per_head, make_inputs, triton

pytestmark = pytest.mark.gpu

D = 128
TOKENS, HEADS, SEGMENT = 4098, 8, 512
LONG, LONG_HEADS = 262_145, 64
DOCUMENTS = (700, 0, 1, 2048, 63, 65, 64, 1, 1120)


@pytest.mark.parametrize("strategy", ["fused", "segmented", "auto"])
@pytest.mark.parametrize("layer", [0, 40, 78])
@pytest.mark.parametrize("documents", [None, DOCUMENTS], ids=["dense", "packed"])
def test_error_is_that_of_rounding_the_results(documents, layer: int, strategy: str, monkeypatch) -> None:
    monkeypatch.setattr(triton_attention, "SEGMENT", SEGMENT)
    inputs = make_inputs(TOKENS, HEADS, D, torch.bfloat16, documents=documents, layer=layer)
    Gate.of(inputs).check(triton(inputs, strategy))


def decay_off_by_one(q, k, v, slopes, **options):
    return lightning_attention((q * torch.exp(-slopes)[:, None]).to(q.dtype), k, v, slopes, **options)


def dropped_initial_state(*inputs, initial_state, **options):
    return lightning_attention(*inputs, initial_state=None, **options)


def zero_output(*inputs, **options):
    o, final = lightning_attention(*inputs, **options)
    return o * 0, final


def swapped_heads(*inputs, **options):
    o, final = lightning_attention(*inputs, **options)
    return o.flip(2), final


def bfloat16_state(q, k, v, slopes, *, initial_state, **options):
    half = q.shape[1] // 2
    first, state = lightning_attention(
        *(x[:, :half] for x in (q, k, v)), slopes, initial_state=initial_state.bfloat16().float(), **options
    )
    second, final = lightning_attention(
        *(x[:, half:] for x in (q, k, v)), slopes, initial_state=state.bfloat16().float(), **options
    )
    return torch.cat([first, second], dim=1), final.bfloat16().float()


@pytest.mark.parametrize(
    "mutant, result",
    [
        (decay_off_by_one, "o"),
        (dropped_initial_state, "o"),
        (zero_output, "o"),
        (swapped_heads, "o"),
        (bfloat16_state, "(o|final_state)"),
    ],
)
def test_mutants_are_rejected(mutant: Callable, result: str) -> None:
    inputs = make_inputs(TOKENS, HEADS, D, torch.bfloat16)
    with pytest.raises(AssertionError, match=f"relative error of {result} per head"):
        Gate.of(inputs).check(triton(inputs, "fused", mutant))


@pytest.mark.parametrize("strategy", ["fused", "segmented"])
def test_offsets_beyond_31_bits(strategy: str) -> None:
    """Whole heads against float64, at the start, at the end and over all tokens."""
    decay = slopes(LONG_HEADS, 40, 80).to(DEVICE)
    qkv = torch.randn(1, LONG, LONG_HEADS, 3 * D, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    assert qkv.numel() > 2**32
    do = torch.randn(1, LONG, LONG_HEADS, D, device=DEVICE, dtype=torch.bfloat16)
    o = lightning_attention_packed(qkv, decay, activation=None, implementation="triton", strategy=strategy)
    o.backward(do)
    for head in (0, LONG_HEADS // 2, LONG_HEADS - 1):
        few = qkv.detach()[:, :, head : head + 1].double().requires_grad_()
        expected = lightning_attention(*few.split(D, dim=-1), decay[head : head + 1], implementation="torch")
        expected.backward(do[:, :, head : head + 1].double())
        for actual, oracle in ((o.detach(), expected.detach()), (qkv.grad, few.grad)):
            for part in (slice(0, 4096), slice(LONG - 4096, None), slice(None)):
                assert error_per_head(actual[:, part, head : head + 1], oracle[:, part], "o").max() <= 2.6e-3
        del few, expected
