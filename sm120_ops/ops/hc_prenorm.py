"""Hyper-connection prenorm: d = x @ fn.T in TF32 and the row sums of squares, in one pass over x.

x is bfloat16 [M, K], fn float32 [N, K]: what a model with hyper-connections computes before each of
its blocks, its mixing coefficients from the residual streams (K = streams * hidden, N = streams *
(streams + 2)). The shapes and the meaning of num_splits are those of DeepGEMM's
`tf32_hc_prenorm_gemm`.

fn is rounded to TF32, 10 mantissa bits: to nearest, ties away from zero (PTX `cvt.rna.tf32.f32`);
bfloat16 is exact in TF32. Products are summed in float32. The CPU kernel rounds fn likewise, sums
in float64 and rounds once to float32.
"""

from __future__ import annotations

import math

import torch

from .. import _check
from .layout import TAGS, check_out
from .library import Library

BLOCK_K = 64
MAX_N = 128

_lib = Library()
_lib.define(
    "hc_prenorm(Tensor x, Tensor fn, int? num_splits=None, float? eps=None) -> (Tensor, Tensor)",
    tags=TAGS,
)
_lib.define(
    "hc_prenorm.out(Tensor x, Tensor fn, int? num_splits=None, float? eps=None,"
    " *, Tensor(a!) d, Tensor(b!) sqr_sum) -> ()",
    tags=TAGS,
)


# ---- Checks --------------------------------------------------------------------------------------


def _check_matrix(arg: str, matrix: torch.Tensor, dtype: torch.dtype) -> None:
    op = "hc_prenorm"
    _check.require_tensor(op, arg, matrix, rank=2)
    _check.require_dtype(op, arg, matrix, (dtype,))
    strides = f"strides {list(matrix.stride())}"
    if matrix.stride(1) != 1:
        _check.fail(op, arg, "stride(1) == 1", strides)
    apart = 16 // dtype.itemsize
    row = matrix.stride(0)
    if (row % apart != 0 or row < matrix.shape[1]) and matrix.shape[0] > 1:
        requirement = f"a row stride that is a multiple of {apart} and >= {matrix.shape[1]}"
        _check.fail(op, arg, requirement, strides)
    _check.require_aligned(op, arg, matrix)


def _check_prenorm(
    x: torch.Tensor, fn: torch.Tensor, num_splits: int | None, eps: float | None
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Gives the shapes of d and sqr_sum."""
    op = "hc_prenorm"
    _check_matrix("x", x, torch.bfloat16)
    _check_matrix("fn", fn, torch.float32)
    m, k = x.shape
    n = fn.shape[0]
    if k % BLOCK_K != 0 or k < BLOCK_K:
        _check.fail(op, "x", f"K to be a multiple of {BLOCK_K}, {BLOCK_K} or more", f"K={k}")
    if fn.shape[1] != k:
        _check.fail(op, "fn", f"K={k} as in x", f"K={fn.shape[1]}")
    if n % 8 != 0 or not 8 <= n <= MAX_N:
        _check.fail(op, "fn", f"N to be a multiple of 8, 8 to {MAX_N}", f"N={n}")
    _check.require_same_device(op, "x", x=x, fn=fn)
    if eps is not None:
        _check.require_number(op, "eps", eps)
        if not (math.isfinite(eps) and eps >= 0):
            _check.fail(op, "eps", "None or a finite number >= 0", eps)
        if num_splits is not None:
            _check.fail(op, "eps", "None with num_splits (a part of K has no norm)", eps)
    if num_splits is None:
        return (m, n), (m,)
    _check.require_number(op, "num_splits", num_splits, integer=True)
    if not 1 <= num_splits <= k // BLOCK_K:
        requirement = f"None or 1 to K / {BLOCK_K} = {k // BLOCK_K}"
        _check.fail(op, "num_splits", requirement, num_splits)
    return (num_splits, m, n), (num_splits, m)


def _check_prenorm_out(
    x: torch.Tensor,
    fn: torch.Tensor,
    d: torch.Tensor,
    sqr_sum: torch.Tensor,
    shape: tuple[tuple[int, ...], tuple[int, ...]],
) -> None:
    op = "hc_prenorm"
    check_out(op, "d", d, shape[0], (torch.float32,))
    check_out(op, "sqr_sum", sqr_sum, shape[1], (torch.float32,))
    _check.require_same_device(op, "x", x=x, d=d, sqr_sum=sqr_sum)
    _check.require_no_overlap(op, "d", d, x=x, fn=fn, sqr_sum=sqr_sum)
    _check.require_no_overlap(op, "sqr_sum", sqr_sum, x=x, fn=fn)


# ---- Kernels -------------------------------------------------------------------------------------


def round_to_tf32(x: torch.Tensor) -> torch.Tensor:
    """float32 to the nearest TF32 value, ties away from zero; Inf and NaN stay."""
    bits = (x.view(torch.int32) + 0x1000) & ~0x1FFF
    return torch.where(x.isfinite(), bits.view(torch.float32), x)


def split_ranges(k: int, num_splits: int) -> list[tuple[int, int]]:
    """The columns of each split: whole blocks of 64, the first splits one more than the rest."""
    each, more = divmod(k // BLOCK_K, num_splits)
    ends = [BLOCK_K * (each * (s + 1) + min(s + 1, more)) for s in range(num_splits)]
    return list(zip([0, *ends[:-1]], ends, strict=True))


def _prenorm(
    x: torch.Tensor, fn: torch.Tensor, num_splits: int | None, eps: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    values, weights = x.double(), round_to_tf32(fn.contiguous()).double()
    if num_splits is not None:
        parts = [(values[:, a:b], weights[:, a:b]) for a, b in split_ranges(x.shape[1], num_splits)]
        d = torch.stack([v @ w.t() for v, w in parts])
        return d.float(), torch.stack([v.square().sum(1) for v, _ in parts]).float()
    d, sqr_sum = values @ weights.t(), values.square().sum(1)
    if eps is not None:
        d = d * torch.rsqrt(sqr_sum / x.shape[1] + eps)[:, None]
    return d.float(), sqr_sum.float()


_lib.reference(
    "hc_prenorm",
    check=_check_prenorm,
    check_out=_check_prenorm_out,
    new=lambda fn, shape: (fn.new_empty(shape[0]), fn.new_empty(shape[1])),
    compute=_prenorm,
)


# ---- Wrapper -------------------------------------------------------------------------------------


def hc_prenorm(
    x: torch.Tensor,
    fn: torch.Tensor,
    *,
    num_splits: int | None = None,
    eps: float | None = None,
    out: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """d = x @ fn.T with fn in TF32, and sqr_sum = (x * x).sum(1), in one pass over x.

    Args:
        x: bfloat16 [M, K], stride(1) == 1, rows at multiples of 16 bytes. K is a multiple of 64, M
            anything.
        fn: float32 [N, K], stride(1) == 1, rows at multiples of 16 bytes; N is a multiple of 8, at
            most 128. Rounded to TF32, to nearest with ties away from zero.
        num_splits: None sums over all of K in the same launch, in a fixed order. S gives S partial
            sums instead, for a caller that adds them up: split s covers its share of K's blocks of
            64, the first (K / 64) % S splits one block more than the others.
        eps: also scales each row of d by rsqrt(sqr_sum / K + eps), which makes it the product of
            the RMS-normalised x. Only without num_splits.
        out: (d, sqr_sum) to write, contiguous float32, apart from the inputs.

    Returns:
        d, float32 [M, N] or [S, M, N], and sqr_sum, float32 [M] or [S, M].
    """
    op = "hc_prenorm"
    _check.require_no_grad(op, x=x, fn=fn)
    if not torch.compiler.is_compiling():
        shapes = _check_prenorm(x, fn, num_splits, eps)
    if out is None:
        d, sqr_sum = torch.ops.sm120.hc_prenorm.default(x, fn, num_splits, eps)
        return d, sqr_sum
    if not isinstance(out, tuple | list) or len(out) != 2:
        _check.fail_type(op, "out", "a pair (d, sqr_sum)", type(out).__name__)
    d, sqr_sum = out
    _check.require_tensor(op, "d", d)
    _check.require_tensor(op, "sqr_sum", sqr_sum)
    if not torch.compiler.is_compiling():
        _check_prenorm_out(x, fn, d, sqr_sum, shapes)
    torch.ops.sm120.hc_prenorm.out(x, fn, num_splits, eps, d=d, sqr_sum=sqr_sum)
    return d, sqr_sum
