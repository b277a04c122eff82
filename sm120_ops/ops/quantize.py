"""Quantisation to MXFP8 and MXFP4, and back.

A group of `gran_k` values along K (times `gran_mn` rows) shares one UE8M0 scale 2^(byte - 127).

Scale rules, `amax` being the largest magnitude of the group and `max` that of the format (448 for
E4M3, 6 for E2M1):

    deepgemm   max(amax, 1e-4) / max in float32, rounded up to a power of two: nothing saturates
    ocp        2^(floor(log2 amax) - emax), emax = 8 or 2, clamped to 2^-127 (OCP MX v1.0, 6.3);
               amax = 0 gives byte 0, and values above max saturate

Data is x * 2^(127 - byte), exact in float32, rounded once:

    MXFP8      to nearest, ties to even, saturating at +-448; the sign of zero is kept
    MXFP4      to nearest, saturating at +-6. Ties: to the even code with rule "ocp" (0.25 -> 0,
               0.75 -> 1, 1.25 -> 1, 1.75 -> 2, 2.5 -> 2, 3.5 -> 4, 5 -> 4), which keeps the sign
               of zero; to the smaller magnitude with "deepgemm", where -0 becomes +0

A NaN or an infinity makes its whole group NaN: scale byte 0xFF, FP8 codes 0x7F, FP4 codes 0.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from .. import _check
from .layout import (
    E8M0_NAN,
    FP4_DTYPES,
    GRANS_MN,
    TAGS,
    as_bytes,
    bytes_from_words,
    ceil_div,
    check_out,
    check_packed_scales,
    fake_packed_scales,
    fresh,
    pack_nibbles,
    words_from_bytes,
)
from .library import Library

FORMATS = ("mxfp8", "mxfp4")
RULES = ("deepgemm", "ocp")
GRANS_K = (32, 128)
FLOAT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
K_MULTIPLE = {"mxfp8": 16, "mxfp4": 32}  # 16-byte rows

E4M3_MAX, E2M1_MAX = 448.0, 6.0
E4M3_EMAX, E2M1_EMAX = 8, 2
E4M3_NAN = 0x7F
MIN_AMAX = 1e-4  # of rule "deepgemm"

# Between the neighbouring magnitudes of E2M1: 0, 0.5, 1, 1.5, 2, 3, 4, 6 are those of codes 0 .. 7.
_E2M1_MIDPOINTS = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
# A value above limit i has a code above i. With ties to even, the midpoints between an odd code and
# the next even one belong to the upper side.
_E2M1_LIMITS = {
    "deepgemm": _E2M1_MIDPOINTS,
    "ocp": torch.where(
        torch.arange(7) % 2 == 1, _E2M1_MIDPOINTS.nextafter(torch.tensor(0.0)), _E2M1_MIDPOINTS
    ),
}

_lib = Library()
_lib.define(
    "quantize(Tensor x, str format, int gran_k=32, int gran_mn=1, str rule='deepgemm')"
    " -> (Tensor, Tensor)",
    tags=TAGS,
)
_lib.define(
    "quantize.out(Tensor x, str format, int gran_k, int gran_mn, str rule,"
    " *, Tensor(a!) out, Tensor(b!) out_scale) -> ()",
    tags=TAGS,
)
_lib.define(
    "dequantize(Tensor data, Tensor scale, int gran_k, ScalarType dtype) -> Tensor", tags=TAGS
)
_lib.define(
    "dequantize.out(Tensor data, Tensor scale, int gran_k, *, Tensor(a!) out) -> ()", tags=TAGS
)


# ---- quantize ------------------------------------------------------------------------------------


def data_shape(rows: int, k: int, format: str) -> tuple[int, int]:
    return (rows, k if format == "mxfp8" else k // 2)


def data_dtype(format: str) -> torch.dtype:
    return torch.float8_e4m3fn if format == "mxfp8" else torch.uint8


def _check_quantize(
    x: torch.Tensor, format: str, gran_k: int, gran_mn: int, rule: str
) -> tuple[int, int]:
    """Gives the shape of the matrix."""
    op = "quantize"
    _check.require_choice(op, "format", format, FORMATS)
    _check.require_choice(op, "gran_k", gran_k, GRANS_K)
    _check.require_choice(op, "gran_mn", gran_mn, GRANS_MN)
    _check.require_choice(op, "rule", rule, RULES)
    _check.require_tensor(op, "x", x, rank=2)
    _check.require_dtype(op, "x", x, FLOAT_DTYPES)
    if x.shape[1] % K_MULTIPLE[format] != 0:
        requirement = f"K to be a multiple of {K_MULTIPLE[format]} for {format}"
        _check.fail(op, "x", requirement, f"K={x.shape[1]}")
    if x.stride(1) != 1 and x.stride(0) != 1:
        _check.fail(op, "x", "one stride to be 1", f"strides {list(x.stride())}")
    return x.shape[0], x.shape[1]


def _check_quantize_out(
    x: torch.Tensor, format: str, gran_k: int, out: torch.Tensor, out_scale: torch.Tensor
) -> None:
    op = "quantize"
    rows, k = x.shape
    dtypes = (torch.float8_e4m3fn,) if format == "mxfp8" else FP4_DTYPES
    check_out(op, "out", out, data_shape(rows, k, format), dtypes)
    _check.require_aligned(op, "out", out)
    check_packed_scales(op, "out_scale", out_scale, rows, ceil_div(k, gran_k))
    _check.require_same_device(op, "x", x=x, out=out, out_scale=out_scale)
    _check.require_no_overlap(op, "out", out, x=x, out_scale=out_scale)
    _check.require_no_overlap(op, "out_scale", out_scale, x=x)


def _exponents(amax: torch.Tensor, format: str, rule: str) -> torch.Tensor:
    """amax of each group, float32 -> its scale byte, as int32."""
    finite = torch.isfinite(amax)
    amax = torch.where(finite, amax, 0.0)
    if rule == "deepgemm":
        # The divisor is a tensor: a division by a Python number may become a multiplication.
        limit = amax.new_tensor(E4M3_MAX if format == "mxfp8" else E2M1_MAX)
        bits = (amax.clamp(min=MIN_AMAX) / limit).view(torch.int32)
        exponent = (bits >> 23) + (bits & 0x7FFFFF != 0)
    else:
        emax = E4M3_EMAX if format == "mxfp8" else E2M1_EMAX
        # frexp's mantissa lies in [0.5, 1), subnormals included: floor(log2 amax) = exponent - 1.
        exponent = torch.frexp(amax).exponent - 1 - emax + 127
        exponent = torch.where(amax > 0, exponent.clamp(min=0), 0)
    return torch.where(finite, exponent, E8M0_NAN).to(torch.int32)


def _e2m1_codes(scaled: torch.Tensor, rule: str) -> torch.Tensor:
    """float32 -> E2M1 codes, uint8."""
    limits = _E2M1_LIMITS[rule]
    codes = torch.bucketize(scaled.abs().contiguous(), limits, out_int32=True).to(torch.uint8)
    negative = scaled.signbit() if rule == "ocp" else scaled < -_E2M1_MIDPOINTS[0]
    return codes | (negative.to(torch.uint8) << 3)


def _quantized(
    x: torch.Tensor, format: str, gran_k: int, gran_mn: int, rule: str
) -> tuple[torch.Tensor, torch.Tensor]:
    rows, k = x.shape
    blocks, groups = ceil_div(rows, gran_mn), ceil_div(k, gran_k)
    # [block, row, group, k]: the zeros that fill up the last block and group change no amax
    tiles = functional.pad(x.float(), (0, groups * gran_k - k, 0, blocks * gran_mn - rows)).reshape(
        blocks, gran_mn, groups, gran_k
    )
    empty = tiles.numel() == 0
    amax = tiles.new_zeros(blocks, groups) if empty else tiles.abs().amax(dim=(1, 3))
    exponents = _exponents(amax, format, rule)  # [block, group]
    nan = exponents == E8M0_NAN
    # 2^(127 - byte) as the bits of a float32; a NaN group is overwritten and may have any factor.
    factors = torch.where(nan, 127 << 23, (254 - exponents) << 23).view(torch.float32)
    scaled = tiles * factors[:, None, :, None]
    if format == "mxfp8":
        codes = scaled.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).view(torch.uint8)
    else:
        codes = _e2m1_codes(scaled, rule)
    codes = torch.where(nan[:, None, :, None], E4M3_NAN if format == "mxfp8" else 0, codes)
    codes = fresh(codes.reshape(blocks * gran_mn, groups * gran_k)[:rows, :k])
    data = codes.view(torch.float8_e4m3fn) if format == "mxfp8" else pack_nibbles(codes)
    per_row = exponents.to(torch.uint8).repeat_interleave(gran_mn, 0)[:rows]
    return data, words_from_bytes(per_row)


def _new_quantized(
    x: torch.Tensor, format: str, gran_k: int, shape: tuple[int, int]
) -> tuple[torch.Tensor, torch.Tensor]:
    rows, k = shape
    data = x.new_empty(data_shape(rows, k, format), dtype=data_dtype(format))
    return data, fake_packed_scales(x, rows, ceil_div(k, gran_k))


_lib.reference(
    "quantize",
    check=_check_quantize,
    check_out=_check_quantize_out,
    new=_new_quantized,
    compute=_quantized,
)


def quantize(
    x: torch.Tensor,
    format: str = "mxfp8",
    gran_k: int = 32,
    gran_mn: int = 1,
    rule: str = "deepgemm",
    out: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantises a matrix to MXFP8 or MXFP4, with packed scales. See the head of this file.

    Args:
        x: [M, K], bfloat16, float16 or float32, any M. Row-major with any row stride, or the
            transposed view of a row-major [K, M] matrix: quantize(w.t()) is the per-channel form,
            whose groups run down the columns of w. K % 16 == 0 for "mxfp8", 32 for "mxfp4".
        format: "mxfp8" (float8_e4m3fn) or "mxfp4" (E2M1).
        gran_k: values along K that share a scale, 32 or 128; the last group may be shorter.
        gran_mn: rows that share a scale, 1, 32 or 128. With 1 it is a scale per token; with
            gran_mn == gran_k one per square block.
        rule: how a group's scale follows from its amax, "deepgemm" or "ocp".
        out: (data, scale) to write instead of new tensors.

    Returns:
        (data, scale): data is K-major, float8_e4m3fn [M, K] or packed FP4, uint8 [M, K / 2] with
        even k in the low nibble. scale is int32 [M, ceil(K / (4 * gran_k))], packed (layout.py).
    """
    compiling = torch.compiler.is_compiling()
    if not compiling:
        _check_quantize(x, format, gran_k, gran_mn, rule)
    _check.require_no_grad("quantize", x=x)
    if out is None:
        return torch.ops.sm120.quantize.default(x, format, gran_k, gran_mn, rule)
    if not isinstance(out, tuple | list) or len(out) != 2:
        _check.fail_type("quantize", "out", "a pair (data, scale)", type(out).__name__)
    data, scale = out
    _check.require_tensor("quantize", "out", data)
    _check.require_tensor("quantize", "out_scale", scale)
    if not compiling:
        _check_quantize_out(x, format, gran_k, data, scale)
    torch.ops.sm120.quantize.out(
        x,
        format,
        gran_k,
        gran_mn,
        rule,
        out=as_bytes(data) if format == "mxfp4" else data,
        out_scale=scale,
    )
    return data, scale


# ---- dequantize ----------------------------------------------------------------------------------


def _check_dequantize(
    data: torch.Tensor, scale: torch.Tensor, gran_k: int, dtype: torch.dtype
) -> tuple[int, int]:
    """Gives the shape of the result."""
    op = "dequantize"
    _check.require_choice(op, "gran_k", gran_k, GRANS_K)
    _check.require_choice(op, "dtype", dtype, FLOAT_DTYPES)
    _check.require_tensor(op, "data", data, rank=2)
    _check.require_dtype(op, "data", data, (torch.float8_e4m3fn, *FP4_DTYPES))
    if data.stride(1) != 1 and data.shape[1] > 1:
        _check.fail(op, "data", "stride(1) == 1 (K-major)", f"strides {list(data.stride())}")
    check_packed_scales(op, "scale", scale, data.shape[0], ceil_div(logical_k(data), gran_k))
    _check.require_same_device(op, "data", data=data, scale=scale)
    return data.shape[0], logical_k(data)


def _check_dequantize_out(
    out: torch.Tensor, shape: tuple[int, int], data: torch.Tensor, scale: torch.Tensor
) -> None:
    check_out("dequantize", "out", out, shape, (out.dtype,))
    _check.require_no_overlap("dequantize", "out", out, data=data, scale=scale)


def logical_k(data: torch.Tensor) -> int:
    """K of K-major FP8 or packed FP4 data, of any rank."""
    return data.shape[-1] if data.dtype == torch.float8_e4m3fn else data.shape[-1] * 2


def decode(data: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """FP8 or packed FP4 codes -> their values, float32 or float64 [rows, K], by table."""
    indices = data.view(torch.uint8).int()
    if data.dtype == torch.float8_e4m3fn:
        codes = torch.arange(256, dtype=torch.uint8, device=data.device)
        return codes.view(torch.float8_e4m3fn).to(dtype)[indices]
    # E2M1 is the head of a float16 2^14 times as small: sign, exponent, mantissa, subnormals too.
    # (torch converts its own FP4 dtype to nothing.)
    codes = torch.arange(16, dtype=torch.int32, device=data.device)
    bits = (codes & 8) << 12 | (codes & 7) << 9
    values = bits.to(torch.int16).view(torch.float16).to(dtype) * 2**14
    # One complex number a byte: the value of its low nibble, then that of its high one.
    pairs = torch.complex(values.repeat(16), values.repeat_interleave(16))
    return torch.view_as_real(pairs[indices]).flatten(1)


def scale_values(scale: torch.Tensor, gran_k: int, k: int, dtype: torch.dtype) -> torch.Tensor:
    """Packed scales -> float32 or float64 [rows, k], the scale of each value."""
    exponents = bytes_from_words(scale, ceil_div(k, gran_k))
    values = exponents.view(torch.float8_e8m0fnu).to(torch.float32).to(dtype)
    return values.repeat_interleave(gran_k, 1)[:, :k]


def _dequantized(
    data: torch.Tensor, scale: torch.Tensor, gran_k: int, dtype: torch.dtype
) -> torch.Tensor:
    scales = scale_values(scale, gran_k, logical_k(data), torch.float32)
    return fresh((decode(data, torch.float32) * scales).to(dtype))


_lib.reference(
    "dequantize",
    check=_check_dequantize,
    check_out=_check_dequantize_out,
    new=lambda data, shape, dtype: data.new_empty(shape, dtype=dtype),
    compute=_dequantized,
    dtypes=FLOAT_DTYPES,
)


def dequantize(
    data: torch.Tensor,
    scale: torch.Tensor,
    gran_k: int = 32,
    dtype: torch.dtype = torch.float32,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Gives back the values: code * 2^(byte - 127) in float32, rounded once to `dtype`.

    Args:
        data: float8_e4m3fn [M, K], or packed FP4 [M, K / 2] (uint8, int8 or float4_e2m1fn_x2);
            K-major with any row stride.
        scale: packed scales, int32 [M, ceil(K / (4 * gran_k))]. Byte 0xFF gives NaN.
        gran_k: values along K that share a scale, 32 or 128.
        dtype: float32, bfloat16 or float16; without effect where `out` is given.
        out: contiguous [M, K] tensor to write.

    Returns:
        [M, K], contiguous.
    """
    compiling = torch.compiler.is_compiling()
    if out is not None:
        _check.require_tensor("dequantize", "out", out)
        _check.require_dtype("dequantize", "out", out, FLOAT_DTYPES)
        dtype = out.dtype
    if not compiling:
        _check_dequantize(data, scale, gran_k, dtype)
    codes = data if data.dtype == torch.float8_e4m3fn else as_bytes(data)
    if out is None:
        return torch.ops.sm120.dequantize.default(codes, scale, gran_k, dtype)
    if not compiling:
        check_out("dequantize", "out", out, (data.shape[0], logical_k(data)), (dtype,))
        _check.require_same_device("dequantize", "data", data=data, out=out)
        _check.require_no_overlap("dequantize", "out", out, data=data, scale=scale)
    torch.ops.sm120.dequantize.out(codes, scale, gran_k, out=out)
    return out
