"""What compile_check reads off a disassembly; the check itself is a step of tests/run.sh."""

from m1_kernels.compile_check import Loop, hot_loops

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


def test_innermost_loops_with_products_are_counted():
    assert hot_loops(SASS) == [Loop(products=2, spills=1, waits=1)]
