"""The PTX of SiLU, executed instruction by instruction on all 16-bit inputs."""

import re
import struct

import numpy as np
import pytest
import torch
from m1_kernels.triton_silu import assembly

from tests.unit.kernels.checks import ulps_apart

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
EVERY = np.arange(65536, dtype=np.uint32)
INFINITE = {"bf16": 0x7F80, "fp16": 0x7C00}
LEAST = -43
"""To which x is clamped: from here on results are torch's to a rounding."""


def execute(text: str, registers: dict[str, np.ndarray], ex2_ulps: int = 0, rcp_ulps: int = 0) -> dict[str, np.ndarray]:
    """All registers after the instructions of `text`; approximate ones are exact, rounded, and then so many float32 ulps off."""

    def value(name: str) -> np.ndarray:
        if name.startswith("0f"):
            return np.float32(struct.unpack(">f", bytes.fromhex(name[2:]))[0])
        return np.uint32(int(name, 0)) if name[0].isdigit() else found[name]

    def off(exact: np.ndarray, ulps: int) -> np.ndarray:
        rounded = np.where(exact < 2.0**-126, 0, exact).astype(np.float32)
        return np.where((rounded > 0) & np.isfinite(rounded), (rounded.view(np.int32) + ulps).view(np.float32), rounded)

    def halves(pair: np.ndarray, dtype: torch.dtype) -> np.ndarray:
        return torch.from_numpy(np.array(pair)).to(dtype).view(torch.int16).numpy().view(np.uint16).astype(np.uint32)

    found = dict(registers)
    for line in re.findall(r"^(?!\.reg)(\w[^;]*);", text, re.MULTILINE):
        name, operands = line.split(" ", 1)
        if split := re.fullmatch(r"{(\w+), (\w+)}, (\S+)", operands):
            found |= {split[1]: value(split[3]) & np.uint32(0xFFFF), split[2]: value(split[3]) >> np.uint32(16)}
            continue
        target, *sources = operands.split(", ")
        a, *rest = (value(source) for source in sources)
        floats = [x.view(np.float32) for x in (a, *rest)]
        match name:
            case "mov.b32":
                result = a
            case "shl.b32":
                result = a << rest[0]
            case "and.b32":
                result = a & rest[0]
            case "cvt.f32.f16":
                result = a.astype(np.uint16).view(np.float16).astype(np.float32)
            case "mul.rn.f32":
                result = floats[0] * floats[1]
            case "add.rn.f32":
                result = floats[0] + floats[1]
            case "fma.rn.f32":
                x, y, z = (operand.astype(np.float64) for operand in floats)
                result = (x * y + z).astype(np.float32)
            case "max.NaN.bf16x2" | "max.NaN.f16x2":
                dtype = torch.bfloat16 if "bf16" in name else torch.float16
                low, high = (
                    torch.maximum(*(unpacked(x >> np.uint32(shift), dtype).float() for x in (a, rest[0]))).numpy()
                    for shift in (0, 16)
                )
                result = halves(high, dtype) << np.uint32(16) | halves(low, dtype)
            case "ex2.approx.ftz.f32":
                result = off(np.exp2(floats[0].astype(np.float64)), ex2_ulps)
            case "rcp.approx.ftz.f32":
                result = off(1 / floats[0].astype(np.float64), rcp_ulps)
            case "cvt.rn.bf16x2.f32" | "cvt.rn.f16x2.f32":
                dtype = torch.bfloat16 if "bf16" in name else torch.float16
                result = halves(floats[0], dtype) << np.uint32(16) | halves(floats[1], dtype)
            case _:
                raise AssertionError(f"{name} is not emulated")
        found[target] = result
    return found


def unpacked(bits: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    return torch.from_numpy(np.array(bits & np.uint32(0xFFFF)).astype(np.uint16).view(np.int16)).view(dtype)


def activated(dtype: str, place: int, others: np.ndarray, **ulps: int) -> torch.Tensor:
    """SiLU of all 16-bit inputs, each at `place` of a pair of which `others` are the rest."""
    low, high = (EVERY, others) if place == 0 else (others, EVERY)
    with np.errstate(all="ignore"):
        pair = execute(assembly(dtype), {"$1": low | high << np.uint32(16)}, **ulps)["$0"]
    return unpacked(pair >> np.uint32(16 * place), DTYPES[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
def test_all_inputs_are_as_torch_rounds_them(dtype: str) -> None:
    """But for at most 8 of them, by one ulp; 1 in 400 where the approximate instructions are off by 2 ulps, as they may be."""
    x = unpacked(EVERY, DTYPES[dtype])
    expected = torch.nn.functional.silu(x)
    normal, clamped = x.float() >= LEAST, x.isfinite() & (x.float() < LEAST)
    others = np.random.default_rng(0).permutation(EVERY)
    spoilt = unpacked(others, DTYPES[dtype]).isnan()
    for place in range(2):
        for ex2_ulps, rcp_ulps in ((0, 0), (2, 2), (-2, -2), (2, -2), (-2, 2)):
            found = activated(dtype, place, others, ex2_ulps=ex2_ulps, rcp_ulps=rcp_ulps)
            assert torch.equal(found.isnan(), x.isnan() | spoilt)
            live = ~spoilt & x.isfinite()
            apart = ulps_apart(found, expected)
            assert apart[normal & live].max() <= 1 and (apart[normal & live] > 0).sum() <= (160 if ex2_ulps else 8)
            assert (found.double() - expected.double()).abs()[clamped & live].max() < 1e-17
            assert (found[clamped & live] <= 0).all() and found[clamped & live].signbit().all()
            assert found[(x == torch.inf) & ~spoilt].eq(torch.inf).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_minus_infinity_is_as_minus_43(dtype: str) -> None:
    for place in range(2):
        found = activated(dtype, place, np.zeros_like(EVERY))
        x = unpacked(EVERY, DTYPES[dtype])
        assert found[x == -torch.inf] == found[x == -43] and found[x == -43].double().abs() < 1e-17


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_element_depends_on_numbers_beside_it(dtype: str) -> None:
    """Infinities of both signs and the largest finite numbers among them."""
    infinite = INFINITE[dtype]
    for place in range(2):
        alone = activated(dtype, place, np.zeros_like(EVERY))
        for other in (infinite, infinite | 0x8000, infinite - 1, (infinite - 1) | 0x8000):
            found = activated(dtype, place, np.full_like(EVERY, other))
            apart = ulps_apart(found, alone)
            assert torch.equal(found.isnan(), alone.isnan()) and apart[~alone.isnan()].max() <= 1
            assert (apart > 0).sum() <= 8
