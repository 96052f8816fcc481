"""What lightning attention launches, recorded on the CPU without running it, for `compile_check`."""

import itertools
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from m1_kernels import gluon_backward, gluon_lightning, triton_attention, triton_lightning
from m1_kernels.triton_attention import SEGMENT, WHOLE, _Call, _Plan

__all__ = ["DIMS", "DTYPES", "Case", "cases"]

DIMS = (64, 96, 128, 256)
M1_DIM = 128
DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
TOKENS, HEADS = 333, 16  # sizes that 16 does and does not divide, as most are
SPANS = ((WHOLE, WHOLE, WHOLE), (WHOLE, SEGMENT, SEGMENT), (SEGMENT, SEGMENT, SEGMENT))
PLANS = tuple(_Plan(*spans, whole, whole) for spans in SPANS for whole in (False, True))
FEATURES = ("VARLEN", "ENTRY", "SAVING", "LEAVING", "INITIAL", "HORIZON")

# name, kernel, signature, constexprs, options
Case = tuple[str, Any, dict[str, str], dict[str, Any], dict[str, int]]


def cases(capability: int, *, every: bool = False) -> list[Case]:
    """Kernels of the forward, backward and state passes as compute capability `capability` (times ten) launches them.

    At head_dim DIMS in DTYPES; `every` variant, or of those that compute the same the one that has most around its loop. Without
    `every`, float16 only in the first launch of a width and where SiLU is applied, and transposed states only at M1's width: the loops are
    the same.
    """
    found: dict[str, Case] = {}
    contents = set()
    for dim, dtype in itertools.product(DIMS, DTYPES):
        alike: dict[str, list[Case]] = {}
        for case in _launches(dim, dtype, capability):
            content = repr(case[1:])
            if content not in contents:
                contents.add(content)
                alike.setdefault(case[0] if every else _computes(case), []).append(case)
        chosen = [max(variants, key=_features) for variants in alike.values()]
        if dtype == torch.float16 and not every:
            chosen = [case for case in chosen if case is chosen[0] or case[3].get("ACTIVATE")]
        found |= {case[0]: case for case in chosen}
    return list(found.values())


def _computes(case: Case) -> str:
    """Equal for launches whose loops compute the same."""
    _, kernel, _, constants, _ = case
    transposed = constants.get("D") == M1_DIM and constants.get("TRANSPOSED")
    loops = [constants.get(name) for name in ("REVERSE", "HALVES", "SILU_BACKWARD", "ACTIVATE")]
    return f"{kernel.__name__} {loops} {'KeptRows' in constants} {transposed}"


def _features(case: Case) -> int:
    return sum(int(case[3].get(name, 0)) for name in FEATURES)


def _launches(dim: int, dtype: torch.dtype, capability: int) -> Iterator[Case]:
    with _recording(capability) as launched:
        for packed, stateful, plan, saving in itertools.product((False, True), (False, True), PLANS, (False, True)):
            _run(dim, dtype, plan, packed=packed, stateful=stateful, saving=saving)
        for packed, reverse, horizon in itertools.product((False, True), repeat=3):
            x, slopes, edges = _inputs(dim, dtype, packed)
            triton_attention.lightning_state_triton(
                x, x, slopes, cu_seqlens=edges, reverse=reverse, horizon=horizon, segment=SEGMENT
            )
    for kernel, positional, named in launched:
        yield _case(kernel, positional, named, dim, DTYPES[dtype])


def _inputs(dim: int, dtype: torch.dtype, packed: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    x = torch.empty(1 if packed else 3, TOKENS, HEADS, dim, dtype=dtype)
    return x, torch.ones(HEADS), torch.tensor([0, 5, 7, TOKENS], dtype=torch.int32) if packed else None


def _run(dim: int, dtype: torch.dtype, plan: _Plan, *, packed: bool, stateful: bool, saving: bool) -> None:
    x, slopes, edges = _inputs(dim, dtype, packed)
    call = _Call.of(x, slopes, edges)
    state = torch.empty(3, HEADS, dim, dim) if stateful else None
    _, states = triton_attention._forward(call, plan, x, x, x, x, state, saving=saving, leaving=stateful)
    if call.specialised and plan.forward == WHOLE and not plan.forward_whole:
        for activated in (None, torch.empty(*x.shape[:3], 3 * dim, dtype=dtype)) if saving else (None,):
            triton_attention._forward(
                call, plan, x, x, x, x, state, saving=saving, leaving=stateful, activate=True, activated=activated
            )
    call.zero_padding(torch.empty(*x.shape[:3], 3 * dim, dtype=dtype))
    if saving:
        for silu_inputs in (None, (x, x, x)) if call.specialised else (None,):
            triton_attention._backward(call, plan, x, x, x, x, state, x, x, x, state, states, silu_inputs)


@contextmanager
def _recording(capability: int) -> Iterator[list[tuple[Any, tuple, dict[str, Any]]]]:
    """Launches in place of being made are appended to the list: kernel, arguments by place and by name."""
    launched: list[tuple[Any, tuple, dict[str, Any]]] = []

    class Recorder:
        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return lambda *positional, **named: launched.append((self.kernel, positional, named))

    choice = _Call.specialised.func  # type: ignore[attr-defined]

    def specialised(call: _Call) -> bool:
        gpu = SimpleNamespace(type="cuda")
        return choice(SimpleNamespace(device=gpu, capability=capability, dim=call.dim, dtype=call.dtype))

    with ExitStack() as stack:
        stack.enter_context(patch.object(_Call, "capability", capability))
        stack.enter_context(patch.object(_Call, "specialised", property(specialised)))
        for module in (triton_lightning, gluon_lightning, gluon_backward):
            for name, value in list(vars(module).items()):
                if not name.startswith("_") and hasattr(value, "arg_names") and value.__module__ == module.__name__:
                    stack.enter_context(patch.object(module, name, Recorder(value)))
        yield launched


def _case(kernel: Any, positional: tuple, named: dict[str, Any], dim: int, kind: str) -> Case:
    absent = {parameter.name: parameter.default for parameter in kernel.params if parameter.has_default}
    given = absent | dict(zip(kernel.arg_names, positional)) | named
    options = {"num_warps": given.pop("num_warps", 4), "launch_pdl": given.pop("launch_pdl", False)}
    fixed = {parameter.name for parameter in kernel.params if parameter.is_constexpr}
    plain = {parameter.name for parameter in kernel.params if parameter.do_not_specialize}
    constants = {name: value for name, value in given.items() if name in fixed or value is None}
    signature = {
        name: "constexpr" if name in constants else _type(given[name], name not in plain) for name in kernel.arg_names
    }
    label = "specialised " if kernel.is_gluon() else ""
    notes = ["whole"] if constants.get("HALVES") == 2 else []
    notes += [
        name.lower()
        for name in ("REVERSE", "TRANSPOSED", "SAVING", "LEAVING", "INITIAL", "SILU_BACKWARD", "ACTIVATE")
        if constants.get(name)
    ]
    notes += ["keeping"] if signature.get("KeptRows", "constexpr") != "constexpr" else []
    notes += [f"entry {constants['ENTRY']}"] if constants.get("ENTRY") else []
    notes += ["packed"] if constants.get("VARLEN") else []
    notes += ["all tokens"] if constants.get("HORIZON") is False else []
    return f"{label}{kernel.__name__}[{dim} {kind}] {' '.join(notes)}".rstrip(), kernel, signature, constants, options


def _type(value: Any, specialised: bool) -> str:
    """As in a signature of `compile_check`: ":16" behind a type that 16 divides."""
    if isinstance(value, int):
        return "i32:16" if specialised and value % 16 == 0 else "i32"
    if isinstance(value, torch.Tensor):
        return f"*{ {**DTYPES, torch.int32: 'i32'}[value.dtype] }:16"
    layout = f",{value.layout!r}" if hasattr(value, "layout") else ""
    return f"tensordesc<{DTYPES[value.base.dtype]}{str(value.block_shape).replace(' ', '')}{layout}>"
