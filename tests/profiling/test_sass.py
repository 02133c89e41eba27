"""SASS read as text: accesses, widths, the main loop, and occupancy from resources."""

from profiling import sass

TEXT = """
\t.section\t.text.other,"ax",@progbits
        /*0000*/                   EXIT ;
\t.section\t.text.dense,"ax",@progbits
dense:
.text.dense:
        /*0000*/                   LDG.E.64 R8, desc[UR12][R2.64+0x28] ;
.L_x_0:
        /*0010*/                   LDG.E R3, desc[UR12][R34.64] ;
.L_x_1:
        /*0020*/              @!P0 LDG.E.128.CONSTANT R16, desc[UR12][R28.64] ;
        /*0030*/                   FADD.FTZ R15, -R16, R15 ;
        /*0040*/                   STG.E.128 desc[UR12][R28.64], R16 ;
        /*0050*/                   STL [R1], R16 ;
        /*0060*/               @P0 BRA `(.L_x_1) ;
        /*0070*/                   BRA.U UP0, `(.L_x_0) ;
        /*0080*/                   EXIT ;
.L_x_2:
        /*0090*/                   BRA `(.L_x_2) ;
"""


def test_accesses_and_main_loop() -> None:
    found = sass.functions(TEXT)
    assert set(found) == {"other", "dense"}
    assert found["other"].main_loop is None
    dense = found["dense"]
    assert dense.whole.instructions == 10
    assert dense.whole.text == "1 LDG.4, 1 LDG.8, 1 LDG.16, 1 STG.16"
    assert dense.main_loop is not None
    assert dense.main_loop.instructions == 5
    assert dense.main_loop.nbytes("LDG", "STG") == 32


def test_occupancy() -> None:
    assert sass.occupancy(90, 32, 0, 256) == 1.0
    assert sass.occupancy(90, 40, 0, 256) == 0.75
    assert sass.occupancy(90, 64, 0, 256) == 0.5
    assert sass.occupancy(90, 32, 100 * 1024, 256) == 0.25
    assert sass.occupancy(75, 32, 0, 256) == 1.0
