"""Inputs of the benchmark's sections and the calls it times, on any device."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from m1_kernels.benchmark_peers import Attention, Block, Documents, Step
from m1_kernels.slopes import slopes

__all__ = [
    "PACKS",
    "Shape",
    "attention_call",
    "block_call",
    "captured",
    "difference",
    "long_and_short_lengths",
    "ragged_lengths",
    "sample",
    "step_call",
]

LAYER, LAYERS = 40, 80  # slopes of a layer in the middle of M1
SAMPLE = 64  # tokens compared at the start, the middle and the end

Tensors = Sequence[torch.Tensor]


@dataclass(frozen=True)
class Shape:
    """One point: tokens (slots when decoding), heads, head width, dtype and device."""

    tokens: int
    heads: int
    dim: int
    device: torch.device
    dtype: torch.dtype = torch.bfloat16

    def slopes(self) -> torch.Tensor:
        return slopes(self.heads, LAYER, LAYERS).to(self.device)

    def normal(self, *size: int) -> Callable[[int], torch.Tensor]:
        """normal(*size)(seed): the same numbers on every call."""

        def draw(seed: int) -> torch.Tensor:
            generator = torch.Generator(self.device).manual_seed(seed)
            return torch.randn(*size, generator=generator, device=self.device, dtype=self.dtype)

        return draw

    def documents(self, section: str) -> Documents:
        """Those of a section in PACKS."""
        lengths = PACKS[section](self.tokens)
        edges = torch.tensor([0, *lengths]).cumsum(0)
        return Documents(edges.int().to(self.device), edges.to(self.device), max(lengths))


def ragged_lengths(tokens: int) -> list[int]:
    """Document lengths that sum to `tokens`: one token, then 64 to 4096 plus 37 in turn, and the rest."""
    lengths = [1]
    while (left := tokens - sum(lengths)) > 0:
        lengths.append(min(left, 2 ** (6 + len(lengths) * 5 % 7) + 37))
    return lengths


def long_and_short_lengths(tokens: int) -> list[int]:
    """Document lengths that sum to `tokens`: seven eighths of them in one, the rest in documents of 16 to 128."""
    lengths = [tokens - tokens // 8]
    while (left := tokens - sum(lengths)) > 0:
        lengths.append(min(left, 16 << len(lengths) % 4))
    return lengths


PACKS = {"packed": ragged_lengths, "packed long": long_and_short_lengths}
"""Document lengths of the sections of packs."""


def attention_call(
    measure: str, attention: Attention, shape: Shape, documents: Documents | None, *, heads_first: bool, negative: bool
) -> Callable[[], Tensors]:
    """A call that returns what `measure` computes: (o,), or the gradients of q, k, v; the latter without keeping o."""
    draw = shape.normal(1, shape.tokens, shape.heads, shape.dim)

    def tensor(seed: int) -> torch.Tensor:
        x = draw(seed)
        return x.transpose(1, 2).contiguous() if heads_first else x

    decay = -shape.slopes() if negative else shape.slopes()
    q, k, v = (tensor(seed).requires_grad_(measure != "forward") for seed in (1, 2, 3))
    gradient = None if measure == "forward" else tensor(4)
    calls = _calls(lambda: attention(q, k, v, decay, documents), (q, k, v), gradient, measure)
    if not heads_first:
        return calls
    return lambda: [x.transpose(1, 2) for x in calls()]


def block_call(measure: str, block: Block, shape: Shape, *, negative: bool) -> Callable[[], Tensors]:
    """As `attention_call`, for the block; gradients of the packed qkv, the gate and the norm's weight."""
    width = shape.heads * shape.dim
    qkv = shape.normal(1, shape.tokens, shape.heads, 3 * shape.dim)(1)
    gate = shape.normal(1, shape.tokens, width)(2)
    weight = torch.ones(width, device=shape.device, dtype=shape.dtype)
    gradient = None if measure == "forward" else shape.normal(1, shape.tokens, width)(3)
    leaves = [x.requires_grad_(measure != "forward") for x in (qkv, gate, weight)]
    decay = -shape.slopes() if negative else shape.slopes()
    return _calls(lambda: block(*leaves, decay), leaves, gradient, measure)


def step_call(step: Step, shape: Shape, *, negative: bool) -> Callable[[], Tensors]:
    """A decoding step of shape.tokens slots, (o [1, slots, H, D],); ours moves the state on with every call."""
    q, k, v = (shape.normal(shape.tokens, shape.heads, shape.dim)(seed) for seed in (1, 2, 3))
    generator = torch.Generator(shape.device).manual_seed(4)
    size = shape.tokens, shape.heads, shape.dim, shape.dim
    state = torch.randn(size, generator=generator, device=shape.device)
    decay = -shape.slopes() if negative else shape.slopes()
    return lambda: (step(q, k, v, state, decay)[None],)


def captured(call: Callable[[], Tensors]) -> Callable[[], Tensors]:
    """The call as a CUDA graph that is replayed, after warm-up calls on a side stream."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()

    def replay() -> Tensors:
        graph.replay()
        return results

    return replay


def _calls(forward: Callable[[], torch.Tensor], leaves: Tensors, gradient, measure: str) -> Callable[[], Tensors]:
    if measure == "forward":

        def only_forward() -> Tensors:
            with torch.no_grad():
                return (forward(),)

        return only_forward

    def edge() -> torch.autograd.graph.GradientEdge:
        return torch.autograd.graph.get_gradient_edge(forward())

    if measure == "forward+backward":
        return lambda: torch.autograd.grad([edge()], leaves, [gradient])
    kept = edge()
    return lambda: torch.autograd.grad([kept], leaves, [gradient], retain_graph=True)


def sample(results: Tensors) -> list[torch.Tensor]:
    """The compared part of every result [B, T, ...] in float32; of a result without tokens, all of it."""
    parts = []
    for x in results:
        if x.ndim > 2 and x.shape[1] > 3 * SAMPLE:
            middle = x.shape[1] // 2
            x = torch.cat([x[:, :SAMPLE], x[:, middle : middle + SAMPLE], x[:, -SAMPLE:]], dim=1)
        parts.append(x.detach().float())
    return parts


def difference(actual: Tensors, expected: Tensors) -> float:
    """Largest relative root-mean-square difference over the results, and over the heads of a [B, T, H, D]; nan is larger."""
    worst = []
    for a, e in zip(actual, expected, strict=True):
        other = (0, 1, 3) if e.ndim == 4 else tuple(range(e.ndim))
        worst.append(((a - e).square().sum(other) / e.square().sum(other)).sqrt().max())
    return torch.stack(worst).max().item()
