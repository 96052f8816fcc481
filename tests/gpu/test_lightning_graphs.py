"""Training steps and decoding steps in CUDA graphs, without a wait for the GPU; decoding against prefill over 4096 steps."""

import contextlib
from collections.abc import Callable, Iterator

import pytest
import torch
from m1_kernels import (
    lightning_attention,
    lightning_attention_packed,
    lightning_attention_step,
    slopes,
    triton_attention,
)

from tests.gpu.lightning_checks import DEVICE, error_per_head, make_inputs

pytestmark = pytest.mark.gpu

D, HEADS = 128, 4
STEPS = 4096


def warm_up(step: Callable[[], object]) -> None:
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        step()
    torch.cuda.synchronize()


@contextlib.contextmanager
def no_wait_for_the_gpu() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def captured(step: Callable[[], object]) -> tuple[torch.cuda.CUDAGraph, object]:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = step()
    return graph, kept


@pytest.mark.parametrize("leaving", [True, False])
@pytest.mark.parametrize("strategy", ["fused", "segmented", "auto"])
@pytest.mark.parametrize("documents", [None, (300, 1, 0, 599)], ids=["dense", "packed"])
def test_training_step(documents, strategy: str, leaving: bool, monkeypatch) -> None:
    """leaving: with final states."""
    monkeypatch.setattr(triton_attention, "SEGMENT", 256)
    inputs = make_inputs(1000, HEADS, D, torch.bfloat16, documents=documents)
    qkv, initial = inputs.qkv.requires_grad_(), inputs.initial.clone().requires_grad_()

    def step() -> list[torch.Tensor]:
        found = lightning_attention_packed(
            qkv,
            inputs.decay,
            initial_state=initial,
            cu_seqlens=inputs.edges,
            return_final_state=leaving,
            strategy=strategy,
        )
        results = found if leaving else (found,)
        loss = sum(x.float().square().sum() for x in results)
        return [*(x.detach() for x in results), *torch.autograd.grad(loss, (qkv, initial))]

    warm_up(step)
    with no_wait_for_the_gpu():
        step()
    graph, kept = captured(step)
    for round_ in range(2):
        with torch.no_grad():
            qkv.mul_(-0.5)
            initial.add_(0.1)
            if inputs.edges is not None and round_:
                inputs.edges.copy_(torch.tensor([0, 0, 500, 600, 880], dtype=torch.int32))
        graph.replay()
        for replayed, eager in zip(kept, step(), strict=True):
            assert torch.equal(replayed, eager) and eager.any()


def test_decoding_step() -> None:
    decay = slopes(64, 40, 80).to(DEVICE)
    q, k, v = torch.randn(3, 6, 64, D, device=DEVICE, dtype=torch.bfloat16)
    state = torch.randn(9, 64, D, D, device=DEVICE)
    slots = torch.tensor([5, -1, 0, 2, 8, 7], dtype=torch.int32, device=DEVICE)
    active = torch.tensor([True, True, True, False, True, True], device=DEVICE)

    def step() -> torch.Tensor:
        return lightning_attention_step(q, k, v, state, decay, slots=slots, active=active)

    warm_up(step)
    with no_wait_for_the_gpu():
        step()
    before = state.clone()
    graph, out = captured(step)
    assert torch.equal(state, before)
    for order in ([5, -1, 0, 2, 8, 7], [1, 2, 3, 4, -1, 0]):
        slots.copy_(torch.tensor(order, dtype=torch.int32))
        before.copy_(state)
        graph.replay()
        replayed = state.clone()
        state.copy_(before)
        assert torch.equal(step(), out) and torch.equal(state, replayed) and not torch.equal(state, before)


@pytest.mark.parametrize("dim", [64, 96, 128, 256])
def test_one_decoding_step_of_every_width(dim: int) -> None:
    q, k, v = torch.randn(3, 5, 64, dim, device=DEVICE, dtype=torch.bfloat16)
    state, decay = torch.randn(5, 64, dim, dim, device=DEVICE), slopes(64, 78, 80).to(DEVICE)
    expected = state.double() * torch.exp(-decay.double())[:, None, None] + torch.einsum(
        "bhk,bhv->bhkv", k.double(), v.double()
    )
    out = lightning_attention_step(q, k, v, state, decay)
    assert error_per_head(state, expected, "state").max() <= 1e-6
    wanted = torch.einsum("bhk,bhkv->bhv", q.double(), expected)
    assert error_per_head(out[:, None], wanted[:, None], "o").max() <= 2.6e-3


@pytest.mark.parametrize("layer", [0, 78])
def test_decoding_continues_prefill_over_thousands_of_steps(layer: int) -> None:
    prefix = 64
    inputs = make_inputs(prefix + STEPS, 8, D, torch.bfloat16, layer=layer)
    q, k, v = inputs.qkv.split(D, dim=-1)
    exact, exact_final = lightning_attention(
        q.double(), k.double(), v.double(), inputs.decay, return_final_state=True, implementation="torch"
    )
    whole, final = lightning_attention(q, k, v, inputs.decay, return_final_state=True)
    _, state = lightning_attention(*(x[:, :prefix] for x in (q, k, v)), inputs.decay, return_final_state=True)
    steps = range(prefix, prefix + STEPS)
    out = torch.stack([lightning_attention_step(q[:, t], k[:, t], v[:, t], state, inputs.decay) for t in steps], dim=1)
    assert error_per_head(out, exact[:, prefix:], "o").max() <= 2.6e-3
    assert error_per_head(out, whole[:, prefix:], "o").max() <= 4e-3
    assert error_per_head(state, exact_final, "state").max() <= 1e-4
    assert error_per_head(state, final, "state").max() <= 1e-4
