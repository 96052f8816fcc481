"""The comparison of checks.py rejects operators that are wrong in ways that have happened elsewhere."""

from collections.abc import Callable

import pytest
import torch
from m1_kernels import lightning_attention

from tests.unit.kernels.checks import Case, assert_matches_oracle
from tests.unit.kernels.test_lightning_attention import FLOAT32_BOUND

CASE = Case(tokens=97, heads=4, documents=(70, 1, 26))


def decay_off_by_one(q, k, v, slopes, **options):
    return lightning_attention(q * torch.exp(-slopes)[:, None], k, v, slopes, **options)


def dropped_initial_state(q, k, v, slopes, *, initial_state, **options):
    return lightning_attention(q, k, v, slopes, initial_state=None, **options)


def zero_output(*inputs, **options):
    o, final = lightning_attention(*inputs, **options)
    return o * 0, final


def swapped_heads(*inputs, **options):
    o, final = lightning_attention(*inputs, **options)
    return o.flip(2), final


def swapped_slopes(q, k, v, slopes, **options):
    return lightning_attention(q, k, v, slopes.flip(0), **options)


def transposed_state(*inputs, initial_state, **options):
    return lightning_attention(*inputs, initial_state=initial_state.mT, **options)


def bfloat16_state(*inputs, initial_state, **options):
    return lightning_attention(*inputs, initial_state=initial_state.bfloat16().float(), **options)


def bfloat16_slopes(q, k, v, slopes, **options):
    return lightning_attention(q, k, v, slopes.bfloat16().float(), **options)


def leaking_documents(*inputs, cu_seqlens, initial_state, **options):
    o, final = lightning_attention(*inputs, cu_seqlens=cu_seqlens[[0, -1]], initial_state=initial_state[:1], **options)
    return o, final.expand_as(initial_state)


def detached_final_state(*inputs, **options):
    o, final = lightning_attention(*inputs, **options)
    return o, final.detach().requires_grad_()


@pytest.mark.parametrize(
    "mutant, result",
    [
        (decay_off_by_one, "o"),
        (dropped_initial_state, "o"),
        (zero_output, "o"),
        (swapped_heads, "o"),
        (swapped_slopes, "o"),
        (transposed_state, "o"),
        (bfloat16_state, "o"),
        (bfloat16_slopes, "o"),
        (leaking_documents, "o"),
        (detached_final_state, "dinitial_state"),
    ],
)
def test_mutants_are_rejected(mutant: Callable[..., object], result: str) -> None:
    with pytest.raises(AssertionError, match=f"relative error of {result} per head"):
        assert_matches_oracle(mutant, CASE, FLOAT32_BOUND)


def test_the_unmutated_operator_passes() -> None:
    assert_matches_oracle(lightning_attention, CASE, FLOAT32_BOUND)
