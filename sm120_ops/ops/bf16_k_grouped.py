"""k-grouped BF16 GEMM, the weight gradients of a MoE layer: D[g] = (C[g] +) A_g.T @ B_g.

A [K, M] and B [K, N] have a row for each token, sorted by expert: group g has the ks[g] rows behind
those of the groups before it, and its product is a whole [M, N] matrix of D [G, M, N]. The sizes
are int32 [G] on the device and are read there at run time: a captured CUDA graph may be replayed
with others. They may be any numbers, 0 included, and need not use all of K. (DeepGEMM's
`k_grouped_bf16_gemm_tn_contiguous`, which wants multiples of 128 and takes C for granted.)

Sizes that break the rules are, on every device, cut off where they add up to more than K, and count
as 0 if negative. Rows of no group, and those of other groups, are never read into a result.

Groups of K-major operands, [M, K] and [N, K], are not for this op: its tiles are cut off behind any
row of K, which in that layout would be inside of 16 bytes. Transpose them.

Sums and rounding are bf16_gemm()'s (bf16.py).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from .. import _check
from .gemm import OUT_DTYPES
from .group_layouts import (
    check_c_apart,
    check_group_c,
    check_grouped_out,
    check_sizes,
    refuse_under_capture,
)
from .layout import TAGS
from .library import Library

OP = "bf16_k_grouped_gemm"
Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # a, b, ks

_lib = Library()
_inputs = "Tensor a, Tensor b, Tensor ks"
_lib.define(f"{OP}({_inputs}, ScalarType out_dtype, Tensor? c=None) -> Tensor", tags=TAGS)
_lib.define(f"{OP}.out({_inputs}, Tensor? c=None, *, Tensor(a!) out) -> ()", tags=TAGS)
# The `out` form with a given tile (index into the compiled table) and orientation: for tests of
# every configuration and for tuning.
_lib.define(
    "_bf16_k_grouped_forced(Tensor a, Tensor b, Tensor ks, Tensor? c, Tensor(a!) out, int tile,"
    " bool swapped) -> ()"
)


# ---- Checks --------------------------------------------------------------------------------------


def _check_lines(arg: str, x: torch.Tensor) -> None:
    _check.require_tensor(OP, arg, x, rank=2)
    _check.require_dtype(OP, arg, x, (torch.bfloat16,))
    apart = x.stride(0) % 8 == 0 and x.stride(0) >= x.shape[1]
    unit = x.stride(1) == 1 or x.shape[1] == 1
    if not (unit and (apart or x.shape[0] == 1)) and x.numel() > 0:
        requirement = "contiguous rows, a multiple of 8 apart (16 bytes), without overlap"
        _check.fail(OP, arg, requirement, f"strides {list(x.stride())}")
    _check.require_aligned(OP, arg, x)


def _check_k_grouped(
    a: torch.Tensor,
    b: torch.Tensor,
    ks: torch.Tensor,
    out_dtype: torch.dtype,
    c: torch.Tensor | None,
) -> tuple[int, int, int]:
    """Checks everything but `out`; gives the shape of D."""
    _check.require_choice(OP, "out_dtype", out_dtype, OUT_DTYPES)
    _check_lines("a", a)
    _check_lines("b", b)
    if b.shape[0] != a.shape[0]:
        _check.fail(OP, "b", f"K={a.shape[0]} as in a", f"K={b.shape[0]}")
    check_sizes(OP, "ks", ks)
    _check.require_same_device(OP, "a", a=a, b=b, ks=ks, c=c)
    shape = (ks.shape[0], a.shape[1], b.shape[1])
    if c is not None:
        check_group_c(OP, c, shape, out_dtype)
    return shape


def _check_out(
    out: torch.Tensor,
    shape: tuple[int, int, int],
    a: torch.Tensor,
    b: torch.Tensor,
    ks: torch.Tensor,
    c: torch.Tensor | None,
) -> None:
    check_grouped_out(OP, out, shape, {"a": a, "b": b, "ks": ks})
    check_c_apart(OP, out, c)


def _require_sizes(inputs: Inputs) -> None:
    """Reads the device (one sync); ValueError that names the first bad group."""
    a, _, ks = inputs
    refuse_under_capture(OP, ks)
    used = 0
    for group, k in enumerate(ks.tolist()):
        if k < 0:
            _check.fail(OP, "ks", "sizes that are not negative", f"{k} at group {group}")
        used += k
        if used > a.shape[0]:
            _check.fail(OP, "ks", f"at most {a.shape[0]} in all", f"{used} up to group {group}")


# ---- Kernels -------------------------------------------------------------------------------------


def _spans(ks: torch.Tensor, total: int) -> Iterator[tuple[int, int]]:
    """Where each group begins and ends, whatever the sizes are."""
    begin = 0
    for size in ks.tolist():
        end = min(begin + max(size, 0), total)
        yield begin, end
        begin = end


def _k_grouped_into(
    out: torch.Tensor, a: torch.Tensor, b: torch.Tensor, ks: torch.Tensor, c: torch.Tensor | None
) -> None:
    """Plain PyTorch on any device, sums in float64."""
    for group, (begin, end) in enumerate(_spans(ks, a.shape[0])):
        sums = a[begin:end].double().t() @ b[begin:end].double()
        if c is not None:
            sums = sums + c[group].double()
        out[group] = sums.float().to(out.dtype)


_lib.reference(
    OP, check=_check_k_grouped, check_out=_check_out, into=_k_grouped_into, dtypes=OUT_DTYPES
)


# ---- Wrapper -------------------------------------------------------------------------------------


def bf16_k_grouped_gemm(
    a: torch.Tensor,
    b: torch.Tensor,
    ks: torch.Tensor,
    *,
    c: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    out: torch.Tensor | None = None,
    validate: bool = False,
) -> torch.Tensor:
    """D[g] = (C[g] +) A_g.T @ B_g over each group's own rows, as for weight gradients.

    Args:
        a: bfloat16 [K, M]; b: bfloat16 [K, N]. stride(1) == 1, stride(0) a multiple of 8 (rows at
            multiples of 16 bytes).
        ks: int32 [G], rows of each group, in order. Any numbers, 0 included; only the device reads
            them. Rows behind the last group's are not read.
        c: added to D in float32 before the rounding; [G, M, N] of D's dtype, last stride 1; may be
            `out` itself.
        out_dtype: bfloat16 or float32; default that of `out` or `c`, else bfloat16.
        out: D to write, last stride 1, any other strides without overlap.
        validate: check ks on the device (one sync) and raise ValueError that names the first bad
            group. Not possible while a CUDA graph is captured; skipped under torch.compile.

    Returns:
        D [G, M, N]. Groups without rows give C, or 0.
    """
    _check.require_tensor(OP, "a", a, rank=2)
    _check.require_tensor(OP, "b", b, rank=2)
    _check.require_no_grad(OP, a=a, b=b)
    if c is not None:
        _check.require_tensor(OP, "c", c, rank=3)
        _check.require_no_grad(OP, c=c)
    dtype = _check.output_dtype(OP, out_dtype, out, OUT_DTYPES, c=c)
    inputs = (a, b, ks)
    if not torch.compiler.is_compiling():
        shape = _check_k_grouped(*inputs, dtype, c)
        if out is not None:
            _check_out(out, shape, *inputs, c)
        if validate and _check.has_address(ks):
            _require_sizes(inputs)
    if out is None:
        result: torch.Tensor = torch.ops.sm120.bf16_k_grouped_gemm.default(*inputs, dtype, c)
        return result
    torch.ops.sm120.bf16_k_grouped_gemm.out(*inputs, c, out=out)
    return out
