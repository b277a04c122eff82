"""The scale forms, FP4 packing and the transpose of packed FP4: exact by construction."""

from __future__ import annotations

import math

import pytest
import reference
import torch

import sm120_ops

FP4_DTYPES = (torch.uint8, torch.int8, torch.float4_e2m1fn_x2)
SHAPES = [(1, 1), (3, 4), (4, 5), (37, 7), (130, 23), (257, 90)]


def random_bytes(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, shape, generator=generator).to(torch.uint8)


def float_scales(exponents: torch.Tensor) -> torch.Tensor:
    return reference.UE8M0[exponents.long()].float()


def check_packed(packed: torch.Tensor, exponents: torch.Tensor) -> None:
    """Values, strides and the zeroed padding against uint8 [rows, groups]."""
    rows, groups = exponents.shape
    words, padded = reference.ceil_div(groups, 4), reference.ceil_div(rows, 4) * 4
    assert packed.dtype == torch.int32
    assert packed.shape == (rows, words)
    assert packed.stride() == (1, padded)
    storage = torch.as_strided(packed, (words, padded), (padded, 1), 0).cpu()
    expected = torch.zeros(words, padded, dtype=torch.int32)
    expected[:, :rows] = reference.pack_scale_bytes(exponents).t()
    assert torch.equal(storage, expected)


def test_tables_of_all_codes_agree_with_torch() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    for dtype, table in [
        (torch.float8_e4m3fn, reference.E4M3),
        (torch.float8_e8m0fnu, reference.UE8M0),
    ]:
        values = codes.view(dtype).float().double()
        torch.testing.assert_close(values, table, rtol=0, atol=0, equal_nan=True)
    assert reference.E2M1.tolist()[:8] == [0, 0.5, 1, 1.5, 2, 3, 4, 6]


@pytest.mark.parametrize(("rows", "groups"), SHAPES)
def test_bytes_round_trip(device: torch.device, rows: int, groups: int) -> None:
    exponents = random_bytes(rows, groups)
    packed = sm120_ops.pack_scales(exponents.to(device))
    check_packed(packed, exponents)
    check_packed(sm120_ops.pack_scales(exponents.to(device).view(torch.float8_e8m0fnu)), exponents)
    for dtype in (torch.uint8, torch.float8_e8m0fnu):
        unpacked = sm120_ops.unpack_scales(packed, groups, dtype)
        assert unpacked.dtype == dtype
        assert unpacked.is_contiguous()
        assert torch.equal(unpacked.view(torch.uint8).cpu(), exponents)


def test_every_exponent_as_float32(device: torch.device) -> None:
    exponents = torch.arange(255, dtype=torch.uint8)[None].repeat(3, 1)
    scales = float_scales(exponents).to(device)
    assert scales[0, 0].item() == 2.0**-127
    packed = sm120_ops.pack_scales(scales)
    check_packed(packed, exponents)
    assert torch.equal(sm120_ops.unpack_scales(packed, 255, torch.float32), scales)
    nan = sm120_ops.pack_scales(torch.full((2, 3), 255, dtype=torch.uint8, device=device))
    assert sm120_ops.unpack_scales(nan, 3, torch.float32).isnan().all()


def test_float32_that_is_no_power_of_two_becomes_nan(device: torch.device) -> None:
    bad = [0.0, -0.0, math.nan, math.inf, -math.inf, -1.0, -(2.0**-127), 3.0, 1.0 + 2.0**-23]
    bad += [2.0**-128, 2.0**-149, 2.0**-126 + 2.0**-149, 2.0**-127 + 2.0**-149, 0.1]
    bad += [torch.finfo(torch.float32).max, 2.0**-126 - 2.0**-149]
    good = [1.0, 2.0**127, 2.0**-126, 2.0**-127]
    scale = torch.tensor([bad + good], dtype=torch.float32)
    packed = sm120_ops.pack_scales(scale.to(device), validate=False)
    unpacked = sm120_ops.unpack_scales(packed, len(bad + good))[0].tolist()
    assert unpacked == [255] * len(bad) + [127, 254, 1, 0]


def test_float32_of_every_exponent_and_some_mantissas(device: torch.device) -> None:
    mantissas = torch.tensor([0, 1, 0x200000, 0x3FFFFF, 0x400000, 0x400001, 0x7FFFFF])
    bits = torch.arange(512)[:, None] << 23 | mantissas
    scale = torch.where(bits >= 1 << 31, bits - (1 << 32), bits).int().view(torch.float32)
    expected = torch.full(scale.shape, 255, dtype=torch.uint8)
    for exponent in range(1, 255):
        expected[exponent, 0] = exponent
    expected[0, 4] = 0  # 0x00400000
    packed = sm120_ops.pack_scales(scale.to(device), validate=False)
    check_packed(packed, expected)


@pytest.mark.parametrize("gran_mn", [1, 32, 128])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float8_e8m0fnu, torch.float32])
def test_row_blocks(device: torch.device, gran_mn: int, dtype: torch.dtype) -> None:
    for rows, groups in SHAPES:
        blocks = random_bytes(reference.ceil_div(rows, gran_mn), groups, seed=rows) % 255
        scale = float_scales(blocks) if dtype == torch.float32 else blocks.view(dtype)
        packed = sm120_ops.pack_scales(scale.to(device), rows, gran_mn)
        check_packed(packed, blocks.repeat_interleave(gran_mn, 0)[:rows])
    assert sm120_ops.pack_scales(scale.to(device), gran_mn=gran_mn).shape[0] == (
        scale.shape[0] * gran_mn
    )


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_strided_scales(device: torch.device, dtype: torch.dtype) -> None:
    exponents = random_bytes(50, 22) % 255
    scale = (float_scales(exponents) if dtype == torch.float32 else exponents).to(device)
    check_packed(sm120_ops.pack_scales(scale.t().contiguous().t()), exponents)
    check_packed(sm120_ops.pack_scales(scale[3:40:2, 1:20]), exponents[3:40:2, 1:20])
    check_packed(sm120_ops.pack_scales(scale[:1].expand(9, -1)), exponents[:1].expand(9, -1))
    if dtype == torch.uint8:
        check_packed(sm120_ops.pack_scales(scale[:, ::3]), exponents[:, ::3])


def test_empty_scales(device: torch.device) -> None:
    for rows, groups in [(0, 5), (7, 0), (0, 0)]:
        exponents = torch.zeros(rows, groups, dtype=torch.uint8, device=device)
        packed = sm120_ops.pack_scales(exponents)
        assert packed.shape == (rows, reference.ceil_div(groups, 4))
        for dtype in (torch.uint8, torch.float32):
            assert sm120_ops.unpack_scales(packed, groups, dtype).shape == (rows, groups)


def test_scale_out(device: torch.device) -> None:
    exponents = random_bytes(37, 9)
    packed = sm120_ops.pack_scales(exponents.to(device))
    out = torch.full((3, 48), -1, dtype=torch.int32, device=device).t()[:37]
    torch.ops.sm120.pack_scales.out(exponents.to(device), 37, 1, out=out)
    assert torch.equal(out, packed)
    for dtype in (torch.uint8, torch.float8_e8m0fnu, torch.float32):
        unpacked = torch.empty(37, 9, dtype=dtype, device=device)
        torch.ops.sm120.unpack_scales.out(packed, 9, out=unpacked)
        expected = sm120_ops.unpack_scales(packed, 9, dtype)
        assert torch.equal(unpacked.view(torch.uint8), expected.view(torch.uint8))
    wide = sm120_ops.unpack_scales(out, 9)  # word columns further apart than they need be
    assert torch.equal(wide.cpu(), exponents)


def test_every_fp4_byte(device: torch.device) -> None:
    packed = torch.arange(256, dtype=torch.uint8, device=device)[None]
    codes = sm120_ops.unpack_fp4(packed)
    assert codes.dtype == torch.uint8
    assert codes[0, ::2].tolist() == [byte & 15 for byte in range(256)]
    assert codes[0, 1::2].tolist() == [byte >> 4 for byte in range(256)]
    assert torch.equal(sm120_ops.pack_fp4(codes), packed)
    assert torch.equal(sm120_ops.pack_fp4(codes | 0xA0), packed)  # only four bits of a code count


@pytest.mark.parametrize("shape", [(2,), (1, 2), (5, 34), (3, 7, 62), (0, 8), (4, 0), (513, 1026)])
def test_fp4_round_trip(device: torch.device, shape: tuple[int, ...]) -> None:
    codes = random_bytes(*shape) & 15
    packed = sm120_ops.pack_fp4(codes.to(device))
    assert packed.shape == (*shape[:-1], shape[-1] // 2)
    assert torch.equal(packed.cpu(), codes[..., ::2] | codes[..., 1::2] << 4)
    for dtype in FP4_DTYPES:
        assert torch.equal(sm120_ops.unpack_fp4(packed.view(dtype)).cpu(), codes)
    out = torch.full_like(packed, 0x55)
    torch.ops.sm120.pack_fp4.out(codes.to(device), out=out)
    assert torch.equal(out, packed)
    out = torch.full(shape, 0x55, dtype=torch.uint8, device=device)
    torch.ops.sm120.unpack_fp4.out(packed, out=out)
    assert torch.equal(out.cpu(), codes)


def test_fp4_strides(device: torch.device) -> None:
    codes = (random_bytes(30, 40) & 15).to(device)
    assert torch.equal(sm120_ops.pack_fp4(codes.t()), sm120_ops.pack_fp4(codes.t().contiguous()))
    packed = random_bytes(30, 40).to(device)
    assert torch.equal(sm120_ops.unpack_fp4(packed[:, 3:20]), sm120_ops.unpack_fp4(packed)[:, 6:40])


@pytest.mark.parametrize("rows", [2, 6, 32, 62, 64, 130, 1024])
@pytest.mark.parametrize("half", [1, 3, 16, 31, 33, 97, 200])
def test_transpose_fp4(device: torch.device, rows: int, half: int) -> None:
    packed = random_bytes(rows, half, seed=rows).to(device)
    transposed = sm120_ops.transpose_fp4(packed)
    assert transposed.shape == (half * 2, rows // 2)
    assert transposed.is_contiguous()
    expected = reference.codes_of(packed.cpu()).t()
    assert torch.equal(reference.codes_of(transposed.cpu()), expected)
    assert torch.equal(sm120_ops.transpose_fp4(transposed), packed)
    out = torch.zeros_like(transposed)
    torch.ops.sm120.transpose_fp4.out(packed, out=out)
    assert torch.equal(out, transposed)


def test_transpose_fp4_dtypes_and_empty(device: torch.device) -> None:
    packed = random_bytes(16, 8).to(device)
    for dtype in FP4_DTYPES:
        transposed = sm120_ops.transpose_fp4(packed.view(dtype))
        assert transposed.dtype == dtype
        assert torch.equal(transposed.view(torch.uint8), sm120_ops.transpose_fp4(packed))
    assert sm120_ops.transpose_fp4(packed[:, :0]).shape == (0, 8)
    assert sm120_ops.transpose_fp4(packed[:0]).shape == (16, 0)


def test_opcheck(device: torch.device) -> None:
    ops = torch.ops.sm120
    exponents = (random_bytes(36, 9) % 255).to(device)  # 36 rows: see test_quantize.test_opcheck
    packed = sm120_ops.pack_scales(exponents)
    for scale in (exponents, exponents.view(torch.float8_e8m0fnu)):
        reference.opcheck(ops.pack_scales.default, (scale, 36, 1))
    floats = float_scales(exponents.cpu()).to(device)
    reference.opcheck(ops.pack_scales.default, (floats[:2], 36, 32))
    reference.opcheck(ops.pack_scales.out, (floats, 36, 1), {"out": packed.clone()})
    for dtype in (torch.uint8, torch.float8_e8m0fnu, torch.float32):
        reference.opcheck(ops.unpack_scales.default, (packed, 9, dtype))
    reference.opcheck(ops.unpack_scales.out, (packed, 9), {"out": torch.zeros_like(floats)})
    for op, argument in [
        (ops.pack_fp4, exponents[:, :8].contiguous() & 15),
        (ops.unpack_fp4, exponents),
        (ops.transpose_fp4, exponents),
    ]:
        reference.opcheck(op.default, (argument,))
        reference.opcheck(op.out, (argument,), {"out": torch.zeros_like(op(argument))})


@pytest.mark.sanitizer
def test_sanitizer_layout() -> None:
    device = torch.device("cuda")
    for rows, groups in SHAPES[:5]:
        exponents = (random_bytes(rows, groups) % 255).to(device)
        for scale in (exponents, float_scales(exponents.cpu()).to(device)):
            packed = sm120_ops.pack_scales(scale)
            blocks = sm120_ops.pack_scales(scale.t().contiguous().t(), rows * 32 - 5, 32)
            assert blocks.shape[0] == rows * 32 - 5
        for dtype in (torch.uint8, torch.float32):
            sm120_ops.unpack_scales(packed, groups, dtype)
        fp4 = random_bytes(rows * 2, groups).to(device)
        sm120_ops.pack_fp4(sm120_ops.unpack_fp4(fp4))
        sm120_ops.transpose_fp4(fp4)
    torch.cuda.synchronize()
