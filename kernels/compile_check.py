"""Compile every Triton kernel for GPUs that need not be there: `python -m m1_kernels.compile_check [--targets 80 90 100]`.

Prints registers, bytes of stack, shared memory and, of the innermost loops that hold matrix products or powers, the matrix
instructions and the spilled accesses. Exits with 1 if such loops spill more than SPILLING allows, if a kernel without products spills at
all, if a kernel needs more shared memory than a block can have, or if on sm_90 the compiler waits for every matrix instruction
(it then says so nowhere, and the kernel runs at half speed). `--all` takes every variant of lightning attention's kernels
that can be launched, some hundreds, in place of the largest.
"""

import argparse
import math
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from m1_kernels.triton_runtime import interpreting

__all__ = ["Loop", "faults", "hot_loops", "main"]

INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,6})\*/\s+([^;]*);")
BRANCH = re.compile(r"\bBRA\b.*?(0x[0-9a-f]+)")
PRODUCT = re.compile(r"\b(HGMMA|HMMA|UTC\w*MMA)\b")
POWER = re.compile(r"\bMUFU\.EX2\b")
SPILL = re.compile(r"\b(LDL|STL)\b")
EARLY = re.compile(r"scan_states|local_states|sweep.* entry [23]")
"""Kernels that can be launched before the kernel in front has ended; ACQBULK waits for it."""
SPILLING = {
    "sweep[256 fp32]": math.inf,
    "specialised reverse_sweep[128": 12,
    "specialised sweep[128 bf16] whole transposed silu_backward": 5,
    "specialised sweep[128 fp16] whole transposed silu_backward": 4,
    "specialised sweep[128 bf16] leaving activate": 2,
}
"""Spilled accesses that a kernel may have in all its loops: of one that spills in all tilings (see `triton_attention.tiling`), and scalars,
beside some thousand instructions, of those whose warps have all registers that there are.
"""
SHARED_BYTES = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
"""Shared memory that a block can have, by target."""


@dataclass(frozen=True)
class Loop:
    """An innermost loop with matrix products or powers: how many of its instructions are products, spills, waits for products."""

    products: int
    spills: int
    waits: int


def hot_loops(sass: str) -> list[Loop]:
    """The innermost loops of a disassembly that hold matrix products, or powers: a partition of a program may apply SiLU alone."""
    code = [(int(address, 16), text) for address, text in INSTRUCTION.findall(sass)]
    spans = []
    for address, text in code:
        branch = BRANCH.search(text)
        if branch and int(branch[1], 16) < address:
            spans.append((int(branch[1], 16), address))
    loops = []
    for first, last in spans:
        body = [text for address, text in code if first <= address <= last]
        products = sum(bool(PRODUCT.search(text)) for text in body)
        inner = any((a, b) != (first, last) and first <= a and b <= last for a, b in spans)
        if not inner and (products or any(POWER.search(text) for text in body)):
            spills = sum(bool(SPILL.search(text)) for text in body)
            loops.append(Loop(products, spills, sum("WARPGROUP.DEPBAR" in text for text in body)))
    return loops


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", type=int, nargs="+", default=[80, 90, 100], help="compute capability times ten")
    parser.add_argument("--only", default="", help="kernels whose name contains this")
    parser.add_argument("--all", action="store_true", help="every variant of lightning attention's kernels")
    parser.add_argument("--list", action="store_true", help="print the names, compile nothing")
    options = parser.parse_args(arguments)
    if interpreting():
        print("TRITON_INTERPRET=1 is set; the interpreter compiles nothing", file=sys.stderr)
        return 2
    failures = []
    taken = 0
    print(f"{'kernel':80} {'sm':>4} {'registers':>9} {'stack':>6} {'shared':>7}  hot loops (products, spills)")
    for target in options.targets:
        for name, kernel, signature, constants, launch in _cases(target, every=options.all):
            if options.only not in name:
                continue
            taken += 1
            if options.list:
                print(f"{name:80} {target:>4}")
                continue
            registers, stack, shared, sass = _compile(kernel, signature, constants, launch, target)
            loops = hot_loops(sass)
            described = ", ".join(f"({loop.products}, {loop.spills})" for loop in loops) or "none"
            print(f"{name:80} {target:>4} {registers:>9} {stack:>6} {shared:>7}  {described}", flush=True)
            failures += [f"{name} for sm_{target} {fault}" for fault in faults(name, target, shared, loops, sass)]
    if not taken:
        print(f"--only {options.only}: no kernel's name contains this; leave it out to see all", file=sys.stderr)
        return 2
    for failure in failures:
        print(failure, file=sys.stderr)
    return 1 if failures else 0


def faults(name: str, target: int, shared: int, loops: list[Loop], sass: str) -> list[str]:
    """What is wrong with a taken kernel, as said behind its name."""
    found = []
    multiplies = any(loop.products for loop in loops)
    spilled = sum(loop.spills for loop in loops) if multiplies else len(SPILL.findall(sass))
    if spilled > max((most for start, most in SPILLING.items() if name.startswith(start)), default=0):
        found.append(f"spills: {spilled} accesses; use smaller tiles or more warps")
    most = SHARED_BYTES.get(target)
    if most is not None and shared > most:
        found.append(f"needs {shared} bytes of shared memory, of which a block has {most}; use smaller tiles")
    if target >= 90 and EARLY.search(name) and "ACQBULK" not in sass:
        found.append("does not wait for the kernel in front, before whose end it is launched")
    if target == 90 and any(loop.waits >= loop.products > 1 for loop in loops):
        found.append("waits for each matrix product; keep branches around products off its loops")
    return found


def _cases(target: int, *, every: bool) -> list[tuple]:
    """(name, kernel, signature, constexprs, options) of what is compiled for `target`."""
    from m1_kernels import (
        compile_launches,
        triton_decode,
        triton_norm,
        triton_paged,
        triton_routing,
        triton_silu,
        triton_states,
        triton_swiglu,
    )

    cases: list[tuple] = [*compile_launches.cases(target, every=every)]
    for module in (triton_norm, triton_swiglu, triton_decode, triton_paged, triton_routing, triton_states):
        cases += module.compile_cases()
    return cases + triton_silu.compile_cases() if target == 90 else cases


def _compile(kernel: Any, signature: dict[str, str], constants: dict, launch: dict, target: int):
    """(registers, bytes of stack, bytes of shared memory, disassembly). A type ending in ":16" is one that 16 divides."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource

    names = kernel.arg_names
    divisible = {
        (place,): [["tt.divisibility", 16]] for place, name in enumerate(names) if signature[name].endswith(":16")
    }
    types = {name: signature[name].removesuffix(":16") for name in names}
    source = (GluonASTSource if kernel.is_gluon() else ASTSource)(kernel, types, constants, divisible)
    compiled = triton.compile(source, target=GPUTarget("cuda", target, 32), options=dict(launch))
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as binary:
        binary.write(compiled.asm["cubin"])
        binary.flush()
        usage, sass = (
            subprocess.run([str(tool), option, binary.name], capture_output=True, text=True, check=True).stdout
            for option in ("--dump-resource-usage", "-sass")
        )
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found is not None, usage
    return int(found[1]), int(found[2]), compiled.metadata.shared, sass


if __name__ == "__main__":
    sys.exit(main())
