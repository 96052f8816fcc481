"""What compile_check reads off a disassembly; the check itself is a step of tests/run.sh."""

import itertools
import os
import re
import subprocess
import sys

import pytest
from m1_kernels import compile_check
from m1_kernels.compile_check import Loop, faults, hot_loops, main

SASS = """
        /*0010*/                   STL [R1], R2 ;
        /*0020*/                   HGMMA.64x64x16.F32.BF16 R24, R4, gdesc[UR8], R24 ;
        /*0030*/                   LDL R2, [R1] ;
        /*0040*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0050*/                   HGMMA.64x64x16.F32.BF16 R24, R4, gdesc[UR8], R24 ;
        /*0060*/              @P0 BRA 0x20 ;
        /*0070*/                   LDL R3, [R1] ;
        /*0080*/              @P1 BRA 0x10 ;
        /*0090*/                   FADD R1, R1, R2 ;
        /*00a0*/              @P0 BRA 0x90 ;
"""


SILU = """
        /*0100*/                   LDL R2, [R1] ;
        /*0110*/                   MUFU.EX2 R3, R2 ;
        /*0120*/                   STL [R1], R3 ;
        /*0130*/              @P0 BRA 0x100 ;
        /*0140*/                   MUFU.RCP R3, R2 ;
        /*0150*/                   STL [R1], R3 ;
        /*0160*/              @P0 BRA 0x140 ;
"""


def test_innermost_loops_with_products_are_counted():
    assert hot_loops(SASS) == [Loop(products=2, spills=1, waits=1)]


def test_innermost_loops_with_powers_are_counted():
    """But not those with reciprocals alone, as of a division of integers."""
    assert hot_loops(SASS + SILU) == [Loop(products=2, spills=1, waits=1), Loop(products=0, spills=2, waits=0)]


def test_a_spill_in_a_hot_loop_fails_the_check(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clean = "\n".join(line for line in SASS.splitlines() if "0020" in line or "0050" in line or "0060" in line)
    compiled = {"tight": (255, 8, 1024, SASS), "roomy": (200, 0, 1024, clean)}
    kernels = [(name, name, {}, {}, {}) for name in compiled]
    monkeypatch.setattr(compile_check, "interpreting", lambda: False)
    monkeypatch.setattr(compile_check, "_cases", lambda target, every: kernels)
    monkeypatch.setattr(compile_check, "_compile", lambda kernel, *rest: compiled[kernel])
    assert main(["--targets", "80", "90"]) == 1
    shown = capsys.readouterr()
    assert shown.err.splitlines() == [
        f"tight for sm_{target} spills: 1 accesses; use smaller tiles or more warps" for target in (80, 90)
    ]
    assert len(shown.out.splitlines()) == 5
    assert main(["--targets", "90", "--only", "roomy"]) == 0
    assert main(["--only", "nothing"]) == 2


def test_faults() -> None:
    assert not faults("k", 90, 227 << 10, [Loop(2, 0, 1), Loop(0, 0, 0)], "LDL R1, [R2] ;")  # outside its loops
    assert faults("k", 90, 0, [Loop(2, 0, 1), Loop(0, 1, 0)], "")[0].startswith("spills: 1 ")
    for loops in ([], [Loop(0, 0, 0)]):
        assert [fault.split()[0] for fault in faults("k", 90, 0, loops, "LDL R1, [R2] ;")] == ["spills:"]
    assert [fault.split()[0] for fault in faults("k", 80, 164 << 10, [], "")] == ["needs"]
    assert [fault.split()[0] for fault in faults("k", 90, 0, [Loop(2, 0, 2)], "")] == ["waits"]
    early = (
        "scan_states[128 bf16]",
        "sweep[64 bf16] reverse entry 3",
        "specialised reverse_sweep[128 bf16] entry 2 packed",
    )
    for name in early:
        assert faults(name, 90, 0, [], "")[0].startswith("does not wait")
        assert not faults(name, 80, 0, [], "") and not faults(name, 90, 0, [], "ACQBULK ;")
    assert not faults("sweep[64 bf16] entry 1", 90, 0, [Loop(2, 0, 0)], "")
    assert not faults("sweep[256 fp32] reverse", 90, 0, [Loop(2, 9, 0)], "")
    scalars = [
        faults("specialised reverse_sweep[128 bf16]", 90, 0, [Loop(8, n, 1), Loop(20, 4, 3)], "") for n in (8, 9)
    ]
    assert not scalars[0] and scalars[1][0].startswith("spills: 13 ")


def test_the_check_compiles_what_the_operators_launch() -> None:
    compiling = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "m1_kernels.compile_check", "--list", "--targets", "80", "90"]
    listed = subprocess.run(command, env=compiling, capture_output=True, text=True, check=True).stdout.splitlines()[1:]
    lightning = [re.fullmatch(r"(.*)\[(\d+) (\w+)\](.*)", line[:80].rstrip()) for line in listed]
    found = {(line[80:].strip(), *match.groups()) for line, match in zip(listed, lightning) if match}
    for target, kernel in itertools.product(("80", "90"), ("sweep", "local_states")):
        for dim, kind in itertools.product(("64", "96", "128", "256"), ("bf16", "fp32")):
            special = "specialised " if (target, kernel, dim, kind) == ("90", "sweep", "128", "bf16") else ""
            notes = {notes for *key, notes in found if key == [target, special + kernel, dim, kind]}
            # In reverse there is a kernel of its own.
            assert {"reverse" in note.split() for note in notes} == ({False} if special else {False, True}), (
                target,
                kernel,
                dim,
                kind,
            )
            if special:
                assert " whole saving leaving entry 1 packed" in notes
    forward = {
        (target, kernel, dim, kind) for target, kernel, dim, kind, notes in found if " saving leaving entry 1" in notes
    }
    assert ("80", "sweep", "96", "fp16") in forward and ("90", "specialised sweep", "128", "fp16") in forward
    assert ("90", "sweep", "128", "bf16") not in forward
    activating = {(kind, notes) for *key, kind, notes in found if "activate" in notes.split()}
    assert activating == {
        (kind, f" saving leaving activate {keeping}entry 1 packed")
        for kind, keeping in itertools.product(("bf16", "fp16"), ("", "keeping "))
    }
    backward = {key for key in found if "reverse_sweep" in key[1]}
    assert backward == {
        ("90", "specialised reverse_sweep", "128", "bf16", f" leaving {silu}entry 3 packed")
        for silu in ("", "silu_backward ")
    }
    assert {kernel for _, kernel, *_ in found} >= {
        "scan_states",
        "gated_norm_forward",
        "swiglu_backward",
        "read_states",
    }
