"""The Triton kernels of lightning attention at M1's head width: errors with the slopes of its layers, mutants, 262,145 tokens."""

import gc
from collections.abc import Callable

import pytest
import torch
from m1_kernels import (
    lightning_attention,
    lightning_attention_packed,
    lightning_attention_read,
    lightning_attention_state,
    slopes,
    triton_attention,
)
from m1_kernels.triton_states import read_states_triton

from tests.gpu.lightning_checks import (
    DEVICE,
    STATE_BOUND,
    Gate,
    assert_same_bits,
    error_per_head,
    make_inputs,
    triton,
)

pytestmark = pytest.mark.gpu

D = 128
TOKENS, HEADS, SEGMENT = 4098, 8, 512
LONG, LONG_HEADS = 262_145, 64
MANY = 2200
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


@pytest.mark.parametrize("strategy", ["fused", "segmented", "auto"])
@pytest.mark.parametrize("documents", [None, DOCUMENTS], ids=["dense", "packed"])
def test_packed_projection_with_silu(documents, strategy: str, monkeypatch) -> None:
    """o and the one gradient, at most twice as far from float64 as the torch path, which rounds the same activation, but gradients once."""
    monkeypatch.setattr(triton_attention, "SEGMENT", SEGMENT)
    inputs = make_inputs(TOKENS, HEADS, D, torch.bfloat16, documents=documents)
    covered = sum(documents or (TOKENS,))

    def run(dtype: torch.dtype, **options: str) -> list[torch.Tensor]:
        leaf = inputs.qkv.to(dtype, copy=True).requires_grad_()
        o = lightning_attention_packed(leaf, inputs.decay, cu_seqlens=inputs.edges, **options)
        o.backward(inputs.do.to(dtype))
        assert not o[:, covered:].any() and not leaf.grad[:, covered:].any()
        return [x[:, :covered] for x in (o.detach(), *leaf.grad.split(D, dim=-1))]

    exact, rounded = run(torch.float64, implementation="torch"), run(inputs.qkv.dtype, implementation="torch")
    ours = run(inputs.qkv.dtype, implementation="triton", strategy=strategy)
    for actual, like, expected in zip(ours, rounded, exact, strict=True):
        bound = 2 * error_per_head(like, expected, "o")
        assert bound.max() < 0.02 and (error_per_head(actual, expected, "o") <= bound).all()


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("documents", [None, DOCUMENTS], ids=["dense", "packed"])
def test_states_and_reads_of_them(documents, reverse: bool, transposed: bool) -> None:
    """Against float64, and reads bit for bit those of all tokens; padding is NaN."""
    inputs = make_inputs(TOKENS, HEADS, D, torch.bfloat16, documents=documents, layer=0)
    q, k, v = inputs.qkv.split(D, dim=-1)
    options = {"cu_seqlens": inputs.edges, "reverse": reverse}
    exact = lightning_attention_state(k.double(), v.double(), inputs.decay, **options)
    states = lightning_attention_state(k, v, inputs.decay, **options)
    live = exact.flatten(1).any(-1)  # not of empty documents
    assert error_per_head(states[live], exact[live], "state").max() <= STATE_BOUND and not states[~live].any()
    start, found = torch.randn_like(k), []
    for operator, dtype in ((lightning_attention_read, torch.float64), (read_states_triton, k.dtype)):
        out = start.to(dtype, copy=True)
        states = inputs.initial.to(torch.float64 if dtype == torch.float64 else torch.float32)
        operator(q.to(dtype), states, inputs.decay, out=out, transposed=transposed, **options)
        found.append(out)
    assert error_per_head(found[1], found[0], "o").max() <= 4e-3
    everywhere = start.clone()
    read_states_triton(q, inputs.initial, inputs.decay, out=everywhere, transposed=transposed, horizon=False, **options)
    assert torch.equal(everywhere, found[1]) and not torch.equal(everywhere, start)


@pytest.mark.parametrize("strategy", ["fused", "segmented"])
def test_states_beyond_31_bits_of_offset(strategy: str) -> None:
    """A pack of so many documents that their states are more than 2^31 numbers; those of the last ones as alone, bit for bit."""
    gc.collect()  # of tests before
    torch.cuda.empty_cache()
    state_bytes = 4 * MANY * LONG_HEADS * D * D
    if torch.cuda.is_available() and torch.cuda.mem_get_info()[0] < 7 * state_bytes:
        pytest.skip(f"needs {7 * state_bytes / 2**30:.0f} GiB of free GPU memory")
    documents = (5, 1, 0, 3) * (MANY // 4)
    inputs = make_inputs(sum(documents) + 2, LONG_HEADS, D, torch.bfloat16, documents=documents)
    packed = triton(inputs, strategy)
    for document in (0, MANY - 4, MANY - 1):
        first, length = sum(documents[:document]), documents[document]
        mine = {
            name: x[document : document + 1] if "state" in name else x[:, first : first + length]
            for name, x in packed.items()
        }
        assert_same_bits(mine, triton(inputs.span(first, first + length, document), strategy))


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
