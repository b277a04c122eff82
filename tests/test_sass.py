"""The machine code of the built library: what each sm_120f GEMM kernel is really made of.

No SM120 GPU is needed. The limits for instructions per MMA hold for the kernels that large products
run with, where the tensor core must be kept busy; the smaller tiles are bound by memory, and the
table that is printed shows them all.
"""

from __future__ import annotations

import itertools
import json
import re

import pytest
import sass
import torch

import sm120_ops  # noqa: F401  registers the ops
from sm120_ops import _load

MAX_REGISTERS = 255
MAX_SHARED_BYTES = 101376  # of one block on SM120
# Instructions an MMA of those kernels' main loops, by how scales are read: one byte a block (gran_k
# 128 of both operands), the whole word (32 of both), or by a byte selector (any pair). ptxas puts a
# NOP or another instruction between any two block-scaled MMAs, so 2.0 is the floor. These are the
# wanted numbers, but for two FP4 operands of unlike gran_k.
INSTRUCTIONS_PER_MMA = {
    ("fp8", "coarse"): 2.4,
    ("fp8", "fine"): 2.7,
    ("fp8", "any"): 2.7,
    ("fp4", "coarse"): 3.0,
    ("fp4", "fine"): 3.0,
    ("fp4", "any"): 3.2,
    ("mixed", "coarse"): 4.0,
    ("mixed", "fine"): 4.0,
    ("mixed", "any"): 4.0,
}


def kind(kernel: sass.Kernel) -> str:
    """Operand formats, told by the MMA instruction itself."""
    if any(opcode.startswith("OMMA.SF") for opcode in kernel.mma_opcodes):
        return "fp4"
    return "mixed" if any("E2M1" in opcode for opcode in kernel.mma_opcodes) else "fp8"


def plain_integers(kernel: sass.Kernel) -> list[int]:
    """Those among the template arguments: rows and columns of the tile, warps along the rows."""
    return [int(n) for n in re.findall(r"[<,] ?(\d+)(?=[,>])", sass.short_name(kernel))]


def tile_area(kernel: sass.Kernel) -> int:
    rows, columns = plain_integers(kernel)[:2]
    return rows * columns


# Products that keep every SM of a GB10, RTX 5090 or RTX PRO 6000 at work.
LARGE_PRODUCTS = (
    (4096, 7168, 16384),
    (8192, 7168, 16384),
    (8192, 24576, 1536),
    (65536, 7168, 2048),
)
SMS = (48, 170, 188)
FORMATS = {
    "fp8": ("mxfp8", "mxfp8"),
    "fp4": ("mxfp4", "mxfp4"),
    "mixed": ("mxfp8", "mxfp4"),
}


def chosen_tiles(formats: str) -> set[tuple[int, int, int]]:
    """Tiles that the native cost model takes for large products."""
    tiles = set()
    for shape, grans, sms in itertools.product(
        LARGE_PRODUCTS, ((32, 32), (128, 128), (128, 32)), SMS
    ):
        config = json.loads(
            torch.ops.sm120._gemm_config(
                *shape, *FORMATS[formats], *grans, sms, True, 96 << 20, 1792
            )
        )
        tiles.add((config["tile_rows"], config["tile_cols"], config["warps_down"]))
    return tiles


@pytest.fixture(scope="module")
def kernels() -> list[sass.Kernel]:
    found = sass.read_kernels(_load.LIBRARY, "sm_120f")
    return [kernel for kernel in found if "block_scaled_gemm" in kernel.name]


def test_table(kernels: list[sass.Kernel], capsys: pytest.CaptureFixture[str]) -> None:
    assert kernels
    with capsys.disabled():
        print(f"\n{sass.table(kernels)}")


def test_uses_the_block_scaled_mma(kernels: list[sass.Kernel]) -> None:
    for kernel in kernels:
        assert kernel.mma_opcodes, kernel.name
        for opcode in kernel.mma_opcodes:
            assert re.match(r"(QMMA|OMMA)\.SF\.", opcode), f"{opcode} in {kernel.name}"
    assert {kind(kernel) for kernel in kernels} == {"fp8", "fp4", "mixed"}


def test_no_local_memory_in_main_loops(kernels: list[sass.Kernel]) -> None:
    for kernel in kernels:
        assert kernel.mma_loops, f"no loop around the MMAs of {kernel.name}"
        for loop in kernel.mma_loops:
            assert loop.local_accesses == [], kernel.name


def test_resources(kernels: list[sass.Kernel]) -> None:
    for kernel in kernels:
        assert kernel.registers <= MAX_REGISTERS, kernel.name
        assert kernel.static_shared <= MAX_SHARED_BYTES, kernel.name


def test_stages_are_released_behind_a_fence(kernels: list[sass.Kernel]) -> None:
    """Without it the arrive is issued while the last load of the stage is in flight: a race."""
    for kernel in kernels:
        for loop in kernel.mma_loops:
            assert loop.releases > 0, kernel.name
            assert loop.unfenced_releases() == [], kernel.name


def test_a_missing_fence_is_seen() -> None:
    """The analysis on a made-up kernel: a main loop with an inner spin, fenced and not."""
    text = """
        Function : kernel
        /*0000*/                   S2R R0, SR_TID.X ;
        /*0010*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R1+URZ], R2 ;
        /*0020*/              @!P0 BRA 0x00b0 ;
        /*0030*/                   LDSM.16.M88.4 R4, [R1] ;
        /*0040*/                   QMMA.SF.16832.F32.E4M3.E4M3.E8 R8, R4, R6, R8, R2, R3, URZ ;
        /*0050*/                   NOP ;
        /*0060*/                   {fence} ;
        /*0070*/             @!P1  SYNCS.ARRIVE.TRANS64.A1T0 RZ, [R1+URZ], RZ ;
        /*0080*/               @P2 BRA 0x0010 ;
        /*0090*/                   STL [R1], R8 ;
        /*00a0*/                   EXIT ;
        /*00b0*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R1+URZ], R2 ;
        /*00c0*/              @!P0 BRA 0x00b0 ;
        /*00d0*/                   BRA 0x0030 ;
    """
    for fence, unfenced in (("FENCE.VIEW.ASYNC.S", []), ("MEMBAR.ALL.CTA", []), ("NOP", [0x70])):
        (loop,) = sass.mma_loops(sass.parse(text.format(fence=fence))["kernel"])
        assert loop.early_releases() == []  # the MMA has used what was loaded
        assert (loop.head, loop.mmas, loop.releases) == (0x10, 1, 1)
        assert [i.address for i in loop.body] == list(range(0x10, 0x90, 0x10))
        assert loop.local_accesses == []
        assert [i.address for i in loop.unfenced_releases()] == unfenced


def test_a_release_before_its_loads_is_seen() -> None:
    text = """
        Function : kernel
        /*0000*/                   LDSM.16.M88.4 R4, [R1] ;
        /*0010*/                   HMMA.16816.F32.BF16 R8, R4.reuse, R12, R8 ;
        /*0020*/                   LDSM.16.M88.4 R16, [R1+0x20] ;
        /*0030*/                   {then} ;
        /*0040*/             @!P1  SYNCS.ARRIVE.TRANS64.A1T0 RZ, [R2+URZ], RZ ;
        /*0050*/                   HMMA.16816.F32.BF16 R8, R16, R20, R8 ;
        /*0060*/               @P2 BRA 0x0000 ;
        /*0070*/                   EXIT ;
    """
    for then, early in (
        ("LOP3.LUT R2, R19, UR6, R3, 0xc8, !PT", []),
        ("FENCE.VIEW.ASYNC.S", []),
        ("LOP3.LUT R2, R20, UR6, R3, 0xc8, !PT", [0x40]),
    ):
        (loop,) = sass.mma_loops(sass.parse(text.format(then=then))["kernel"])
        assert [i.address for i in loop.early_releases()] == early


def scale_reads(formats: str, loop: sass.Loop) -> str:
    """Told by the loads of scale bytes and by the selections that are not an FP4 unpacking's."""
    opcodes = [i.opcode for i in loop.body]
    if "LDS.U8" in opcodes:
        return "coarse"
    unpackings = loop.mmas // 2 if formats == "mixed" else 0
    return "any" if opcodes.count("PRMT") > unpackings else "fine"


def test_large_products(kernels: list[sass.Kernel]) -> None:
    """Few instructions an MMA, and no local memory at all, the stores included."""
    chosen = {formats: chosen_tiles(formats) for formats in FORMATS}
    seen = set()
    for kernel in kernels:
        formats = kind(kernel)
        rows, columns, warps_down = plain_integers(kernel)[:3]
        if (rows, columns, warps_down) not in chosen[formats]:
            continue
        assert kernel.stack == 0, kernel.name
        assert not [i for i in kernel.code if sass.LOCAL_MEMORY.match(i.opcode)], kernel.name
        for loop in kernel.mma_loops:
            case = formats, scale_reads(formats, loop)
            seen.add(case)
            assert loop.instructions_per_mma <= INSTRUCTIONS_PER_MMA[case], (case, kernel.name)
    assert seen == set(INSTRUCTIONS_PER_MMA)


# ---- BF16 and TF32: HMMA on both targets ---------------------------------------------------------

BF16_INSTRUCTIONS_PER_MMA = 3.0  # of the largest tile, in every layout


@pytest.fixture(scope="module")
def hmma_kernels() -> list[sass.Kernel]:
    found = sass.read_kernels(_load.LIBRARY, "sm_120f")
    return [k for k in found if "bf16_gemm" in k.name or "hc_prenorm" in k.name]


def test_hmma_kernels(hmma_kernels: list[sass.Kernel], capsys: pytest.CaptureFixture[str]) -> None:
    with capsys.disabled():
        print(f"\n{sass.table(hmma_kernels)}")
    assert {"bf16_gemm" in kernel.name for kernel in hmma_kernels} == {True, False}
    for kernel in hmma_kernels:
        wanted = "HMMA.16816" if "bf16_gemm" in kernel.name else "HMMA.1688"
        assert kernel.mma_opcodes, kernel.name
        assert all(opcode.startswith(wanted) for opcode in kernel.mma_opcodes), kernel.name
        assert kernel.registers <= MAX_REGISTERS
        assert kernel.static_shared <= MAX_SHARED_BYTES
        assert kernel.stack == 0, kernel.name
        assert not [i for i in kernel.code if sass.LOCAL_MEMORY.match(i.opcode)], kernel.name


def test_hmma_stages_are_released_after_their_loads(hmma_kernels: list[sass.Kernel]) -> None:
    """By a fence, or in the BF16 GEMM by what the arrive depends on. The release may stand in a
    loop around the one that multiplies.
    """
    for kernel in hmma_kernels:
        loops = [loop for loop in sass.natural_loops(kernel.code) if loop.mmas]
        assert any(loop.releases > 0 for loop in loops), kernel.name
        for loop in loops:
            assert loop.early_releases() == [], kernel.name


def test_bf16_instructions_per_mma(hmma_kernels: list[sass.Kernel]) -> None:
    gemms = [kernel for kernel in hmma_kernels if "bf16_gemm" in kernel.name]
    largest = max(map(tile_area, gemms))
    measured = [k.mma_loops[0].instructions_per_mma for k in gemms if tile_area(k) == largest]
    assert len(measured) == 4
    assert max(measured) <= BF16_INSTRUCTIONS_PER_MMA


def test_both_targets_have_every_kernel() -> None:
    native = {kernel.name for kernel in sass.read_kernels(_load.LIBRARY, "sm_120f")}
    emulated = {kernel.name for kernel in sass.read_kernels(_load.LIBRARY, "sm_90a")}
    assert native == emulated
    assert native


# ---- MQA logits ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mqa_kernels() -> list[sass.Kernel]:
    found = sass.read_kernels(_load.LIBRARY, "sm_120f")
    return [kernel for kernel in found if "mqa_logits<" in sass.short_name(kernel)]


def test_mqa_kernels(mqa_kernels: list[sass.Kernel], capsys: pytest.CaptureFixture[str]) -> None:
    with capsys.disabled():
        print(f"\n{sass.table(mqa_kernels)}")
    assert len(mqa_kernels) == 48
    assert {kind(kernel) for kernel in mqa_kernels} == {"fp8", "fp4"}
    for kernel in mqa_kernels:
        assert all(re.match(r"(QMMA|OMMA)\.SF\.", opcode) for opcode in kernel.mma_opcodes)
        assert kernel.stack == 0, f"{kernel.name} spills"
        assert kernel.registers <= MAX_REGISTERS
        assert kernel.static_shared <= 1024, kernel.name  # what the system reserves
        (loop,) = kernel.mma_loops
        assert loop.releases > 0
        assert loop.unfenced_releases() == [], kernel.name


def test_mqa_loads_keys_once_for_all_heads(mqa_kernels: list[sass.Kernel]) -> None:
    """An ldmatrix brings the keys of one MMA step; each is used for every tile of 8 heads."""
    for kernel in mqa_kernels:
        (loop,) = kernel.mma_loops
        tiles = int(re.findall(r"\d+", sass.short_name(kernel))[-2])
        loads = sum(1 for i in loop.body if i.opcode.startswith("LDSM"))
        assert loads * tiles == loop.mmas, kernel.name
