"""BF16 GEMM: D = (C +) A @ B.T, float32 sums, one rounding.

An operand is a bfloat16 matrix [rows, K] with either stride 1, K-major or MN-major (a transposed
view); both are loaded as they lie, without a copy. The only limit is 16-byte lines: the other
stride is a multiple of 8 and the data pointer 16-byte aligned. Any M, N, K >= 0. (DeepGEMM's
`bf16_gemm_nt`, `_nn`, `_tn`, `_tt`.)

The CPU kernel sums in float64 and rounds once to float32, and from there to bfloat16, as the CUDA
kernel does from its float32 accumulators.
"""

from __future__ import annotations

import torch

from .. import _check
from .gemm import LAYOUTS, OUT_DTYPES, check_matrix, check_matrix_out
from .layout import TAGS
from .library import Library

_lib = Library()
_lib.define(
    "bf16_gemm(Tensor a, Tensor b, ScalarType out_dtype, Tensor? c=None) -> Tensor", tags=TAGS
)
_lib.define("bf16_gemm.out(Tensor a, Tensor b, Tensor? c=None, *, Tensor(a!) out) -> ()", tags=TAGS)
# The kernel that would run, as JSON: pure host code in C++, for logs and tests.
_lib.define(
    "_bf16_gemm_config(int m, int n, int k, int num_sms, bool native, int l2_bytes,"
    " int dram_gbps) -> str"
)
# bf16_gemm.out with a given tile (index into the compiled table), orientation and schedule: for
# tests of every configuration and for tuning.
_lib.define(
    "_bf16_gemm_forced(Tensor a, Tensor b, Tensor? c, Tensor(a!) out, int tile, bool swapped,"
    " bool split) -> ()"
)


# ---- Checks --------------------------------------------------------------------------------------


def check_operand(op: str, arg: str, x: torch.Tensor, rank: int = 2) -> None:
    """bfloat16 [rows, K] with lines of 16 bytes in either direction; rank 3: [groups, rows, K]."""
    _check.require_tensor(op, arg, x, rank=rank)
    _check.require_dtype(op, arg, x, (torch.bfloat16,))

    def lines(inner: int, outer: int) -> bool:
        unit = x.stride(inner) == 1 or x.shape[inner] == 1
        apart = x.stride(outer) % 8 == 0 and x.stride(outer) >= x.shape[inner]
        return unit and (apart or x.shape[outer] == 1)

    if not (lines(-1, -2) or lines(-2, -1)) and x.numel() > 0:
        requirement = "one stride to be 1 and the other a multiple of 8 (16-byte rows), no overlap"
        _check.fail(op, arg, requirement, f"strides {list(x.stride())}")
    if rank == 3 and x.stride(0) % 8 != 0 and x.shape[0] > 1 and x.numel() > 0:
        requirement = "a group stride that is a multiple of 8 (16 bytes)"
        _check.fail(op, arg, requirement, f"strides {list(x.stride())}")
    _check.require_aligned(op, arg, x)


def _check_bf16(
    a: torch.Tensor, b: torch.Tensor, out_dtype: torch.dtype, c: torch.Tensor | None
) -> tuple[int, int]:
    """Checks everything but `out`; gives the shape of D."""
    op = "bf16_gemm"
    _check.require_choice(op, "out_dtype", out_dtype, OUT_DTYPES)
    check_operand(op, "a", a)
    check_operand(op, "b", b)
    if b.shape[1] != a.shape[1]:
        _check.fail(op, "b", f"K={a.shape[1]} as in a", f"K={b.shape[1]}")
    _check.require_same_device(op, "a", a=a, b=b, c=c)
    shape = (a.shape[0], b.shape[0])
    if c is not None:
        _check.require_tensor(op, "c", c, rank=2)
        _check.require_dtype(op, "c", c, (out_dtype,))
        check_matrix(op, "c", c, shape)
    return shape


def _check_bf16_out(
    out: torch.Tensor,
    shape: tuple[int, int],
    a: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor | None,
) -> None:
    op = "bf16_gemm"
    check_matrix_out(op, out, shape, c)
    _check.require_same_device(op, "a", a=a, out=out)
    _check.require_no_overlap(op, "out", out, a=a, b=b)


# ---- Kernels -------------------------------------------------------------------------------------


def _bf16_into(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor, c: torch.Tensor | None) -> None:
    product = a.double() @ b.double().t()
    out.copy_((product if c is None else product + c.double()).float())


_lib.reference(
    "bf16_gemm", check=_check_bf16, check_out=_check_bf16_out, into=_bf16_into, dtypes=OUT_DTYPES
)


# ---- Wrappers ------------------------------------------------------------------------------------


def bf16_gemm(
    a: torch.Tensor,
    b: torch.Tensor,
    *,
    out_dtype: torch.dtype | None = None,
    c: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    layout: str = "nt",
) -> torch.Tensor:
    """BF16 GEMM, D = (C +) A @ B.T, with float32 accumulation and one rounding.

    Args:
        a: bfloat16 [M, K]; b: bfloat16 [N, K]. Either stride may be the 1, the other is a multiple
            of 8 (rows, or columns, at multiples of 16 bytes): transposed views are read in place.
        out_dtype: bfloat16 or float32; default that of `out`, else of `c`, else bfloat16.
        c: added in float32 before the rounding: D's shape and dtype, stride(1) == 1, any row
            stride, 0 included (a bias: c=bias.expand(M, N)). May be `out` itself.
        out: D to write, stride(1) == 1, any row stride. Must not overlap the operands.
        layout: how A and B come, "n" as [rows, columns] of A @ B and "t" transposed: "nt" is A
            [M, K], B [N, K]; "nn" has B [K, N]; "tt" A [K, M]; "tn" both.

    Returns:
        D [M, N].
    """
    op = "bf16_gemm"
    _check.require_choice(op, "layout", layout, LAYOUTS)
    _check.require_tensor(op, "a", a, rank=2)
    _check.require_tensor(op, "b", b, rank=2)
    _check.require_no_grad(op, a=a, b=b, c=c)
    a = a.t() if layout[0] == "t" else a
    b = b.t() if layout[1] == "n" else b
    out_dtype = _check.output_dtype(op, out_dtype, out, OUT_DTYPES, c=c)
    if not torch.compiler.is_compiling():
        shape = _check_bf16(a, b, out_dtype, c)
        if out is not None:
            _check_bf16_out(out, shape, a, b, c)
    if out is None:
        return torch.ops.sm120.bf16_gemm.default(a, b, out_dtype, c)
    torch.ops.sm120.bf16_gemm.out(a, b, c, out=out)
    return out


def bf16_gemm_nn(a: torch.Tensor, b: torch.Tensor, **options: object) -> torch.Tensor:
    """bf16_gemm() of A [M, K] and B [K, N]."""
    return bf16_gemm(a, b, layout="nn", **options)  # type: ignore[arg-type]


def bf16_gemm_tn(a: torch.Tensor, b: torch.Tensor, **options: object) -> torch.Tensor:
    """bf16_gemm() of A [K, M] and B [K, N]."""
    return bf16_gemm(a, b, layout="tn", **options)  # type: ignore[arg-type]


def bf16_gemm_tt(a: torch.Tensor, b: torch.Tensor, **options: object) -> torch.Tensor:
    """bf16_gemm() of A [K, M] and B [N, K]."""
    return bf16_gemm(a, b, layout="tt", **options)  # type: ignore[arg-type]
