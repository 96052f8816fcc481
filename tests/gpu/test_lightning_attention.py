"""The Triton kernels of lightning attention at M1's head width: errors, long sequences, CUDA graphs, no host synchronisation."""

import itertools

import pytest
import torch
from m1_kernels import lightning_attention, lightning_attention_packed, slopes

D = 128
RESULTS = ("o", "dq", "dk", "dv", "final_state", "dinitial_state")


def results(dtype, implementation, qkv, initial, do, dfinal, decay, **options) -> dict[str, torch.Tensor]:
    leaf = qkv.to(dtype).clone().requires_grad_()
    state = initial.to(torch.float64 if dtype == torch.float64 else torch.float32).clone().requires_grad_()
    o, final = lightning_attention(
        *leaf.split(D, dim=-1),
        decay,
        initial_state=state,
        return_final_state=True,
        implementation=implementation,
        **options,
    )
    torch.autograd.backward([o, final], [do.to(o.dtype), dfinal.to(final.dtype)])
    return dict(zip(RESULTS, (o.detach(), *leaf.grad.split(D, dim=-1), final.detach(), state.grad), strict=True))


def error_per_head(actual: torch.Tensor, expected: torch.Tensor, name: str) -> torch.Tensor:
    others = [d for d in range(4) if d != (1 if "state" in name else 2)]
    return ((actual.double() - expected.double()).square().sum(others) / expected.double().square().sum(others)).sqrt()


@pytest.mark.parametrize("strategy", ["fused", "segmented", "auto"])
@pytest.mark.parametrize("layer", [0, 40, 78])
@pytest.mark.parametrize("documents", [None, (700, 0, 1, 2048, 63, 65, 64, 1157)])
def test_error_is_that_of_rounding_the_results(layer: int, strategy: str, documents: tuple[int, ...] | None) -> None:
    """Per head at most 1.5 times the error of a computation in float32 on the same bf16 inputs, rounded to bf16."""
    tokens, heads = 4098, 8
    spread = torch.arange(0, 64, 64 // heads)
    decay = slopes(64, layer, 80)[spread].cuda()
    edges = None
    if documents is not None:
        edges = torch.tensor([0, *itertools.accumulate(documents)], dtype=torch.int32, device="cuda")
    count = 1 if documents is None else len(documents)
    generator = torch.Generator("cuda").manual_seed(layer)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device="cuda", generator=generator)

    inputs = (
        normal(1, tokens, heads, 3 * D).bfloat16(),
        normal(count, heads, D, D),
        normal(1, tokens, heads, D).bfloat16(),
        normal(count, heads, D, D),
        decay,
    )
    exact = results(torch.float64, "torch", *inputs, cu_seqlens=edges)
    rounded = results(torch.bfloat16, "torch", *inputs, cu_seqlens=edges)
    ours = results(torch.bfloat16, "triton", *inputs, cu_seqlens=edges, strategy=strategy)
    for name in RESULTS:
        error = error_per_head(ours[name], exact[name], name)
        if "state" in name:
            assert error.max() <= 1e-3, (name, error)
        else:
            assert (error / error_per_head(rounded[name], exact[name], name)).max() <= 1.5, (name, error)


@pytest.mark.parametrize("tokens, heads", [(262_145, 64), (1_048_576, 16)])
@pytest.mark.parametrize("strategy", ["fused", "segmented"])
def test_offsets_beyond_31_bits(tokens: int, heads: int, strategy: str) -> None:
    assert tokens * heads * 3 * D > 2**32
    decay = slopes(heads, 40, 80).cuda()
    qkv = torch.randn(1, tokens, heads, 3 * D, device="cuda", dtype=torch.bfloat16)
    do = torch.randn(1, tokens, heads, D, device="cuda", dtype=torch.bfloat16)
    leaf = qkv.requires_grad_()
    o = lightning_attention_packed(leaf, decay, activation=None, implementation="triton", strategy=strategy)
    o.backward(do)
    last = tokens - 4096
    for head in (0, heads - 1):
        few = qkv.detach()[:, :, head : head + 1].double().requires_grad_()
        expected = lightning_attention(*few.split(D, dim=-1), decay[head : head + 1], implementation="torch")
        expected.backward(do[:, :, head : head + 1].double())
        for actual, oracle in ((o.detach(), expected.detach()), (leaf.grad, few.grad)):
            for part in (slice(0, 4096), slice(last, None), slice(None)):
                assert error_per_head(actual[:, part, head : head + 1], oracle[:, part], "o").max() <= 2.6e-3
        del few, expected


def test_training_step_in_a_cuda_graph_without_host_synchronisation() -> None:
    decay = slopes(4, 0, 8).cuda()
    qkv = torch.randn(1, 1000, 4, 3 * D, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    edges = torch.tensor([0, 300, 301, 900], dtype=torch.int32, device="cuda")

    def step() -> None:
        qkv.grad = None
        lightning_attention_packed(qkv, decay, cu_seqlens=edges).float().square().sum().backward()

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    eager = qkv.grad.clone()
    graph = torch.cuda.CUDAGraph()
    qkv.grad = None
    with torch.cuda.graph(graph):
        step()
    with torch.no_grad():
        qkv.add_(0)
    graph.replay()
    assert torch.equal(qkv.grad, eager)
    edges.copy_(torch.tensor([0, 500, 600, 1000], dtype=torch.int32))
    graph.replay()
    moved = qkv.grad.clone()
    step()
    assert torch.equal(moved, qkv.grad)
