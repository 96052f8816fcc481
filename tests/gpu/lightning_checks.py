"""What the GPU tests of lightning attention share: inputs, results with every gradient, and the error gate."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from m1_kernels import lightning_attention, slopes

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RESULTS = ("o", "dq", "dk", "dv", "final_state", "dinitial_state")
FLOAT32_BOUND = 5e-6
STATE_BOUND = 3e-5
"""Of states from 16-bit inputs, which are float32 sums of decayed values in two 16-bit parts: the parts' rounding (2e-6 in bfloat16)
and that of a chunk's decay, once for each of some 64 chunks (8e-6). One rounding to bfloat16 of values or states makes 1e-3.
"""


@dataclass(frozen=True)
class Inputs:
    """Leaves, output gradients, slopes and cu_seqlens of one call; qkv [1, T, H, 3D]."""

    qkv: torch.Tensor
    initial: torch.Tensor
    do: torch.Tensor
    dfinal: torch.Tensor
    decay: torch.Tensor
    edges: torch.Tensor | None = None

    def span(self, first: int, last: int, document: int = 0) -> "Inputs":
        """Tokens first to last alone, with the states of `document`."""
        one = slice(document, document + 1)
        return Inputs(
            self.qkv[:, first:last], self.initial[one], self.do[:, first:last], self.dfinal[one], self.decay
        )  # fmt: skip


def make_inputs(
    tokens: int, heads: int, dim: int, dtype: torch.dtype, *, documents: Sequence[int] | None = None, layer: int = 40
) -> Inputs:
    """Normal random numbers, slopes of `heads` of M1's 64 heads; documents may leave padding behind them, which is NaN."""
    generator = torch.Generator(DEVICE).manual_seed(tokens + layer)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=DEVICE, generator=generator)

    decay = slopes(64, layer, 80)[torch.linspace(0, 63, heads).long()].to(DEVICE)
    count, edges = 1, None
    if documents is not None:
        count = len(documents)
        edges = torch.tensor([0, *itertools.accumulate(documents)], dtype=torch.int32, device=DEVICE)
    qkv, do = normal(1, tokens, heads, 3 * dim).to(dtype), normal(1, tokens, heads, dim).to(dtype)
    if documents is not None:
        qkv[:, sum(documents) :] = do[:, sum(documents) :] = float("nan")
    return Inputs(qkv, normal(count, heads, dim, dim), do, normal(count, heads, dim, dim), decay, edges)


def results(inputs: Inputs, operator: Callable = lightning_attention, **options: str) -> dict[str, torch.Tensor]:
    """What `operator` yields for the inputs, with the gradients of q, k, v and the initial state."""
    dim = inputs.do.shape[-1]
    leaf, state = inputs.qkv.clone().requires_grad_(), inputs.initial.clone().requires_grad_()
    o, final = operator(
        *leaf.split(dim, dim=-1), inputs.decay, initial_state=state, cu_seqlens=inputs.edges, return_final_state=True,
        **options,
    )  # fmt: skip
    torch.autograd.backward([o, final], [inputs.do, inputs.dfinal])
    dinitial = torch.zeros_like(state) if state.grad is None else state.grad
    return dict(zip(RESULTS, (o.detach(), *leaf.grad.split(dim, dim=-1), final.detach(), dinitial), strict=True))


def triton(inputs: Inputs, strategy: str, operator: Callable = lightning_attention) -> dict[str, torch.Tensor]:
    return results(inputs, operator, implementation="triton", strategy=strategy)


def error_per_head(actual: torch.Tensor, expected: torch.Tensor, name: str) -> torch.Tensor:
    """Root-mean-square error over root-mean-square of the expected values."""
    others = [d for d in range(4) if d != (1 if "state" in name else 2)]
    return ((actual.double() - expected.double()).square().sum(others) / expected.double().square().sum(others)).sqrt()


@dataclass(frozen=True)
class Gate:
    """Accepts results whose error per head is at most 1.5 times that of a float32 computation on the same 16-bit inputs, rounded once."""

    exact: dict[str, torch.Tensor]
    rounded: dict[str, torch.Tensor]
    covered: int

    @classmethod
    def of(cls, inputs: Inputs) -> "Gate":
        covered = inputs.qkv.shape[1] if inputs.edges is None else int(inputs.edges[-1])
        live = replace(inputs, qkv=inputs.qkv[:, :covered], do=inputs.do[:, :covered])
        exact = replace(
            live, qkv=live.qkv.double(), initial=live.initial.double(), do=live.do.double(), dfinal=live.dfinal.double()
        )
        return cls(results(exact, implementation="torch"), results(live, implementation="torch"), covered)

    def check(self, ours: dict[str, torch.Tensor]) -> None:
        for name, exact in self.exact.items():
            actual = ours[name] if "state" in name else ours[name][:, : self.covered]
            assert actual.dtype == self.rounded[name].dtype and actual.isfinite().all(), name
            error = error_per_head(actual, exact, name)
            if ours["o"].dtype == torch.float32:
                bound = torch.full_like(error, FLOAT32_BOUND)
            elif "state" in name:
                bound = torch.full_like(error, STATE_BOUND)
            else:
                bound = 1.5 * error_per_head(self.rounded[name], exact, name)
                assert not ours[name][:, self.covered :].any(), f"{name} in padding"
            assert (error <= bound).all(), (
                f"relative error of {name} per head {error.tolist()} exceeds {bound.tolist()}"
            )


def assert_same_bits(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    different = [name for name in RESULTS if not torch.equal(actual[name], expected[name])]
    assert not different, f"other bits in {', '.join(different)}"
