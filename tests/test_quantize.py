"""quantize and dequantize: bit for bit what the float64 formulas of reference.py say."""

from __future__ import annotations

import itertools

import pytest
import reference
import torch
from reference import FP4, FP8

import sm120_ops

FORMATS = (FP8, FP4)
RULES = ("deepgemm", "ocp")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def random_matrix(rows: int, k: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Normal values whose magnitude differs from row to row and from group to group."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, k, generator=generator)
    spread = torch.randint(-6, 7, (rows, k // 16), generator=generator).repeat_interleave(16, 1)
    return (x * 2.0**spread).to(dtype)


def check(
    x: torch.Tensor,
    device: torch.device,
    fmt: str,
    gran_k: int = 32,
    gran_mn: int = 1,
    rule: str = "deepgemm",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantises x on the device and compares data, scales and the whole scale storage."""
    rows, k = x.shape
    data, scale = sm120_ops.quantize(x, fmt, gran_k, gran_mn, rule)
    assert data.device.type == scale.device.type == device.type
    assert data.dtype == (torch.float8_e4m3fn if fmt == FP8 else torch.uint8)
    assert data.shape == (rows, k if fmt == FP8 else k // 2)
    assert data.is_contiguous()
    codes, scales = reference.quantize(x, fmt, gran_k, gran_mn, rule)
    groups = reference.ceil_div(k, gran_k)
    words, padded = reference.ceil_div(groups, 4), reference.ceil_div(rows, 4) * 4
    assert scale.dtype == torch.int32
    assert scale.shape == (rows, words)
    assert scale.stride() == (1, padded)
    got_bytes = reference.scale_bytes_of(scale.cpu(), groups)
    assert torch.equal(got_bytes, scales), (got_bytes != scales).nonzero()[:4].tolist()
    got_codes = reference.codes_of(data.cpu())
    assert torch.equal(got_codes, codes), (got_codes != codes).nonzero()[:4].tolist()
    # Padding included: rows up to a multiple of 4, bytes past the last group.
    storage = torch.as_strided(scale, (words, padded), (padded, 1), 0).cpu()
    expected = torch.zeros(words, padded, dtype=torch.int32)
    expected[:, :rows] = reference.pack_scale_bytes(scales).t()
    assert torch.equal(storage, expected)
    return data, scale


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("gran_k", [32, 128])
@pytest.mark.parametrize("dtype", DTYPES)
def test_per_token(
    device: torch.device, fmt: str, rule: str, gran_k: int, dtype: torch.dtype
) -> None:
    for rows, k in [(1, 32), (3, 128), (5, 288), (64, 512), (37, 1056)]:
        check(random_matrix(rows, k, dtype, rows).to(device), device, fmt, gran_k, 1, rule)


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("gran_k", [32, 128])
@pytest.mark.parametrize("gran_mn", [32, 128])
def test_per_block(device: torch.device, fmt: str, gran_k: int, gran_mn: int) -> None:
    for rows, k in [(1, 32), (31, 128), (129, 160), (256, 384), (300, 608)]:
        x = random_matrix(rows, k, torch.bfloat16, rows).to(device)
        for rule in RULES:
            check(x, device, fmt, gran_k, gran_mn, rule)


@pytest.mark.parametrize(("fmt", "k"), [(FP8, 16), (FP8, 48), (FP8, 2864), (FP4, 32), (FP4, 2880)])
@pytest.mark.parametrize("gran_k", [32, 128])
def test_partial_last_group(device: torch.device, fmt: str, k: int, gran_k: int) -> None:
    check(random_matrix(9, k, torch.bfloat16).to(device), device, fmt, gran_k)
    check(random_matrix(9, k, torch.bfloat16).to(device), device, fmt, gran_k, 32, "ocp")


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gran_mn", [1, 32, 128])
def test_per_channel(device: torch.device, fmt: str, dtype: torch.dtype, gran_mn: int) -> None:
    for k, columns in [(32, 1), (64, 7), (288, 33), (512, 200)]:
        w = random_matrix(columns, k, dtype, k).t().contiguous().to(device)  # [K, columns]
        check(w.t(), device, fmt, 32, gran_mn)
        padded = torch.full((k, columns + 5), torch.inf, dtype=dtype, device=device)
        padded[:, :columns] = w
        check(padded[:, :columns].t(), device, fmt, 128, gran_mn)


@pytest.mark.parametrize("fmt", FORMATS)
def test_row_strides(device: torch.device, fmt: str) -> None:
    wide = random_matrix(20, 208, torch.bfloat16).to(device)
    check(wide[:, :96], device, fmt)
    check(wide[:, 7:103], device, fmt)  # rows that start at odd addresses
    check(wide[::3, 16:80], device, fmt)
    check(wide[:1].expand(6, -1)[:, :64], device, fmt)  # all rows are one


@pytest.mark.parametrize("fmt", FORMATS)
def test_empty(device: torch.device, fmt: str) -> None:
    data, scale = sm120_ops.quantize(torch.empty(0, 64, device=device), fmt)
    assert data.shape == (0, 64 if fmt == FP8 else 32)
    assert scale.shape == (0, 1)
    data, scale = sm120_ops.quantize(torch.empty(5, 0, device=device), fmt)
    assert data.shape == (5, 0)
    assert scale.shape == (5, 0)
    assert sm120_ops.dequantize(data, scale).shape == (5, 0)


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_of_every_16_bit_value(
    device: torch.device, fmt: str, rule: str, dtype: torch.dtype
) -> None:
    """All values up to the format's largest, in groups whose scale is pinned to 1."""
    bits = torch.arange(-(1 << 15), 1 << 15).to(torch.int16)
    values = bits.view(dtype)
    largest = reference.MAX[fmt]
    values = values[values.float().abs() <= largest]
    values = values[: len(values) // 31 * 31].reshape(-1, 31)
    x = torch.cat([torch.full((len(values), 1), largest, dtype=dtype), values], 1)
    _, scale = check(x.to(device), device, fmt, 32, 1, rule)
    assert (scale.cpu() == 127).all()


def test_fp4_ties(device: torch.device) -> None:
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    x = torch.cat([torch.tensor([6.0, 0.0, -0.0]), ties, -ties, torch.zeros(15)])[None].to(device)
    for rule, rounded in [
        ("ocp", [0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0]),
        ("deepgemm", [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0]),
    ]:
        data, scale = sm120_ops.quantize(x, FP4, rule=rule)
        values = sm120_ops.dequantize(data, scale)[0].cpu()
        assert values[3:10].tolist() == rounded
        assert values[10:17].tolist() == [-value for value in rounded]
        codes = sm120_ops.unpack_fp4(data)[0].cpu()
        assert codes[2] == codes[10] == (8 if rule == "ocp" else 0)  # -0, and -0.25 rounded to it


def test_fp8_saturates_only_under_ocp(device: torch.device) -> None:
    x = torch.zeros(1, 32, device=device)
    x[0, :4] = torch.tensor([500.0, -511.0, 464.0, 465.0])  # floor(log2 amax) - 8 = 0: scale 1
    data, scale = sm120_ops.quantize(x, FP8, rule="ocp")
    assert sm120_ops.dequantize(data, scale)[0, :4].tolist() == [448.0, -448.0, 448.0, 448.0]
    data, scale = sm120_ops.quantize(x, FP8, rule="deepgemm")
    assert sm120_ops.dequantize(data, scale)[0, :4].tolist() == [512.0, -512.0, 448.0, 480.0]


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("gran_mn", [1, 32])
def test_nan_and_infinity_fill_their_group(
    device: torch.device, fmt: str, rule: str, gran_mn: int
) -> None:
    x = random_matrix(40, 160, torch.float32)
    for i, bad in enumerate([torch.nan, torch.inf, -torch.inf, -torch.nan]):
        x[9 * i, 33 * i + 5] = bad
    x[3, 40] = torch.tensor([-1], dtype=torch.int32).view(torch.float32)[
        0
    ]  # NaN of another payload
    data, scale = check(x.to(device), device, fmt, 32, gran_mn, rule)
    values = sm120_ops.dequantize(data, scale).cpu()
    groups = values.isnan().reshape(40, 5, 32)
    assert torch.equal(groups.any(-1), groups.all(-1))
    assert groups[0, 0].all()
    assert groups[9, 1].all()
    assert not groups[39, 0].any()
    check(x.bfloat16().to(device), device, fmt, 128, gran_mn, rule)


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("rule", RULES)
def test_zero_tiny_and_huge_groups(device: torch.device, fmt: str, rule: str) -> None:
    smallest = 2.0**-149
    x = torch.zeros(64, 32)
    x[1] = -0.0
    x[2, 3] = smallest
    x[3] = torch.arange(32) * smallest
    x[4] = torch.arange(32) * 2.0**-130
    x[5] = torch.linspace(-1e-4, 1e-4, 32)
    x[6] = torch.linspace(-2e-4, 1e-4, 32)
    x[7] = torch.finfo(torch.float32).max
    x[8] = torch.linspace(-1, 1, 32) * torch.finfo(torch.float32).max
    x[9] = torch.finfo(torch.float32).tiny
    x[10, 0], x[10, 1:] = 1.0, smallest
    for row in range(11, 64):  # amax on, just below and just above where the scale changes
        edge = reference.MAX[fmt] * 2.0 ** (row - 40) if row % 2 else 2.0 ** (row - 40)
        near = torch.tensor(edge, dtype=torch.float32)
        x[row, 0] = near
        x[row, 1:] = near * torch.linspace(-1, 1, 31)
        if row % 3:
            x[row, 0] = near.nextafter(torch.tensor(torch.inf if row % 3 == 1 else 0.0))
    check(x.to(device), device, fmt, 32, 1, rule)
    for dtype in (torch.bfloat16, torch.float16):
        halves = x.clamp(-6e4, 6e4).to(dtype)  # finite in float16
        check(halves.to(device), device, fmt, 32, 1, rule)
    check(x[:7].to(device), device, fmt, 32, 32, rule)


def test_scale_of_every_magnitude(device: torch.device) -> None:
    """Every exponent of float32 with mantissas around the places where a rule steps."""
    mantissas = torch.tensor([0, 1, 0x3FFFFF, 0x400000, 0x400001, 0x5FFFFF, 0x600000, 0x600001])
    mantissas = torch.cat([mantissas, torch.tensor([0x7FFFFE, 0x7FFFFF])]).int()
    amax = (torch.arange(255, dtype=torch.int32)[:, None] << 23 | mantissas).view(torch.float32)
    x = torch.zeros(amax.numel(), 32)
    x[:, 7] = amax.flatten()
    for fmt, rule in itertools.product(FORMATS, RULES):
        check(x.to(device), device, fmt, 32, 1, rule)
        check(-x.to(device), device, fmt, 128, 1, rule)


@pytest.mark.parametrize("fmt", FORMATS)
def test_out(device: torch.device, fmt: str) -> None:
    x = random_matrix(37, 288, torch.bfloat16).to(device)
    data, scale = sm120_ops.quantize(x, fmt)
    out = torch.full_like(data.view(torch.uint8), 0x55).view(data.dtype)
    out_scale = torch.full((3, 40), -1, dtype=torch.int32, device=device).t()[:37]
    returned = sm120_ops.quantize(x, fmt, out=(out, out_scale))
    assert returned[0] is out
    assert returned[1] is out_scale
    assert torch.equal(out.view(torch.uint8), data.view(torch.uint8))
    assert torch.equal(out_scale, scale)
    wide = torch.full((3, 64), -1, dtype=torch.int32, device=device).t()[:37]  # wider word columns
    torch.ops.sm120.quantize.out(x, fmt, 32, 1, "deepgemm", out=out, out_scale=wide)
    assert torch.equal(wide, scale)
    if fmt == FP4:
        for dtype in (torch.int8, torch.float4_e2m1fn_x2):
            other = torch.zeros_like(data).view(dtype)
            sm120_ops.quantize(x, fmt, out=(other, out_scale))
            assert torch.equal(other.view(torch.uint8), data)


def test_dequantize_every_fp8_code_and_scale(device: torch.device) -> None:
    codes = torch.arange(256, dtype=torch.uint8).expand(256, -1).contiguous()
    scales = torch.arange(256, dtype=torch.uint8)[:, None].expand(-1, 8).contiguous()
    exact = reference.values_of(codes, scales, FP8, 32)
    data = codes.view(torch.float8_e4m3fn).to(device)
    packed = sm120_ops.pack_scales(scales.to(device))
    for dtype in DTYPES:
        got = sm120_ops.dequantize(data, packed, 32, dtype).cpu()
        # float32 holds every product up to its own largest value, so one rounding follows
        torch.testing.assert_close(got, exact.float().to(dtype), rtol=0, atol=0, equal_nan=True)
    wide = sm120_ops.dequantize(data, packed[:, :1].contiguous().t().contiguous().t()[:, :1], 128)
    assert wide.shape == (256, 256)


def test_dequantize_every_fp4_code_and_scale(device: torch.device) -> None:
    raw = torch.arange(256, dtype=torch.uint8)[None].expand(256, -1).contiguous()
    codes = reference.codes_of(raw)
    scales = torch.arange(256, dtype=torch.uint8)[:, None].expand(-1, 4).contiguous()
    exact = reference.values_of(codes, scales, FP4, 128)
    packed = sm120_ops.pack_scales(scales.to(device))
    for storage in (torch.uint8, torch.int8, torch.float4_e2m1fn_x2):
        for dtype in DTYPES:
            got = sm120_ops.dequantize(raw.to(device).view(storage), packed, 128, dtype).cpu()
            torch.testing.assert_close(got, exact.float().to(dtype), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("gran_k", [32, 128])
def test_dequantize_shapes_and_out(device: torch.device, fmt: str, gran_k: int) -> None:
    generator = torch.Generator().manual_seed(1)
    for rows, k, padding in [(1, 32, 0), (7, 96, 16), (33, 2880, 32), (130, 544, 3)]:
        operand = reference.random_operand(
            rows, k, fmt, gran_k, generator, row_padding=padding, scale_range=(0, 256)
        )
        exact = operand.values.float()
        buffer = operand.data.as_strided(
            (rows, operand.data.stride(0)), (operand.data.stride(0), 1)
        )
        data = buffer.view(torch.uint8).to(device).view(operand.data.dtype)
        data = data[:, : operand.data.shape[1]]
        scale = operand.scale.t().contiguous().to(device).t()
        if rows % 4:
            scale = sm120_ops.pack_scales(operand.bytes.to(device))
        for dtype in DTYPES:
            out = torch.full((rows, k), 77.0, dtype=dtype, device=device)
            assert sm120_ops.dequantize(data, scale, gran_k, out=out) is out
            expected = exact.to(dtype)
            torch.testing.assert_close(out.cpu(), expected, rtol=0, atol=0, equal_nan=True)
            assert torch.equal(
                out.view(torch.uint8),
                sm120_ops.dequantize(data, scale, gran_k, dtype).view(torch.uint8),
            )


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("rule", RULES)
def test_dequantized_values_quantise_to_themselves(
    device: torch.device, fmt: str, rule: str
) -> None:
    generator = torch.Generator().manual_seed(2)
    x = reference.random_operand(65, 320, fmt, 32, generator).values.float().to(device)
    data, scale = sm120_ops.quantize(x, fmt, rule=rule)
    again = sm120_ops.quantize(sm120_ops.dequantize(data, scale), fmt, rule=rule)
    assert torch.equal(
        sm120_ops.dequantize(*again).double(), sm120_ops.dequantize(data, scale).double()
    )


def test_opcheck(device: torch.device) -> None:
    # 36 rows: opcheck clones its arguments, and only unpadded scales survive a clone (layout.py)
    x = random_matrix(36, 288, torch.bfloat16).to(device)
    for fmt, gran_k, gran_mn, rule in itertools.product(FORMATS, (32, 128), (1, 128), RULES):
        reference.opcheck(torch.ops.sm120.quantize.default, (x, fmt, gran_k, gran_mn, rule))
    for fmt in FORMATS:
        data, scale = sm120_ops.quantize(x, fmt)
        reference.opcheck(
            torch.ops.sm120.quantize.out,
            (x, fmt, 32, 1, "deepgemm"),
            {"out": data.clone(), "out_scale": scale.clone()},
        )
        for dtype in DTYPES:
            reference.opcheck(torch.ops.sm120.dequantize.default, (data, scale, 32, dtype))
            out = torch.zeros(36, 288, dtype=dtype, device=device)
            reference.opcheck(torch.ops.sm120.dequantize.out, (data, scale, 32), {"out": out})
    reference.opcheck(torch.ops.sm120.quantize.default, (x[:32, :32].t(), FP4))


@pytest.mark.sanitizer
@pytest.mark.parametrize("fmt", FORMATS)
def test_sanitizer_quantize(fmt: str) -> None:
    device = torch.device("cuda")
    for dtype in DTYPES:
        for gran_k, gran_mn in itertools.product((32, 128), (1, 32, 128)):
            x = random_matrix(37, 160, dtype).to(device)
            data, scale = check(x, device, fmt, gran_k, gran_mn)
            sm120_ops.dequantize(data, scale, gran_k, dtype)
            check(random_matrix(64, 37 * 16, dtype).to(device)[:, 3:35].t(), device, FP8, gran_k)
    torch.cuda.synchronize()
