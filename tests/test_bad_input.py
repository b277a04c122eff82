"""Every refusal says op, argument, requirement and what it got, and leaves no CUDA error behind."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch

import sm120_ops
from sm120_ops import _check, gemm, quantize

M, N, K = 8, 12, 128


@pytest.fixture(autouse=True)
def nothing_left_behind(device: torch.device) -> Any:
    yield
    if device.type == "cuda":
        torch.cuda.synchronize()
        x = torch.ones(4, 32, device=device)
        assert sm120_ops.dequantize(*quantize(x)).eq(1).all()


@pytest.fixture
def a(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    return quantize(torch.randn(M, K, device=device))


@pytest.fixture
def b(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    return quantize(torch.randn(N, K, device=device))


def refused(
    op: str, arg: str, requirement: str, got: str, kind: type[Exception] = ValueError
) -> Any:
    """Expects an error of exactly this text; `...` stands for anything."""
    text = f"sm120_ops.{op}: {arg}: expected {requirement}, got {got}"
    pattern = "^" + re.escape(text).replace(re.escape("..."), ".*") + "$"
    return pytest.raises(kind, match=pattern)


GRANS: dict[str, Any] = {"gran_k_a": 32, "gran_k_b": 32}


# ---- quantize, dequantize ------------------------------------------------------------------------


def test_quantize_arguments(device: torch.device) -> None:
    x = torch.randn(M, K, device=device)
    with refused("quantize", "format", "'mxfp8' or 'mxfp4'", "'fp8'"):
        quantize(x, "fp8")
    with refused("quantize", "gran_k", "32 or 128", "64"):
        quantize(x, gran_k=64)
    with refused("quantize", "gran_mn", "1, 32 or 128", "2"):
        quantize(x, gran_mn=2)
    with refused("quantize", "rule", "'deepgemm' or 'ocp'", "'floor'"):
        quantize(x, rule="floor")
    with refused("quantize", "x", "2 dimensions", "[8, 4, 32]"):
        quantize(x.reshape(8, 4, 32))
    with refused("quantize", "x", "a torch.Tensor", "list", TypeError):
        quantize([1.0])  # type: ignore[arg-type]
    floats = "dtype torch.bfloat16, torch.float16 or torch.float32"
    for dtype in (torch.float64, torch.int32, torch.float8_e4m3fn):
        with refused("quantize", "x", floats, str(dtype), TypeError):
            quantize(x.to(dtype))


def test_quantize_k_and_strides(device: torch.device) -> None:
    for k in (8, 15, 17, 24):
        with refused("quantize", "x", "K to be a multiple of 16 for mxfp8", f"K={k}"):
            quantize(torch.randn(M, k, device=device))
    for k in (16, 48):
        with refused("quantize", "x", "K to be a multiple of 32 for mxfp4", f"K={k}"):
            quantize(torch.randn(M, k, device=device), "mxfp4")
    with refused("quantize", "x", "one stride to be 1", "strides [256, 2]"):
        quantize(torch.randn(M, 2 * K, device=device)[:, ::2])


def test_quantize_out(device: torch.device) -> None:
    x = torch.randn(M, K, device=device)
    data, scale = quantize(x)
    with refused("quantize", "out", "dtype torch.float8_e4m3fn", "torch.uint8", TypeError):
        quantize(x, out=(data.view(torch.uint8), scale))
    with refused("quantize", "out", "shape [8, 128]", "[7, 128]"):
        quantize(x, out=(data[:7], scale))
    with refused("quantize", "out", "a contiguous tensor", "strides [1, 8]"):
        quantize(x, out=(data.t().contiguous().t(), scale))
    with refused("quantize", "out", "a pair (data, scale)", "Tensor", TypeError):
        quantize(x, out=data)  # type: ignore[arg-type]
    with refused("quantize", "out_scale", "packed scales of shape [8, 1]", "[8, 4]"):
        quantize(x, out=(data, torch.zeros(8, 4, dtype=torch.int32, device=device)))
    floats = torch.zeros(8, 1, device=device)
    packed = "dtype torch.int32 (packed UE8M0)"
    with refused("quantize", "out_scale", packed, "torch.float32", TypeError):
        quantize(x, out=(data, floats))
    wide = torch.randn(M, 2 * K, device=device)
    wide_scale = torch.zeros(8, 2, dtype=torch.int32, device=device)
    strides = "MN-major strides [1, a multiple of 4 >= 8]"
    with refused("quantize", "out_scale", strides, "strides [2, 1]"):
        quantize(wide, out=(quantize(wide)[0], wide_scale))
    raw = torch.empty(M * K + 8, dtype=torch.uint8, device=device)[8:].view(M, K)
    with refused("quantize", "out", "a 16-byte aligned data pointer", "0x..."):
        quantize(x, out=(raw.view(torch.float8_e4m3fn), scale))
    inside = x.view(torch.uint8).flatten()[: M * K].view(M, K).view(torch.float8_e4m3fn)
    with refused("quantize", "out", "memory apart from x", "overlapping memory"):
        quantize(x, out=(inside, scale))


def test_dequantize(device: torch.device, a: tuple[torch.Tensor, torch.Tensor]) -> None:
    data, scale = a
    with refused("dequantize", "gran_k", "32 or 128", "16"):
        sm120_ops.dequantize(data, scale, 16)
    choices = "torch.bfloat16, torch.float16 or torch.float32"
    with refused("dequantize", "dtype", choices, "torch.float64"):
        sm120_ops.dequantize(data, scale, dtype=torch.float64)
    with refused("dequantize", "data", "dtype torch.float8_e4m3fn, ...", "torch.int32", TypeError):
        sm120_ops.dequantize(scale, scale)
    with refused("dequantize", "data", "stride(1) == 1 (K-major)", "strides [1, 8]"):
        sm120_ops.dequantize(data.t().contiguous().t(), scale)
    with refused("dequantize", "scale", "packed scales of shape [8, 1]", "[12, 1]"):
        sm120_ops.dequantize(data, torch.zeros(12, 1, dtype=torch.int32, device=device))
    with refused("dequantize", "out", "shape [8, 128]", "[8, 64]"):
        sm120_ops.dequantize(data, scale, out=torch.empty(8, 64, device=device))


# ---- layout --------------------------------------------------------------------------------------

BAD_SCALES = [0.0, -1.0, math.nan, math.inf, -math.inf, 3.0, 2.0**-128]


@pytest.mark.parametrize("value", BAD_SCALES)
def test_float32_scale_that_is_no_power_of_two(
    device: torch.device, value: float, a: tuple[torch.Tensor, torch.Tensor]
) -> None:
    powers = "float32 scales that are powers of two in 2^-127 .. 2^127"
    scale = torch.ones(M, 4, device=device)
    scale[5, 2] = value
    got = f"{value!r} at row 5, group 2"
    with refused("pack_scales", "scale", powers, got):
        sm120_ops.pack_scales(scale)
    with refused("gemm", "sfa", powers, got):
        gemm((a[0], scale), a, gran_k_b=32)
    with refused("gemm", "sfb", powers, got):
        gemm(a, (a[0], scale), gran_k_a=32)
    d = gemm((a[0], scale), a, gran_k_b=32, validate=False)
    assert d.isnan().all(1).tolist() == [row == 5 for row in range(M)]


def test_pack_and_unpack_scales(device: torch.device, a: tuple[torch.Tensor, torch.Tensor]) -> None:
    scale = torch.ones(M, 4, device=device)
    dtypes = "dtype torch.float32, torch.uint8 or torch.float8_e8m0fnu"
    with refused("pack_scales", "scale", dtypes, "torch.bfloat16", TypeError):
        sm120_ops.pack_scales(scale.bfloat16())
    with refused("pack_scales", "scale", "2 dimensions", "[4]"):
        sm120_ops.pack_scales(scale[0])
    with refused("pack_scales", "gran_mn", "1, 32 or 128", "64"):
        sm120_ops.pack_scales(scale, gran_mn=64)
    with refused("pack_scales", "scale", "shape [1, groups] (rows=20, gran_mn=32)", "[8, 4]"):
        sm120_ops.pack_scales(scale, 20, 32)
    with refused("unpack_scales", "groups", "1 to 4 groups for 1 words a row", "5"):
        sm120_ops.unpack_scales(a[1], 5)
    choices = "torch.uint8, torch.float8_e8m0fnu or torch.float32"
    with refused("unpack_scales", "dtype", choices, "torch.int32"):
        sm120_ops.unpack_scales(a[1], 4, torch.int32)
    with refused("unpack_scales", "scale", "dtype torch.int32 (packed UE8M0)", "...", TypeError):
        sm120_ops.unpack_scales(scale, 4)


def test_fp4_layout(device: torch.device) -> None:
    codes = torch.zeros(3, 5, dtype=torch.uint8, device=device)
    with refused("pack_fp4", "codes", "an even last dimension", "[3, 5]"):
        sm120_ops.pack_fp4(codes)
    with refused("pack_fp4", "codes", "dtype torch.uint8", "torch.int32", TypeError):
        sm120_ops.pack_fp4(codes.int())
    with refused("unpack_fp4", "packed", "dtype torch.uint8, ...", "torch.float32", TypeError):
        sm120_ops.unpack_fp4(codes.float())
    with refused("transpose_fp4", "packed", "an even number of rows", "[3, 5]"):
        sm120_ops.transpose_fp4(codes)
    with refused("transpose_fp4", "packed", "2 dimensions", "[3, 5, 1]"):
        sm120_ops.transpose_fp4(codes[..., None])


# ---- gemm ----------------------------------------------------------------------------------------

Pair = tuple[torch.Tensor, torch.Tensor]


def test_gemm_operands(device: torch.device, a: Pair, b: Pair) -> None:
    fp8_or_fp4 = "dtype torch.float8_e4m3fn, torch.uint8, torch.int8 or torch.float4_e2m1fn_x2"
    with refused("gemm", "a", fp8_or_fp4, "torch.bfloat16", TypeError):
        gemm((a[0].bfloat16(), a[1]), b, **GRANS)
    with refused("gemm", "b", fp8_or_fp4, "torch.float8_e5m2", TypeError):
        gemm(a, (b[0].float().to(torch.float8_e5m2), b[1]), **GRANS)
    with refused("gemm", "a", "a pair (data, scale)", "Tensor", TypeError):
        gemm(a[0], b, **GRANS)  # type: ignore[arg-type]
    with refused("gemm", "b", "2 dimensions", "[1, 12, 128]"):
        gemm(a, (b[0][None], b[1]), **GRANS)
    with refused("gemm", "b", "K=128 as in a", "K=96"):
        gemm(a, quantize(torch.randn(N, 96, device=device)), **GRANS)
    with refused("gemm", "gran_k_a", "32 or 128", "64"):
        gemm(a, b, gran_k_a=64, gran_k_b=32)
    with refused("gemm", "sfa", "gran_k_a=32 or 128 to be given for K=128", "shape [8, 1], ..."):
        gemm(a, b)
    with refused("gemm", "layout", "'nt', 'nn', 'tn' or 'tt'", "'NT'"):
        gemm(a, b, layout="NT", **GRANS)
    with refused("gemm", "out_dtype", "torch.bfloat16 or torch.float32", "torch.float16"):
        gemm(a, b, out_dtype=torch.float16, **GRANS)


def test_gemm_k_rule(device: torch.device, b: Pair) -> None:
    def zeros(k: int) -> Pair:
        data = torch.zeros(M, k, dtype=torch.uint8, device=device).view(torch.float8_e4m3fn)
        return data, torch.full((M, -(-k // 32)), 127, dtype=torch.uint8, device=device)

    buffer = torch.zeros(M, 48, dtype=torch.uint8, device=device).view(torch.float8_e4m3fn)
    for k in (8, 24, 40):  # rows of an aligned buffer, so that K alone is wrong
        off = (buffer[:, :k], zeros(k)[1])
        with refused("gemm", "a", "K to be a multiple of 16 with FP8 operands", f"K={k}"):
            gemm(off, off)
    half = (torch.zeros(M, 32, dtype=torch.uint8, device=device)[:, :24], zeros(48)[1])
    with refused("gemm", "a", "K to be a multiple of 32 with an FP4 operand", "K=48"):
        gemm(half, zeros(48))
    with refused("gemm", "a", "K to be a multiple of 32 with an FP4 operand", "K=48"):
        gemm(zeros(48), half)


def test_gemm_alignment(device: torch.device, b: Pair, a: Pair) -> None:
    buffer = torch.zeros(M * 160 + 8, dtype=torch.uint8, device=device).view(torch.float8_e4m3fn)
    scale = a[1]
    shifted = buffer[8 : 8 + M * K].view(M, K)
    with refused("gemm", "a", "a 16-byte aligned data pointer", "0x..."):
        gemm((shifted, scale), b, **GRANS)
    odd_rows = buffer[: M * 136].view(M, 136)[:, :K]
    rows = "a row stride that is a multiple of 16 bytes >= 128"
    with refused("gemm", "a", rows, "strides [136, 1]"):
        gemm((odd_rows, scale), b, **GRANS)
    with refused("gemm", "a", rows, "strides [0, 1]"):
        gemm((a[0][:1].expand(M, -1), scale), b, **GRANS)
    with refused("gemm", "b", "stride(1) == 1 (K-major)", "strides [1, 12]"):
        gemm(a, (b[0].t().contiguous().t(), b[1]), **GRANS)
    words = torch.zeros(9, dtype=torch.int32, device=device)[1:].view(1, 8).t()
    with refused("gemm", "sfa", "a 16-byte aligned data pointer", "0x..."):
        gemm((a[0], words), b, **GRANS)


def test_gemm_scales(device: torch.device, a: Pair, b: Pair) -> None:
    ints = torch.zeros(M, 4, dtype=torch.int32, device=device)
    with refused("gemm", "sfa", "packed scales of shape [8, 1]", "[8, 4]"):
        gemm((a[0], ints), b, **GRANS)
    with refused("gemm", "sfb", "packed scales of shape [12, 1]", "[8, 1]"):
        gemm(a, (b[0], a[1]), **GRANS)
    dtypes = "dtype torch.int32, torch.float32, torch.uint8 or torch.float8_e8m0fnu"
    with refused("gemm", "sfa", dtypes, "torch.bfloat16", TypeError):
        gemm((a[0], ints.bfloat16()), b, **GRANS)
    columns = "4 columns (gran_k 32) or 1 (gran_k 128) for K=128"
    with refused("gemm", "sfb", columns, "[12, 3]"):
        gemm(a, (b[0], torch.ones(N, 3, device=device)), gran_k_a=32)
    with refused("gemm", "sfb", "[rows, groups] with 12 (gran_mn 1) or ...", "[5, 4]"):
        gemm(a, (b[0], torch.ones(5, 4, device=device)), gran_k_a=32)
    wide = quantize(torch.randn(M, 2 * K, device=device))
    strides = "MN-major strides [1, a multiple of 4 >= 8]"
    with refused("gemm", "sfa", strides, "strides [2, 1]"):
        gemm((wide[0], wide[1].contiguous()), wide, **GRANS)
    rows = torch.zeros(2, 9, dtype=torch.int32, device=device).t()[:M]
    with refused("gemm", "sfb", strides, "strides [1, 9]"):
        gemm(wide, (wide[0], rows), **GRANS)


def test_gemm_c_and_out(device: torch.device, a: Pair, b: Pair) -> None:
    def run(**options: Any) -> torch.Tensor:
        return gemm(a, b, **GRANS, **options)

    c = torch.zeros(M, N, device=device)
    with refused("gemm", "c", "dtype torch.bfloat16", "torch.float32", TypeError):
        run(c=c, out_dtype=torch.bfloat16)
    with refused("gemm", "c", "shape [8, 12]", "[12, 8]"):
        run(c=c.t())
    with refused("gemm", "c", "stride(1) == 1", "strides [1, 8]"):
        run(c=torch.zeros(N, M, device=device).t())
    with refused("gemm", "out", "shape [8, 12]", "[8, 16]"):
        run(out=torch.zeros(M, 16, device=device))
    choices = "dtype torch.bfloat16 or torch.float32"
    with refused("gemm", "out", choices, "torch.float16", TypeError):
        run(out=c.half())
    with refused("gemm", "out", "dtype torch.bfloat16 (out_dtype)", "torch.float32", TypeError):
        run(out=c, out_dtype=torch.bfloat16)
    with refused("gemm", "out", "a torch.Tensor", "list", TypeError):
        run(out=[c])
    with refused("gemm", "c", "a torch.Tensor", "float", TypeError):
        run(c=1.0)
    with refused("gemm", "out", "stride(1) == 1", "strides [24, 2]"):
        run(out=torch.zeros(M, 24, device=device)[:, ::2])
    with refused("gemm", "out", "a row stride >= 12", "strides [0, 1]"):
        run(out=c[:1].expand(M, -1))
    buffer = torch.zeros(M * 2, N, device=device)
    with refused("gemm", "out", "memory apart from c", "overlapping memory"):
        run(c=buffer[1 : M + 1], out=buffer[:M])
    as_floats = a[0].view(torch.uint8).flatten()[: M * N * 4].view(torch.float32).view(M, N)
    with refused("gemm", "out", "memory apart from a", "overlapping memory"):
        run(out=as_floats)
    for splits in ([4, 2], [4, -1, 4], [0, 3, 0]):
        requirement = "[left, mid, right], none negative, with left + right > 0"
        with refused("gemm", "head_splits", requirement, str(splits)):
            run(head_splits=splits)
    with refused("gemm", "head_splits", "left + right to divide N=12", "[4, 2, 1]"):
        run(head_splits=[4, 2, 1])


def test_requires_grad(device: torch.device, a: Pair, b: Pair) -> None:
    x = torch.randn(M, K, device=device, requires_grad=True)
    with refused("quantize", "x", "a tensor that needs no gradient ...", "...", RuntimeError):
        quantize(x)
    c = torch.zeros(M, N, device=device, requires_grad=True)
    with refused("gemm", "c", "a tensor that needs no gradient ...", "...", RuntimeError):
        gemm(a, b, c=c, **GRANS)
    with torch.no_grad():
        assert not quantize(x)[1].requires_grad
        assert not gemm(a, b, c=c, **GRANS).requires_grad


@pytest.mark.gpu
@pytest.mark.parametrize("device", ["cuda"], indirect=True)
def test_device_mix(device: torch.device, a: Pair, b: Pair) -> None:
    here, there = "a tensor on cuda:0, as ", "one on cpu"
    with refused("gemm", "b", here + "a", there):
        gemm(
            a,
            (b[0].cpu(), sm120_ops.pack_scales(sm120_ops.unpack_scales(b[1], K // 32).cpu())),
            **GRANS,
        )
    with refused("gemm", "sfa", here + "a", there):
        gemm((a[0], a[1].cpu()), b, **GRANS)
    with refused("gemm", "c", here + "a", there):
        gemm(a, b, c=torch.zeros(M, N), **GRANS)
    with refused("gemm", "out", here + "a", there):
        gemm(a, b, out=torch.zeros(M, N), **GRANS)
    with refused("dequantize", "scale", here + "data", there):
        sm120_ops.dequantize(a[0], a[1].cpu())
    with refused("quantize", "out", here + "x", there):
        quantize(torch.randn(M, K, device=device), out=(a[0].cpu(), a[1]))


def test_raw_ops_check_as_well(device: torch.device, a: Pair, b: Pair) -> None:
    """torch.ops users get the same texts."""
    ops = torch.ops.sm120
    kinds = (ValueError, TypeError, RuntimeError)
    x = torch.randn(M, 24, device=device)
    for match, call in [
        (
            r"sm120_ops.quantize: x: expected K to be a multiple of 16 .*, got K",
            lambda: ops.quantize(x, "mxfp8"),
        ),
        (
            r"sm120_ops.quantize: gran_k: expected 32 or 128, got 7",
            lambda: ops.quantize(x, "mxfp8", 7),
        ),
        (
            r"sm120_ops.dequantize: scale: expected .*, got",
            lambda: ops.dequantize(*b[:1], a[1][:7], 32, x.dtype),
        ),
        (
            r"sm120_ops.gemm: b: expected .*K.*, got",
            lambda: ops.gemm(*a, b[0][:, :64], b[1], 32, 32, x.dtype),
        ),
        (
            r"sm120_ops.gemm: gran_k_b: expected 32 or 128, got 5",
            lambda: ops.gemm(*a, *b, 32, 5, x.dtype),
        ),
        (
            r"sm120_ops.gemm: sfa: expected .*, got",
            lambda: ops.gemm(a[0], a[1][:7], *b, 32, 32, x.dtype),
        ),
        (
            r"sm120_ops.pack_scales: gran_mn: expected 1, 32 or 128",
            lambda: ops.pack_scales(x, 8, 3),
        ),
        (
            r"sm120_ops.unpack_scales: groups: expected .*, got 9",
            lambda: ops.unpack_scales(a[1], 9, x.dtype),
        ),
        (r"sm120_ops.pack_fp4: codes: expected dtype torch.uint8", lambda: ops.pack_fp4(x)),
        (
            r"sm120_ops.transpose_fp4: packed: .* even number of rows",
            lambda: ops.transpose_fp4(b[0][:3].view(torch.uint8)),
        ),
    ]:
        with pytest.raises(kinds, match=match):
            call()


def test_overlap_is_told_from_neighbourhood(device: torch.device) -> None:
    """D beside C in one buffer is fine: their columns are apart although their addresses mingle."""
    buffer = torch.zeros(M, 2 * N + 4, device=device)
    left, right = buffer[:, :N], buffer[:, N + 4 :]
    _check.require_no_overlap("gemm", "out", left, c=right)
    _check.require_no_overlap("gemm", "out", right, c=left)
    for columns in (buffer[:, 1 : N + 1], buffer[:, N - 1 : 2 * N], buffer[:, ::2]):
        with refused("gemm", "out", "memory apart from c", "overlapping memory"):
            _check.require_no_overlap("gemm", "out", left, c=columns)
    wrapped = buffer.as_strided((M - 1, N + 6), (2 * N + 4, 1), 2 * N)  # runs into the next row
    with refused("gemm", "out", "memory apart from c", "overlapping memory"):
        _check.require_no_overlap("gemm", "out", left, c=wrapped)
