"""States that documents leave behind and reads of them, against autograd of the recurrence; Triton's in the interpreter."""

import pytest
import torch
from m1_kernels import lightning_attention_read, lightning_attention_reference, lightning_attention_state, slopes

from tests.unit.kernels.test_triton_lightning import DEVICE

BOUNDS = {"torch": 1e-13, "triton": 1e-6}
PACKS = {
    "dense": None,
    "ragged": [0, 33, 33, 34, 34, 66, 95],  # empty documents, length 1, padding behind
}
TOKENS, DIM = 100, 16
RATES = torch.cat([slopes(1, 0, 4), torch.tensor([4.0])])  # of the second, weights below 2^-150 from 26 tokens on


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.double().cpu() - expected).norm() / expected.norm().clamp_min(1e-30))


@pytest.mark.parametrize("implementation", BOUNDS)
@pytest.mark.parametrize("pack", PACKS)
def test_they_are_the_entry_and_exit_terms_of_the_recurrence(pack: str, implementation: str) -> None:
    """o and the final state, and their gradients, with and without an initial state: the difference is what is computed here."""
    edges = None if PACKS[pack] is None else torch.tensor(PACKS[pack], dtype=torch.int32)
    rows = 2 if edges is None else 1
    documents = rows if edges is None else len(edges) - 1
    generator = torch.Generator().manual_seed(3)
    q, k, v, do = torch.randn(4, rows, TOKENS, 2, DIM, dtype=torch.float64, generator=generator)
    initial, dfinal = torch.randn(2, documents, 2, DIM, DIM, dtype=torch.float64, generator=generator)
    options = {"cu_seqlens": edges, "return_final_state": True}

    def results(initial, do, dfinal) -> list[torch.Tensor]:
        leaves = [x.clone().requires_grad_() for x in (q, k, v, initial)]
        o, final = lightning_attention_reference(*leaves[:3], RATES, initial_state=leaves[3], **options)
        torch.autograd.backward([o, final], [do, dfinal])
        return [o.detach(), final.detach(), *(x.grad for x in leaves)]

    nothing, no_output = torch.zeros_like(initial), torch.zeros_like(do)
    o, final, dq, _, _, dinitial = results(nothing, do, nothing)
    entered_o, _, entered_dq, *_ = results(initial, do, nothing)
    _, _, _, dk, dv, _ = results(nothing, no_output, dfinal)

    dtype, device = (torch.float64, "cpu") if implementation == "torch" else (torch.float32, DEVICE)
    given = [x.to(device, dtype) for x in (q, k, v, do, initial, dfinal)]
    q_, k_, v_, do_, initial_, dfinal_ = given
    rates, edges = RATES.to(device), None if edges is None else edges.to(device)
    choice = {"cu_seqlens": edges, "implementation": implementation}

    def read(x: torch.Tensor, states: torch.Tensor, **options) -> torch.Tensor:
        out = torch.full_like(x, 2.0)
        lightning_attention_read(x, states, rates, out=out, **options, **choice)
        return out - 2.0

    bound = BOUNDS[implementation]
    assert error(lightning_attention_state(k_, v_, rates, **choice), final) <= bound
    assert error(lightning_attention_state(q_, do_, rates, reverse=True, **choice), dinitial) <= bound
    assert error(read(q_, initial_), entered_o - o) <= bound
    assert error(read(do_, initial_, transposed=True), entered_dq - dq) <= bound
    assert error(read(k_, dfinal_, reverse=True), dv) <= bound
    assert error(read(v_, dfinal_, reverse=True, transposed=True), dk) <= bound


@pytest.mark.parametrize("implementation", BOUNDS)
def test_half_precision_views_are_read_and_written_in_place(implementation: str) -> None:
    generator = torch.Generator().manual_seed(4)
    device = DEVICE if implementation == "triton" else "cpu"
    packed = torch.randn(40, 1, 2, 2 * DIM, generator=generator).bfloat16().to(device)
    q, out = packed.transpose(0, 1).split(DIM, dim=-1)  # time-major parts of one projection
    states = torch.randn(1, 2, DIM, DIM, generator=generator).to(device)
    expected, untouched = out.double().cpu(), q.clone()
    lightning_attention_read(q.double().cpu(), states.double().cpu(), RATES, out=expected)
    lightning_attention_read(q, states, RATES.to(device), out=out, implementation=implementation)
    assert torch.equal(q, untouched)
    assert error(out, expected) <= 8e-3


@pytest.mark.parametrize("implementation", BOUNDS)
def test_without_tokens_states_are_zero_and_nothing_is_read(implementation: str) -> None:
    device = DEVICE if implementation == "triton" else "cpu"
    k, edges = torch.zeros(1, 0, 2, DIM, device=device), torch.zeros(3, dtype=torch.int32, device=device)
    options = {"cu_seqlens": edges, "implementation": implementation}
    states = lightning_attention_state(k, k, RATES.to(device), **options)
    assert states.shape == (2, 2, DIM, DIM) and not states.any()
    lightning_attention_read(k, states, RATES.to(device), out=k, **options)


@pytest.mark.parametrize("implementation", BOUNDS)
def test_nan_beyond_the_documents_stays_there(implementation: str) -> None:
    device = DEVICE if implementation == "triton" else "cpu"
    edges, rates = torch.tensor([0, 30, 50], dtype=torch.int32, device=device), RATES.to(device)
    options = {"cu_seqlens": edges, "implementation": implementation}
    k = torch.randn(1, 60, 2, DIM, generator=torch.Generator().manual_seed(5)).to(device)
    states = lightning_attention_state(k, k, rates, **options)
    poisoned = k.clone()
    poisoned[:, 50:] = float("nan")
    assert torch.equal(states, lightning_attention_state(poisoned, poisoned, rates, **options))
    out = torch.zeros_like(k)
    lightning_attention_read(poisoned, states, rates, out=out, **options)
    assert out.isfinite().all() and not out[:, 50:].any()
    poisoned[:, 0] = float("nan")
    states = lightning_attention_state(poisoned, poisoned, rates, **options)
    assert states[0].isnan().any() and states[1].isfinite().all()


def test_packs_of_more_tokens_than_a_block_equal_their_documents_alone() -> None:
    lengths = [5000, 1, 70, 4200]
    edges = torch.tensor([0, *lengths]).cumsum(0).int()
    generator = torch.Generator().manual_seed(6)
    k, v = torch.randn(2, 1, int(edges[-1]), 2, DIM, generator=generator, dtype=torch.float64)
    states = lightning_attention_state(k, v, RATES, cu_seqlens=edges)
    out, alone = torch.zeros_like(k), torch.zeros_like(k)
    lightning_attention_read(k, states, RATES, out=out, cu_seqlens=edges)
    for document, (k_, v_) in enumerate(zip(k.split(lengths, 1), v.split(lengths, 1))):
        expected = lightning_attention_state(k_, v_, RATES)
        assert error(states[document : document + 1], expected) <= BOUNDS["torch"]
        lightning_attention_read(k_, expected, RATES, out=alone.split(lengths, 1)[document])
    assert error(out, alone) <= BOUNDS["torch"]


def test_what_does_not_fit_is_refused() -> None:
    q, states = torch.zeros(1, 4, 2, DIM), torch.zeros(1, 2, DIM, DIM)
    with pytest.raises(ValueError, match="must be like q"):
        lightning_attention_read(q, states, RATES, out=q[:, :3])
    with pytest.raises(ValueError, match="initial_state"):
        lightning_attention_read(q, states[:, :1], RATES, out=q)
    with pytest.raises(ValueError, match="must share one shape"):
        lightning_attention_state(q, q[:, :3], RATES)
