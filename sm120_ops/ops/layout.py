"""Layout ops: the three scale forms, FP4 packing and the transpose of packed FP4.

Packed scales, the form every other op takes and gives, hold one UE8M0 exponent byte (value
2^(byte - 127), 0xFF is NaN) for each row and each group of `gran_k` values along K:

    int32, logical shape [rows, ceil(groups / 4)], stride(0) == 1, stride(1) >= rows and % 4 == 0
    byte i (little endian) of word [m, j] belongs to group 4j + i of row m

Tensors made here have stride(1) == align(rows, 4); the bytes past the last group and the padding
rows are 0. Beware that `clone()` or `to(device)` of such a tensor drops the row padding, unless
rows is a multiple of 4; what must travel is kept as its contiguous transpose.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional

from .. import _check
from .library import Library

E8M0_NAN = 0xFF
FP4_DTYPES = (torch.uint8, torch.int8, torch.float4_e2m1fn_x2)
BYTE_SCALE_DTYPES = (torch.uint8, torch.float8_e8m0fnu)
GRANS_MN = (1, 32, 128)
TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)

_lib = Library()


def ceil_div(a: int, b: int) -> int:
    return (a + b - 1) // b


def align(a: int, b: int) -> int:
    return ceil_div(a, b) * b


def as_bytes(fp4: torch.Tensor) -> torch.Tensor:
    """Packed FP4 of any accepted dtype as uint8."""
    return fp4 if fp4.dtype == torch.uint8 else fp4.view(torch.uint8)


def fresh(tensor: torch.Tensor) -> torch.Tensor:
    """A row-major copy. Unlike contiguous() it also sets the strides of dimensions of size 1."""
    return tensor.clone(memory_format=torch.contiguous_format)


def fake_packed_scales(like: torch.Tensor, rows: int, groups: int) -> torch.Tensor:
    return like.new_empty_strided(
        (rows, ceil_div(groups, 4)), (1, align(rows, 4)), dtype=torch.int32
    )


def words_from_bytes(exponents: torch.Tensor) -> torch.Tensor:
    """uint8 [rows, groups] -> packed scales [rows, words], padding zeroed."""
    rows, groups = exponents.shape
    words = ceil_div(groups, 4)
    full = functional.pad(exponents, (0, 4 * words - groups)).reshape(rows, words, 4)
    packed = exponents.new_zeros(words, align(rows, 4), 4)
    packed[:, :rows] = full.transpose(0, 1)
    return packed.view(torch.int32).squeeze(2).t()[:rows]


def bytes_from_words(scale: torch.Tensor, groups: int) -> torch.Tensor:
    """Packed scales [rows, words] -> uint8 [rows, groups], contiguous and new."""
    return fresh(fresh(scale).view(torch.uint8)[:, :groups])


def check_packed_scales(
    op: str, arg: str, scale: torch.Tensor, rows: int, groups: int | None = None
) -> None:
    """Checks dtype, shape and layout; without `groups` any number of words is right."""
    _check.require_tensor(op, arg, scale, rank=2)
    if scale.dtype != torch.int32:
        _check.fail_type(op, arg, "dtype torch.int32 (packed UE8M0)", scale.dtype)
    words = scale.shape[1] if groups is None else ceil_div(groups, 4)
    if scale.shape[0] != rows or scale.shape[1] != words:
        _check.fail(op, arg, f"packed scales of shape [{rows}, {words}]", scale.shape)
    column = scale.stride(1)
    unit = scale.stride(0) == 1 or rows <= 1 or words == 0
    padded = (column % 4 == 0 and column >= align(rows, 4)) or words <= 1 or rows == 0
    if not (unit and padded):
        requirement = f"MN-major strides [1, a multiple of 4 >= {align(rows, 4)}]"
        _check.fail(op, arg, requirement, f"strides {list(scale.stride())}")
    _check.require_aligned(op, arg, scale)


def check_out(
    op: str, arg: str, out: torch.Tensor, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...]
) -> None:
    """Checks a contiguous output."""
    _check.require_dtype(op, arg, out, dtypes)
    if tuple(out.shape) != shape:
        _check.fail(op, arg, f"shape {list(shape)}", out.shape)
    if not out.is_contiguous():
        _check.fail(op, arg, "a contiguous tensor", f"strides {list(out.stride())}")


# ---- pack_scales ---------------------------------------------------------------------------------

# rows is a SymInt so that a compiled graph serves every row count.
_lib.define("pack_scales(Tensor scale, SymInt rows, int gran_mn=1) -> Tensor", tags=TAGS)
_lib.define(
    "pack_scales.out(Tensor scale, SymInt rows, int gran_mn=1, *, Tensor(a!) out) -> ()", tags=TAGS
)


def _check_pack_scales(op: str, arg: str, scale: torch.Tensor, rows: int, gran_mn: int) -> None:
    _check.require_tensor(op, arg, scale, rank=2)
    _check.require_dtype(op, arg, scale, (torch.float32, *BYTE_SCALE_DTYPES))
    _check.require_choice(op, "gran_mn", gran_mn, GRANS_MN)
    _check.require_number(op, "rows", rows, integer=True)
    _check.require(rows >= 0, op, "rows", "a row count", rows)
    if scale.shape[0] != ceil_div(rows, gran_mn):
        requirement = f"shape [{ceil_div(rows, gran_mn)}, groups] (rows={rows}, gran_mn={gran_mn})"
        _check.fail(op, arg, requirement, scale.shape)


def exponents_of(scale: torch.Tensor) -> torch.Tensor:
    """Scales of form (b) or (c) -> their uint8 exponents; 0xFF where float32 has no such value."""
    if scale.dtype != torch.float32:
        return scale.view(torch.uint8)
    bits = scale.view(torch.int32)
    exponent = bits >> 23  # the sign makes it negative: no valid scale
    exact = (bits & 0x7FFFFF == 0) & (exponent >= 1) & (exponent <= 254)
    smallest = bits == 0x00400000  # 2^-127, a subnormal of float32
    exponents = torch.where(exact, exponent, E8M0_NAN)
    return torch.where(smallest, 0, exponents).to(torch.uint8)


def _check_pack(scale: torch.Tensor, rows: int, gran_mn: int) -> None:
    _check_pack_scales("pack_scales", "scale", scale, rows, gran_mn)


def _check_pack_out(out: torch.Tensor, scale: torch.Tensor, rows: int) -> None:
    check_packed_scales("pack_scales", "out", out, rows, scale.shape[1])
    _check.require_no_overlap("pack_scales", "out", out, scale=scale)


def _packed(scale: torch.Tensor, rows: int, gran_mn: int) -> torch.Tensor:
    return words_from_bytes(exponents_of(scale).repeat_interleave(gran_mn, 0)[:rows])


_lib.reference(
    "pack_scales",
    check=_check_pack,
    check_out=_check_pack_out,
    new=lambda scale, rows: fake_packed_scales(scale, rows, scale.shape[1]),
    compute=_packed,
)


def check_powers_of_two(op: str, arg: str, scale: torch.Tensor) -> None:
    """Reads the device (one sync), unless it cannot be read: under capture or torch.compile."""
    if torch.compiler.is_compiling():
        return
    capturing = scale.is_cuda and torch.cuda.is_current_stream_capturing()
    if capturing or not _check.has_address(scale):
        return
    bad = (exponents_of(scale) == E8M0_NAN).nonzero()
    if bad.shape[0] > 0:
        row, group = bad[0].tolist()
        requirement = "float32 scales that are powers of two in 2^-127 .. 2^127"
        got = f"{scale[row, group].item()!r} at row {row}, group {group}"
        _check.fail(op, arg, requirement, got)


def pack_scales_of(
    op: str, arg: str, scale: torch.Tensor, rows: int, gran_mn: int, validate: bool
) -> torch.Tensor:
    """pack_scales() on behalf of another op, whose name and argument the errors give."""
    _check.require_no_grad(op, **{arg: scale})
    if not torch.compiler.is_compiling():
        _check_pack_scales(op, arg, scale, rows, gran_mn)
        if validate and scale.dtype == torch.float32:
            check_powers_of_two(op, arg, scale)
    return torch.ops.sm120.pack_scales.default(scale, rows, gran_mn)


def pack_scales(
    scale: torch.Tensor, rows: int | None = None, gran_mn: int = 1, validate: bool = True
) -> torch.Tensor:
    """Packs byte or float32 scales into the canonical form.

    Args:
        scale: [ceil(rows / gran_mn), groups], any strides: UE8M0 bytes (float8_e8m0fnu or uint8),
            or float32 powers of two in 2^-127 .. 2^127.
        rows: rows of the scaled matrix; default scale.shape[0] * gran_mn.
        gran_mn: rows that share one scale: 1, 32 or 128. The scale is repeated in each of them.
        validate: raise ValueError for a float32 scale that is not such a power of two. It reads
            the device (one sync), and is skipped while a CUDA graph is captured and under
            torch.compile; then, as with False, the rows of that scale come out NaN.

    Returns:
        int32 [rows, ceil(groups / 4)], packed scales. `torch.ops.sm120.pack_scales.out` writes
        into a given tensor and never reads the device.
    """
    _check.require_tensor("pack_scales", "scale", scale, rank=2)
    if rows is None:
        _check.require_choice("pack_scales", "gran_mn", gran_mn, GRANS_MN)
        rows = scale.shape[0] * gran_mn
    return pack_scales_of("pack_scales", "scale", scale, rows, gran_mn, validate)


# ---- unpack_scales -------------------------------------------------------------------------------

_lib.define("unpack_scales(Tensor scale, SymInt groups, ScalarType dtype) -> Tensor", tags=TAGS)
_lib.define("unpack_scales.out(Tensor scale, SymInt groups, *, Tensor(a!) out) -> ()", tags=TAGS)

UNPACKED_DTYPES = (torch.uint8, torch.float8_e8m0fnu, torch.float32)


def _check_unpack_scales(scale: torch.Tensor, groups: int, dtype: torch.dtype) -> tuple[int, int]:
    """Gives the shape of the result."""
    op = "unpack_scales"
    _check.require_tensor(op, "scale", scale, rank=2)
    check_packed_scales(op, "scale", scale, scale.shape[0])
    _check.require_choice(op, "dtype", dtype, UNPACKED_DTYPES)
    _check.require_number(op, "groups", groups, integer=True)
    if groups < 0 or ceil_div(groups, 4) != scale.shape[1]:
        words = scale.shape[1]
        requirement = f"{max(4 * words - 3, 0)} to {4 * words} groups for {words} words a row"
        _check.fail(op, "groups", requirement, groups)
    return scale.shape[0], groups


def _check_unpack_out(out: torch.Tensor, shape: tuple[int, int], scale: torch.Tensor) -> None:
    check_out("unpack_scales", "out", out, shape, (out.dtype,))
    _check.require_no_overlap("unpack_scales", "out", out, scale=scale)


def _unpacked(scale: torch.Tensor, groups: int, dtype: torch.dtype) -> torch.Tensor:
    exponents = bytes_from_words(scale, groups)
    if dtype == torch.uint8:
        return exponents
    as_e8m0 = exponents.view(torch.float8_e8m0fnu)
    return as_e8m0 if dtype == torch.float8_e8m0fnu else as_e8m0.to(torch.float32)


_lib.reference(
    "unpack_scales",
    check=_check_unpack_scales,
    check_out=_check_unpack_out,
    new=lambda scale, shape, dtype: scale.new_empty(shape, dtype=dtype),
    compute=_unpacked,
    dtypes=UNPACKED_DTYPES,
)


def unpack_scales(
    scale: torch.Tensor, groups: int, dtype: torch.dtype = torch.uint8
) -> torch.Tensor:
    """Packed scales [rows, ceil(groups / 4)] -> [rows, groups], contiguous.

    `dtype` is uint8 or float8_e8m0fnu for the exponent bytes, float32 for the values; byte 0 gives
    2^-127 (a subnormal float32) and 0xFF gives NaN.
    """
    if not torch.compiler.is_compiling():
        _check_unpack_scales(scale, groups, dtype)
    return torch.ops.sm120.unpack_scales.default(scale, groups, dtype)


# ---- packed FP4 ----------------------------------------------------------------------------------
# Two E2M1 codes a byte; the low nibble has the even index of the last dimension.

_lib.define("pack_fp4(Tensor codes) -> Tensor", tags=TAGS)
_lib.define("pack_fp4.out(Tensor codes, *, Tensor(a!) out) -> ()", tags=TAGS)
_lib.define("unpack_fp4(Tensor packed) -> Tensor", tags=TAGS)
_lib.define("unpack_fp4.out(Tensor packed, *, Tensor(a!) out) -> ()", tags=TAGS)
_lib.define("transpose_fp4(Tensor packed) -> Tensor", tags=TAGS)
_lib.define("transpose_fp4.out(Tensor packed, *, Tensor(a!) out) -> ()", tags=TAGS)


def pack_nibbles(codes: torch.Tensor) -> torch.Tensor:
    return (codes[..., ::2] & 15) | (codes[..., 1::2] << 4)


def unpack_nibbles(packed: torch.Tensor) -> torch.Tensor:
    return torch.stack((packed & 15, packed >> 4), -1).flatten(-2)


def _packed_shape(codes: torch.Tensor) -> tuple[int, ...]:
    """Checks the codes and gives the shape of pack_fp4's result."""
    _check.require_tensor("pack_fp4", "codes", codes)
    _check.require_dtype("pack_fp4", "codes", codes, (torch.uint8,))
    if codes.dim() == 0 or codes.shape[-1] % 2 != 0:
        _check.fail("pack_fp4", "codes", "an even last dimension", codes.shape)
    return (*codes.shape[:-1], codes.shape[-1] // 2)


def _unpacked_shape(packed: torch.Tensor) -> tuple[int, ...]:
    _check.require_tensor("unpack_fp4", "packed", packed)
    _check.require_dtype("unpack_fp4", "packed", packed, FP4_DTYPES)
    if packed.dim() == 0:
        _check.fail("unpack_fp4", "packed", "at least one dimension", packed.shape)
    return (*packed.shape[:-1], packed.shape[-1] * 2)


def _transposed_shape(packed: torch.Tensor) -> tuple[int, ...]:
    _check.require_tensor("transpose_fp4", "packed", packed, rank=2)
    _check.require_dtype("transpose_fp4", "packed", packed, FP4_DTYPES)
    if packed.shape[0] % 2 != 0:
        _check.fail("transpose_fp4", "packed", "an even number of rows", packed.shape)
    return (packed.shape[1] * 2, packed.shape[0] // 2)


def _packed_fp4(codes: torch.Tensor) -> torch.Tensor:
    return fresh(pack_nibbles(codes))


def _unpacked_fp4(packed: torch.Tensor) -> torch.Tensor:
    return unpack_nibbles(as_bytes(packed))


def _transposed_fp4(packed: torch.Tensor) -> torch.Tensor:
    return fresh(pack_nibbles(unpack_nibbles(as_bytes(packed)).t()))


def _register_fp4(
    op: str,
    check: Callable[[torch.Tensor], tuple[int, ...]],
    compute: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    """An op from bytes to bytes."""

    def check_bytes(out: torch.Tensor, shape: tuple[int, ...], **inputs: torch.Tensor) -> None:
        check_out(op, "out", out, shape, (torch.uint8,))
        _check.require_no_overlap(op, "out", out, **inputs)

    def new(shape: tuple[int, ...], **inputs: torch.Tensor) -> torch.Tensor:
        (data,) = inputs.values()
        return data.new_empty(shape, dtype=torch.uint8)

    _lib.reference(op, check=check, check_out=check_bytes, new=new, compute=compute)


_register_fp4("pack_fp4", _packed_shape, _packed_fp4)
_register_fp4("unpack_fp4", _unpacked_shape, _unpacked_fp4)
_register_fp4("transpose_fp4", _transposed_shape, _transposed_fp4)


def pack_fp4(codes: torch.Tensor) -> torch.Tensor:
    """E2M1 codes, uint8 [..., K] (K even, only the low four bits count) -> uint8 [..., K / 2]."""
    if not torch.compiler.is_compiling():
        _packed_shape(codes)
    return torch.ops.sm120.pack_fp4.default(codes.contiguous())


def unpack_fp4(packed: torch.Tensor) -> torch.Tensor:
    """Packed FP4 [..., K / 2] (uint8, int8 or float4_e2m1fn_x2) -> codes, uint8 [..., K]."""
    if not torch.compiler.is_compiling():
        _unpacked_shape(packed)
    return torch.ops.sm120.unpack_fp4.default(as_bytes(packed.contiguous()))


def transpose_fp4(packed: torch.Tensor) -> torch.Tensor:
    """Packed FP4 [R, C / 2] (C along the rows, R even) -> [C, R / 2] of the same dtype."""
    if not torch.compiler.is_compiling():
        _transposed_shape(packed)
    return torch.ops.sm120.transpose_fp4.default(as_bytes(packed.contiguous())).view(packed.dtype)
