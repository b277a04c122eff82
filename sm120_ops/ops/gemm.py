"""Dense block-scaled GEMM: D = (C +) A @ B.T on MXFP8 and MXFP4 operands in any pairing.

The operands are K-major, A [M, K] and B [N, K] (FP4: half as many bytes a row), each with packed
scales (layout.py) over groups of gran_k_a and gran_k_b values. Limits: FP8 K % 16 == 0, and
K % 32 == 0 where either operand is FP4; rows start at multiples of 16 bytes. Any M, N, K >= 0.

The CPU kernel sums dequantised operands in float64 and rounds once to float32, and from there to
bfloat16, as the CUDA kernel does from its float32 accumulators.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .. import _check
from .layout import (
    BYTE_SCALE_DTYPES,
    FP4_DTYPES,
    GRANS_MN,
    TAGS,
    as_bytes,
    ceil_div,
    check_packed_scales,
    pack_scales_of,
)
from .library import Library
from .quantize import GRANS_K, decode, logical_k, scale_values

OUT_DTYPES = (torch.bfloat16, torch.float32)
LAYOUTS = ("nt", "nn", "tn", "tt")

Operand = tuple[torch.Tensor, torch.Tensor]

_lib = Library()
_lib.define(
    "gemm(Tensor a, Tensor sfa, Tensor b, Tensor sfb, int gran_k_a, int gran_k_b,"
    " ScalarType out_dtype, Tensor? c=None, int[] head_splits=[]) -> Tensor",
    tags=TAGS,
)
_lib.define(
    "gemm.out(Tensor a, Tensor sfa, Tensor b, Tensor sfb, int gran_k_a, int gran_k_b,"
    " Tensor? c=None, int[] head_splits=[], *, Tensor(a!) out) -> ()",
    tags=TAGS,
)
# The kernel that would run, as JSON: pure host code in C++, for logs and tests.
_lib.define(
    "_gemm_config(int m, int n, int k, str format_a, str format_b, int gran_k_a, int gran_k_b,"
    " int num_sms, bool native, int l2_bytes, int dram_gbps) -> str"
)
# gemm.out with a given tile (index into the compiled table), orientation and schedule: for tests of
# every configuration and for tuning.
_lib.define(
    "_gemm_forced(Tensor a, Tensor sfa, Tensor b, Tensor sfb, int gran_k_a, int gran_k_b,"
    " Tensor? c, int[] head_splits, Tensor(a!) out, int tile, bool swapped, bool split) -> ()"
)
# One launch of a bare MMA loop on the GPU, the ceiling of the benchmark; gives its FLOPs.
_lib.define("_atom_rate(Tensor(a!) sink, str atom, int iterations) -> int")


# ---- Checks --------------------------------------------------------------------------------------


def check_operand(op: str, arg: str, data: torch.Tensor, rank: int = 2) -> None:
    """K-major data [rows, K] or, with rank 3, [groups, rows, K]."""
    _check.require_tensor(op, arg, data, rank=rank)
    _check.require_dtype(op, arg, data, (torch.float8_e4m3fn, *FP4_DTYPES))
    if data.stride(-1) != 1 and data.shape[-1] > 1:
        last = "stride(1)" if rank == 2 else "stride(2)"
        _check.fail(op, arg, f"{last} == 1 (K-major)", f"strides {list(data.stride())}")
    row = data.stride(-2)
    if (row % 16 != 0 or row < data.shape[-1]) and data.shape[-2] > 1 and data.shape[-1] > 0:
        requirement = f"a row stride that is a multiple of 16 bytes >= {data.shape[-1]}"
        _check.fail(op, arg, requirement, f"strides {list(data.stride())}")
    apart = rank == 2 or (data.stride(0) % 16 == 0 and data.stride(0) > 0)
    if not apart and min(data.shape[1:]) > 0 and data.shape[0] > 1:
        requirement = "a group stride that is a multiple of 16 bytes, not 0"
        _check.fail(op, arg, requirement, f"strides {list(data.stride())}")
    _check.require_aligned(op, arg, data)


def check_same_k(op: str, a: torch.Tensor, b: torch.Tensor) -> int:
    """K, the same in both operands and a multiple of 16 bytes in each."""
    k = logical_k(a)
    if logical_k(b) != k:
        _check.fail(op, "b", f"K={k} as in a", f"K={logical_k(b)}")
    multiple = 16 if a.dtype == b.dtype == torch.float8_e4m3fn else 32
    if k % multiple != 0:
        reason = "an FP4 operand" if multiple == 32 else "FP8 operands"
        _check.fail(op, "a", f"K to be a multiple of {multiple} with {reason}", f"K={k}")
    return k


def _check_head_splits(op: str, n: int, head_splits: Sequence[int]) -> int:
    """Columns of D."""
    if len(head_splits) == 0:
        return n
    if len(head_splits) != 3 or min(head_splits) < 0 or head_splits[0] + head_splits[2] == 0:
        requirement = "[left, mid, right], none negative, with left + right > 0"
        _check.fail(op, "head_splits", requirement, list(head_splits))
    left, mid, right = head_splits
    if n % (left + right) != 0:
        requirement = f"left + right to divide N={n}"
        _check.fail(op, "head_splits", requirement, list(head_splits))
    return n + n // (left + right) * mid


def _check_gemm(
    a: torch.Tensor,
    sfa: torch.Tensor,
    b: torch.Tensor,
    sfb: torch.Tensor,
    gran_k_a: int,
    gran_k_b: int,
    out_dtype: torch.dtype,
    c: torch.Tensor | None,
    head_splits: Sequence[int],
) -> tuple[int, int]:
    """Checks everything but `out`; gives the shape of D."""
    op = "gemm"
    _check.require_choice(op, "gran_k_a", gran_k_a, GRANS_K)
    _check.require_choice(op, "gran_k_b", gran_k_b, GRANS_K)
    _check.require_choice(op, "out_dtype", out_dtype, OUT_DTYPES)
    check_operand(op, "a", a)
    check_operand(op, "b", b)
    k = check_same_k(op, a, b)
    check_packed_scales(op, "sfa", sfa, a.shape[0], ceil_div(k, gran_k_a))
    check_packed_scales(op, "sfb", sfb, b.shape[0], ceil_div(k, gran_k_b))
    _check.require_same_device(op, "a", a=a, sfa=sfa, b=b, sfb=sfb, c=c)
    shape = (a.shape[0], _check_head_splits(op, b.shape[0], head_splits))
    if c is not None:
        _check.require_tensor(op, "c", c, rank=2)
        _check.require_dtype(op, "c", c, (out_dtype,))
        check_matrix(op, "c", c, shape)
    return shape


def check_matrix(op: str, arg: str, matrix: torch.Tensor, shape: tuple[int, int]) -> None:
    if matrix.shape[0] != shape[0] or matrix.shape[1] != shape[1]:
        _check.fail(op, arg, f"shape {list(shape)}", matrix.shape)
    if matrix.stride(1) != 1 and shape[1] > 1:
        _check.fail(op, arg, "stride(1) == 1", f"strides {list(matrix.stride())}")


def check_matrix_out(
    op: str, out: torch.Tensor, shape: tuple[int, int], c: torch.Tensor | None
) -> None:
    """D of any row stride. C may be exactly D: who writes an element has read it before."""
    _check.require_tensor(op, "out", out, rank=2)
    check_matrix(op, "out", out, shape)
    if out.stride(0) < shape[1] and shape[0] > 1:
        requirement = f"a row stride >= {shape[1]}"
        _check.fail(op, "out", requirement, f"strides {list(out.stride())}")
    if c is not None and _check.has_address(out) and _check.has_address(c):
        in_place = c.data_ptr() == out.data_ptr()
        if not (in_place and (c.stride(0) == out.stride(0) or shape[0] == 1)):
            _check.require_no_overlap(op, "out", out, c=c)


def _check_gemm_out(
    out: torch.Tensor,
    shape: tuple[int, int],
    a: torch.Tensor,
    sfa: torch.Tensor,
    b: torch.Tensor,
    sfb: torch.Tensor,
    c: torch.Tensor | None,
) -> None:
    op = "gemm"
    check_matrix_out(op, out, shape, c)
    _check.require_same_device(op, "a", a=a, out=out)
    _check.require_no_overlap(op, "out", out, a=a, sfa=sfa, b=b, sfb=sfb)


# ---- Kernels -------------------------------------------------------------------------------------


def _split_columns(matrix: torch.Tensor, n: int, head_splits: Sequence[int]) -> list[torch.Tensor]:
    """Views [M, heads, left] and [M, heads, right] of a D or C with head splits."""
    left, mid, right = head_splits
    heads = matrix.unflatten(1, (n // (left + right), left + mid + right))
    return [heads[..., :left], heads[..., left + mid :]]


def _gemm_into(
    out: torch.Tensor,
    a: torch.Tensor,
    sfa: torch.Tensor,
    b: torch.Tensor,
    sfb: torch.Tensor,
    gran_k_a: int,
    gran_k_b: int,
    c: torch.Tensor | None,
    head_splits: Sequence[int],
) -> None:
    """Plain PyTorch on any device; leaves the middle columns of head splits alone."""

    def values(data: torch.Tensor, scale: torch.Tensor, gran_k: int) -> torch.Tensor:
        # in float64, where 448 * 2^127 is finite
        scales = scale_values(scale, gran_k, logical_k(data), torch.float64)
        return decode(data, torch.float64) * scales

    def rounded(sums: torch.Tensor) -> torch.Tensor:
        return sums.float().to(out.dtype)

    product = values(a, sfa, gran_k_a) @ values(b, sfb, gran_k_b).t()
    if len(head_splits) == 0:
        out.copy_(rounded(product if c is None else product + c.double()))
        return
    left, _, right = head_splits
    n = b.shape[0]
    by_head = product.unflatten(1, (n // (left + right), left + right))
    parts = [by_head[..., :left], by_head[..., left:]]
    targets = _split_columns(out, n, head_splits)
    addends = [None, None] if c is None else _split_columns(c, n, head_splits)
    for part, target, addend in zip(parts, targets, addends, strict=True):
        target.copy_(rounded(part if addend is None else part + addend.double()))


_lib.reference(
    "gemm",
    check=_check_gemm,
    check_out=_check_gemm_out,
    into=_gemm_into,
    dtypes=OUT_DTYPES,
    clear=True,
)


# ---- Wrappers ------------------------------------------------------------------------------------


def infer_gran_k(
    op: str, arg: str, scale: torch.Tensor, k: int, per_word: int, given: int | None
) -> int:
    """The gran_k for which `scale` has the right number of columns (of `per_word` groups each)."""
    if given is not None:
        _check.require_choice(op, f"gran_k_{arg[-1]}", given, GRANS_K)
        return given
    matches = [g for g in GRANS_K if ceil_div(ceil_div(k, g), per_word) == scale.shape[-1]]
    if len(matches) == 2 and k > 32:
        got = f"shape {list(scale.shape)}, which fits both"
        _check.fail(op, arg, f"gran_k_{arg[-1]}=32 or 128 to be given for K={k}", got)
    if not matches:
        columns = [ceil_div(ceil_div(k, g), per_word) for g in GRANS_K]
        requirement = f"{columns[0]} columns (gran_k 32) or {columns[1]} (gran_k 128) for K={k}"
        _check.fail(op, arg, requirement, scale.shape)
    return matches[0]  # for K <= 32 there is one group either way


def prepare(
    op: str, arg: str, operand: Operand, transposed: bool, gran_k: int | None, validate: bool
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """(K-major data, packed scales, gran_k) of an operand as the user gave it."""
    if not isinstance(operand, tuple | list) or len(operand) != 2:
        _check.fail_type(op, arg, "a pair (data, scale)", type(operand).__name__)
    data, scale = operand
    _check.require_tensor(op, arg, data, rank=2)
    _check.require_dtype(op, arg, data, (torch.float8_e4m3fn, *FP4_DTYPES))
    sf = f"sf{arg}"
    _check.require_tensor(op, sf, scale, rank=2)
    _check.require_dtype(op, sf, scale, (torch.int32, torch.float32, *BYTE_SCALE_DTYPES))
    _check.require_same_device(op, arg, **{arg: data, sf: scale})
    _check.require_no_grad(op, **{arg: data, sf: scale})
    if data.dtype == torch.float8_e4m3fn:
        if transposed:
            data = data.t()
            if data.stride(1) != 1:
                data = data.view(torch.uint8).contiguous().view(torch.float8_e4m3fn)
    else:
        data = as_bytes(data)
        if transposed:
            if data.shape[0] % 32 != 0:
                _check.fail(op, arg, "K to be a multiple of 32 for FP4", f"K={data.shape[0]}")
            data = torch.ops.sm120.transpose_fp4.default(data.contiguous())
    k = logical_k(data)
    if scale.dtype == torch.int32:
        return data, scale, infer_gran_k(op, sf, scale, k, 4, gran_k)
    if transposed:
        scale = scale.t()
    gran_k = infer_gran_k(op, sf, scale, k, 1, gran_k)
    rows, groups = data.shape[0], ceil_div(k, gran_k)
    # Where several gran_mn fit, they mean the same: one block holds all rows.
    grans_mn = [g for g in GRANS_MN if ceil_div(rows, g) == scale.shape[0]]
    if not grans_mn or scale.shape[1] != groups:
        counts = " or ".join(f"{ceil_div(rows, g)} (gran_mn {g})" for g in GRANS_MN)
        requirement = f"[rows, groups] with {counts} rows and {groups} groups (gran_k {gran_k})"
        _check.fail(op, sf, requirement, scale.shape)
    return data, pack_scales_of(op, sf, scale, rows, grans_mn[0], validate), gran_k


def gemm(
    a: Operand,
    b: Operand,
    *,
    gran_k_a: int | None = None,
    gran_k_b: int | None = None,
    out_dtype: torch.dtype | None = None,
    c: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    head_splits: Sequence[int] | None = None,
    layout: str = "nt",
    validate: bool = True,
) -> torch.Tensor:
    """Block-scaled GEMM, D = (C +) A @ B.T, with float32 accumulation and one rounding.

    Args:
        a: (data, scale) of A. data: float8_e4m3fn [M, K], or packed FP4 [M, K / 2] (uint8, int8 or
            float4_e2m1fn_x2), K-major, rows at multiples of 16 bytes. scale, with groups =
            ceil(K / gran_k_a), in any of three forms: packed int32 [M, ceil(groups / 4)] as
            quantize() gives it; UE8M0 bytes [M, groups]; float32 powers of two [M, groups]. The
            last two also as one scale per block of 32 or 128 rows: [ceil(M / 32), groups].
        b: (data, scale) of B, likewise with N rows.
        gran_k_a, gran_k_b: values along K that share a scale, 32 or 128. Needed only where the
            scale's shape leaves it open: packed scales with 32 < K <= 128.
        out_dtype: bfloat16 or float32; default that of `out`, else of `c`, else bfloat16.
        c: added in float32 before the rounding: D's shape and dtype, stride(1) == 1, any row
            stride, 0 included (a bias: c=bias.expand(M, N)). May be `out` itself.
        out: D to write, stride(1) == 1, any row stride. Must not overlap the operands.
        head_splits: [left, mid, right]. D gets `mid` columns more within each head of the product,
            after its first `left` columns of left + right. They keep their contents in `out` and
            are 0 in a new D.
        layout: how A and B come, "n" as [rows, columns] of A @ B and "t" transposed: "nt" is A
            [M, K], B [N, K]; "nn" has B [K, N]; "tt" A [K, M]; "tn" both. An operand that is not
            K-major goes through a transpose pass, FP4 being packed along its last dimension, so
            prepare weights once. Its byte or float32 scales come transposed too, [groups, N];
            packed scales are the same in every layout.
        validate: check that float32 scales are powers of two (see pack_scales()).

    Returns:
        D [M, N], or with head splits [M, N + N / (left + right) * mid].
    """
    op = "gemm"
    _check.require_choice(op, "layout", layout, LAYOUTS)
    a_data, sfa, gran_k_a = prepare(op, "a", a, layout[0] == "t", gran_k_a, validate)
    b_data, sfb, gran_k_b = prepare(op, "b", b, layout[1] == "n", gran_k_b, validate)
    _check.require_no_grad(op, c=c)
    if head_splits is not None and not isinstance(head_splits, list | tuple):
        _check.fail_type(op, "head_splits", "(left, mid, right)", type(head_splits).__name__)
    splits = [] if head_splits is None else list(head_splits)
    out_dtype = _check.output_dtype(op, out_dtype, out, OUT_DTYPES, c=c)
    if not torch.compiler.is_compiling():
        shape = _check_gemm(a_data, sfa, b_data, sfb, gran_k_a, gran_k_b, out_dtype, c, splits)
        if out is not None:
            _check_gemm_out(out, shape, a_data, sfa, b_data, sfb, c)
    if out is None:
        return torch.ops.sm120.gemm.default(
            a_data, sfa, b_data, sfb, gran_k_a, gran_k_b, out_dtype, c, splits
        )
    torch.ops.sm120.gemm.out(a_data, sfa, b_data, sfb, gran_k_a, gran_k_b, c, splits, out=out)
    return out


def gemm_nn(a: Operand, b: Operand, **options: object) -> torch.Tensor:
    """gemm() of A [M, K] and B [K, N]."""
    return gemm(a, b, layout="nn", **options)  # type: ignore[arg-type]


def gemm_tn(a: Operand, b: Operand, **options: object) -> torch.Tensor:
    """gemm() of A [K, M] and B [K, N]."""
    return gemm(a, b, layout="tn", **options)  # type: ignore[arg-type]


def gemm_tt(a: Operand, b: Operand, **options: object) -> torch.Tensor:
    """gemm() of A [K, M] and B [N, K]."""
    return gemm(a, b, layout="tt", **options)  # type: ignore[arg-type]
