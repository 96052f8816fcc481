"""Norms and SwiGLU against plain autograd and finite differences, and the choice between their implementations."""

import logging

import pytest
import torch
from m1_kernels import choice, gated_rms_norm, rms_norm, swiglu

from tests.unit.kernels.pointwise_cases import (
    DEVICE,
    assert_matches_fp64,
    leaves,
    plain_gated_rms_norm,
    plain_rms_norm,
    plain_swiglu,
    run,
)

CASES = {
    "rms_norm": (lambda x, w: rms_norm(x, w, 0.1), lambda x, w: plain_rms_norm(x, w, 0.1), [(3, 2, 6), (6,)]),
    "swiglu": (swiglu, plain_swiglu, [(5, 8), (5,)]),
    "gated_rms_norm": (
        lambda x, g, w: gated_rms_norm(x, g, w, 0.1),
        lambda x, g, w: plain_gated_rms_norm(x, g, w, 0.1),
        [(3, 2, 6), (3, 2, 6), (6,)],
    ),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(name, dtype):
    ours, plain, shapes = CASES[name]
    assert_matches_fp64(ours, plain, leaves(*shapes, dtype=dtype))


@pytest.mark.parametrize("name", CASES)
def test_gradcheck(name):
    ours, _, shapes = CASES[name]
    assert torch.autograd.gradcheck(ours, leaves(*shapes))


@pytest.mark.parametrize("implementation", ["torch", "triton"])
@pytest.mark.parametrize("name", CASES)
def test_second_derivatives_are_refused(name, implementation):
    device = DEVICE if implementation == "triton" else "cpu"
    inputs = leaves(*CASES[name][2], dtype=torch.float32, device=device)
    if name == "rms_norm":  # torch's own on CUDA
        out = rms_norm(*(x.cpu() for x in inputs), 0.1)
    elif name == "swiglu":
        out = swiglu(*inputs, implementation=implementation)
    else:
        out = gated_rms_norm(*inputs, 0.1, implementation=implementation)
    (first,) = torch.autograd.grad(out.square().sum(), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.square().sum().backward()


def test_swiglu_without_tokens():
    gate_up, scale = leaves((0, 8), (0,))
    swiglu(gate_up, scale).sum().backward()
    assert gate_up.grad.shape == (0, 8)


@pytest.mark.parametrize("implementation", ["torch", "triton"])
def test_norm_spread_over_two_ranks_equals_the_whole(implementation):
    inputs = leaves((3, 2, 40), (3, 2, 40), (40,), dtype=torch.float32, device=DEVICE)
    whole = run(lambda *x: gated_rms_norm(*x, 0.1, implementation=implementation), inputs)
    shares = [[x.detach()[..., part].requires_grad_() for x in inputs] for part in (slice(0, 20), slice(20, 40))]
    grads = torch.randn(3, 2, 40, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    grads = grads.bfloat16().to(DEVICE, torch.float32).chunk(2, dim=-1)

    def both(add):
        """Results of both ranks; add(rank) is the all_reduce of that rank."""
        for rank, share in enumerate(shares):
            out = gated_rms_norm(*share, 0.1, channels=40, all_reduce=add(rank), implementation=implementation)
            yield [out, *torch.autograd.grad(out, share, grads[rank])]

    sent: list[list[torch.Tensor]] = [[], []]

    def record(rank):
        return lambda x: sent[rank].append(x.clone())

    def exchange(rank):
        others = iter(sent[1 - rank])
        return lambda x: x.add_(next(others))

    # Neither partial sum depends on what was reduced before, so that a first run can tell each rank those of the other.
    for _ in both(record):
        pass
    assert [len(partials) for partials in sent] == [2, 2]
    assert all(x.shape == (3, 2, 1) and x.dtype == torch.float32 for x in sent[0])
    for halves, expected in zip(zip(*both(exchange), strict=True), whole, strict=True):
        torch.testing.assert_close(torch.cat(halves, dim=-1), expected, rtol=1e-5, atol=1e-6)


def test_auto_on_the_cpu_is_torch_and_says_so_once(caplog):
    choice._log_once.cache_clear()
    with caplog.at_level(logging.INFO, logger="m1_kernels"):
        for _ in range(2):
            swiglu(*leaves((2, 4), (2,)))
        swiglu(*leaves((2, 4), (2,), dtype=torch.float32, device=DEVICE), implementation="triton")
    assert [r.getMessage() for r in caplog.records] == [
        "swiglu on cpu: torch (in-place passes over memory)",
        f"swiglu on {DEVICE}: triton (asked for)",
    ]


def test_wrong_inputs_are_refused_with_a_remedy():
    x, gate, weight = leaves((2, 8), (2, 8), (8,), dtype=torch.float32)
    with pytest.raises(ValueError, match="must share one shape"):
        gated_rms_norm(x, gate[:1], weight, 0.1)
    with pytest.raises(ValueError, match=r"weight .* must be"):
        gated_rms_norm(x, gate, weight[:1], 0.1)
    with pytest.raises(ValueError, match="go together"):
        gated_rms_norm(x, gate, weight, 0.1, channels=16)
    with pytest.raises(ValueError, match="use one of auto, triton, torch"):
        gated_rms_norm(x, gate, weight, 0.1, implementation="cuda")
    with pytest.raises(ValueError, match="use bf16, fp16 or fp32"):
        gated_rms_norm(x.double(), gate.double(), weight, 0.1, implementation="triton")
    wide = torch.zeros(1, 8193, device=DEVICE)
    with pytest.raises(ValueError, match="at most 8192 channels, not 8193"):
        gated_rms_norm(wide, wide, wide[0], 0.1, implementation="triton")
    with pytest.raises(ValueError, match=r"scale .* \[n\]"):
        swiglu(x, weight)


def test_auto_that_finds_nothing_names_the_obstacles():
    blocked = choice.Implementation(lambda x: x, lambda x: "it needs CUDA", "fastest")
    asked = choice.Implementation(lambda x: x, lambda x: None, "slow", auto_on=())
    with pytest.raises(ValueError, match=r"op: implementation='auto' found none for .*: blocked: it needs CUDA$"):
        choice.choose("op", {"blocked": blocked, "asked": asked}, "auto", torch.zeros(1))
    assert choice.choose("op", {"blocked": blocked, "asked": asked}, "asked", torch.zeros(1)) is asked
