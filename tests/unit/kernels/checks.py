"""Inputs, the float64 oracle and the one comparison that all tests of lightning attention use."""

import functools
import itertools
import math
import types
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from m1_kernels import lightning_attention_reference, slopes

Results = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Case:
    """Shape of one call; documents: lengths of the documents of a pack (batch 1), None for a dense batch."""

    tokens: int
    batch: int = 1
    heads: int = 2
    dim: int = 16
    documents: tuple[int, ...] | None = None
    with_states: bool = True
    layer: int = 0
    layers: int = 8
    dtype: torch.dtype = torch.float32
    out_of: int | None = None
    """Heads of the model that the case's heads are taken from, first and last among them; None: it has no others."""

    @property
    def slopes(self) -> torch.Tensor:
        if self.out_of is None:
            return slopes(self.heads, self.layer, self.layers)
        return slopes(self.out_of, self.layer, self.layers)[torch.linspace(0, self.out_of - 1, self.heads).long()]

    @property
    def state_count(self) -> int:
        return self.batch if self.documents is None else len(self.documents)

    @property
    def cu_seqlens(self) -> torch.Tensor | None:
        if self.documents is None:
            return None
        return torch.tensor([0, *itertools.accumulate(self.documents)], dtype=torch.int32)


@dataclass(frozen=True)
class Inputs:
    """Leaves (packed qkv [B, T, H, 3D], initial state) and output gradients (do, dfinal)."""

    qkv: torch.Tensor
    initial: torch.Tensor
    do: torch.Tensor
    dfinal: torch.Tensor


def make_inputs(case: Case) -> Inputs:
    """Normal random inputs; q, k, v and do are in case.dtype, so that the oracle sees the same rounded numbers."""
    generator = torch.Generator().manual_seed(case.tokens * 1000 + case.heads * 10 + case.dim)
    shape = (case.batch, case.tokens, case.heads)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator)

    state_shape = (case.state_count, case.heads, case.dim, case.dim)
    state_dtype = torch.float64 if case.dtype == torch.float64 else torch.float32
    return Inputs(
        qkv=normal(*shape, 3 * case.dim).to(case.dtype),
        initial=normal(*state_shape).to(state_dtype),
        do=normal(*shape, case.dim).to(case.dtype),
        dfinal=normal(*state_shape).to(state_dtype),
    )


def run(operator: Callable[..., object], case: Case, inputs: Inputs) -> Results:
    """o, final_state and the gradients of q, k, v, initial_state that `operator` yields."""
    qkv = inputs.qkv.detach().requires_grad_()
    q, k, v = qkv.split(case.dim, dim=-1)
    initial = inputs.initial.detach().requires_grad_()
    decay = case.slopes
    if not case.with_states:
        o = operator(q, k, v, decay, cu_seqlens=case.cu_seqlens)
        o.backward(inputs.do)
        results = {"o": o}
    else:
        o, final = operator(q, k, v, decay, initial_state=initial, cu_seqlens=case.cu_seqlens, return_final_state=True)
        torch.autograd.backward([o, final], [inputs.do, inputs.dfinal])
        dinitial = torch.zeros_like(initial) if initial.grad is None else initial.grad
        results = {"o": o, "final_state": final, "dinitial_state": dinitial}
    dq, dk, dv = qkv.grad.split(case.dim, dim=-1)
    return {name: x.detach() for name, x in {**results, "dq": dq, "dk": dk, "dv": dv}.items()}


@functools.cache
def oracle(case: Case) -> Results:
    """The recurrence in float64 on the same numbers."""
    inputs = make_inputs(case)
    exact = Inputs(*(x.double() for x in (inputs.qkv, inputs.initial, inputs.do, inputs.dfinal)))
    return run(lightning_attention_reference, replace(case, dtype=torch.float64), exact)


def head_errors(actual: torch.Tensor, expected: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Per head, root-mean-square error over root-mean-square of the expected values."""
    other = [d for d in range(expected.ndim) if d != head_dim]
    error = (actual.double() - expected).pow(2).sum(other)
    return (error / expected.pow(2).sum(other).clamp(min=1e-30)).sqrt()


def assert_matches_oracle(operator: Callable[..., object], case: Case, bound: float) -> None:
    """Every head of every result within `bound` relative RMS error of the float64 oracle, with the input's dtype."""
    actual = run(operator, case, make_inputs(case))
    for name, expected in oracle(case).items():
        assert actual[name].shape == expected.shape, name
        head_dim = 1 if "state" in name else 2
        errors = head_errors(actual[name], expected, head_dim)
        assert torch.isfinite(actual[name]).all(), f"{name} is not finite"
        assert errors.max() <= bound, f"relative error of {name} per head {errors.tolist()} exceeds {bound}"


class Guards:
    """Stands in for torch in a module: what it gets from torch.empty has numbers on both sides that must stay."""

    def __init__(self, width: int) -> None:
        self.width = width
        self.tensors: list[torch.Tensor] = []

    def module(self) -> types.SimpleNamespace:
        return types.SimpleNamespace(**{**vars(torch), "empty": self._empty})

    def _empty(self, *shape, **options) -> torch.Tensor:
        shape = shape if isinstance(shape[0], int) else shape[0]
        count = math.prod(shape)
        self.tensors.append(torch.full((count + 2 * self.width,), 777.0, **options))
        return self.tensors[-1][self.width : self.width + count].view(shape)

    def assert_untouched(self, *, tensors: int) -> None:
        """There were at least so many tensors, and nothing was written beside any."""
        assert len(self.tensors) >= tensors
        for x in self.tensors:
            # bfloat16 holds another number than 777.
            written = torch.cat([x[: self.width], x[len(x) - self.width :]])
            assert (written == torch.full_like(written[:1], 777.0)).all()


def ulps_apart(actual: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """Of 16-bit numbers: how many of their kind lie between, int32."""

    def order(x: torch.Tensor) -> torch.Tensor:
        bits = x.view(torch.int16).int()
        return torch.where(bits < 0, -(bits & 0x7FFF), bits)

    return (order(actual) - order(expected)).abs()
