"""k-grouped block-scaled GEMM, the weight gradients of a MoE layer: D[g] = (C[g] +) A_g @ B_g.T.

The groups divide K: A_g is [M, k_g], B_g is [N, k_g], and each product is a whole [M, N] matrix of
D [G, M, N]. The sizes k_g stand in `ks`, int32 [G] on the device, and are read there at run time:
a captured CUDA graph may be replayed with others. The layouts are DeepGEMM's, told by the rank of
the data:

    nt    1-D data: the groups' [M, k_g] matrices, K-major, one after the other without gaps.
    tn    2-D data [sum_k, M]: row k holds one k of all M; FP4 is packed along M.

The data may have room for more than the groups use: sum_k, what it holds, is a capacity. Scales
are 2-D with M contiguous, one row a K-group of gran_k values (float32, or bytes) or a row of int32
words for four of them; every group begins a new row, also where its last one is not full.

Each k_g must be a multiple of 16, or of 32 with an FP4 operand. Sizes that break the rules are, on
every device, rounded down to it (negative ones to 0) and cut off where they add up to more than
sum_k; scales that are then missing count as NaN. Nothing is read out of bounds.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from .. import _check
from .gemm import OUT_DTYPES, Operand
from .group_layouts import (
    check_c_apart,
    check_group_c,
    check_grouped_out,
    check_sizes,
    refuse_under_capture,
)
from .layout import (
    BYTE_SCALE_DTYPES,
    E8M0_NAN,
    FP4_DTYPES,
    TAGS,
    as_bytes,
    ceil_div,
    check_powers_of_two,
    exponents_of,
    unpack_nibbles,
)
from .library import Library
from .quantize import GRANS_K, decode

OP = "k_grouped_gemm"
SCALE_DTYPES = (torch.int32, torch.float32, *BYTE_SCALE_DTYPES)
DATA_DTYPES = (torch.float8_e4m3fn, *FP4_DTYPES)

Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
Grans = tuple[int, int]

_inputs = "Tensor a, Tensor sfa, Tensor b, Tensor sfb, Tensor ks, int gran_k_a, int gran_k_b"
_lib = Library()
_lib.define(f"{OP}({_inputs}, ScalarType out_dtype, Tensor? c=None) -> Tensor", tags=TAGS)
_lib.define(f"{OP}.out({_inputs}, Tensor? c=None, *, Tensor(a!) out) -> ()", tags=TAGS)


# ---- Checks --------------------------------------------------------------------------------------


def _is_fp4(data: torch.Tensor) -> bool:
    return data.dtype != torch.float8_e4m3fn


def _check_source(arg: str, data: torch.Tensor, scale: torch.Tensor, rank: int) -> int:
    """Gives the k that the data holds, 0 where it has no rows to tell it by."""
    _check.require_tensor(OP, arg, data, rank=rank)
    _check.require_dtype(OP, arg, data, DATA_DTYPES)
    sf = f"sf{arg}"
    _check.require_tensor(OP, sf, scale, rank=2)
    _check.require_dtype(OP, sf, scale, SCALE_DTYPES)
    rows, per_byte = scale.shape[1], 2 if _is_fp4(data) else 1
    _require_rows(sf, scale)
    if rank == 2:
        _require_rows(arg, data)
        if data.shape[1] * per_byte != rows:
            _check.fail(OP, arg, f"{rows} columns, as {sf} has", f"{data.shape[1] * per_byte}")
        return data.shape[0]
    if data.stride(0) != 1 and data.shape[0] > 1:
        _check.fail(OP, arg, "a contiguous tensor", f"strides {list(data.stride())}")
    _check.require_aligned(OP, arg, data)
    if rows == 0:
        return 0
    if data.shape[0] * per_byte % rows != 0:
        requirement = f"whole rows of K for the {rows} columns of {sf}"
        _check.fail(OP, arg, requirement, f"{data.shape[0] * per_byte} values")
    return data.shape[0] * per_byte // rows


def _require_rows(arg: str, t: torch.Tensor) -> None:
    apart = t.stride(0) >= t.shape[1] or t.shape[0] <= 1
    if (t.stride(1) != 1 and t.shape[1] > 1) or not apart:
        requirement = "contiguous rows that do not overlap"
        _check.fail(OP, arg, requirement, f"strides {list(t.stride())}")


def _step(a: torch.Tensor, b: torch.Tensor) -> int:
    """What k_g must be a multiple of."""
    return 32 if _is_fp4(a) or _is_fp4(b) else 16


def _check_k_grouped(
    a: torch.Tensor,
    sfa: torch.Tensor,
    b: torch.Tensor,
    sfb: torch.Tensor,
    ks: torch.Tensor,
    gran_k_a: int,
    gran_k_b: int,
    out_dtype: torch.dtype,
    c: torch.Tensor | None,
) -> tuple[int, int, int]:
    """Checks everything but `out`; gives the shape of D."""
    _check.require_choice(OP, "gran_k_a", gran_k_a, GRANS_K)
    _check.require_choice(OP, "gran_k_b", gran_k_b, GRANS_K)
    _check.require_choice(OP, "out_dtype", out_dtype, OUT_DTYPES)
    _check.require_tensor(OP, "a", a)
    if a.dim() not in (1, 2):
        _check.fail(OP, "a", "1 dimension (nt) or 2 (tn)", a.shape)
    total_a = _check_source("a", a, sfa, a.dim())
    total_b = _check_source("b", b, sfb, a.dim())
    m, n = sfa.shape[1], sfb.shape[1]
    if m > 0 and n > 0:
        if total_a != total_b:
            _check.fail(OP, "b", f"a sum of k of {total_a}, as in a", total_b)
        step = _step(a, b)
        if total_a % step != 0:
            _check.fail(OP, "a", f"a sum of k that is a multiple of {step}", total_a)
    check_sizes(OP, "ks", ks)
    _check.require_same_device(OP, "a", a=a, sfa=sfa, b=b, sfb=sfb, ks=ks, c=c)
    shape = (ks.shape[0], m, n)
    if c is not None:
        check_group_c(OP, c, shape, out_dtype)
    return shape


def _check_k_grouped_out(
    out: torch.Tensor,
    shape: tuple[int, int, int],
    a: torch.Tensor,
    sfa: torch.Tensor,
    b: torch.Tensor,
    sfb: torch.Tensor,
    ks: torch.Tensor,
    c: torch.Tensor | None,
) -> None:
    check_grouped_out(OP, out, shape, {"a": a, "sfa": sfa, "b": b, "sfb": sfb, "ks": ks})
    check_c_apart(OP, out, c)


def _require_sizes(inputs: Inputs, grans: Grans) -> None:
    """Reads the device (one sync); ValueError that names the first bad group."""
    a, sfa, b, sfb, ks = inputs
    refuse_under_capture(OP, ks)
    step, total = _step(a, b), _total_k(a, sfa)
    used, scale_rows = 0, [0, 0]
    for group, k in enumerate(ks.tolist()):
        if k < 0 or k % step != 0:
            _check.fail(OP, "ks", f"multiples of {step}, none negative", f"{k} at group {group}")
        used += k
        if used > total:
            _check.fail(OP, "ks", f"at most {total} in all", f"{used} up to group {group}")
        for i, scale in enumerate((sfa, sfb)):
            scale_rows[i] += ceil_div(k, _k_per_row(scale, grans[i]))
            if scale_rows[i] > scale.shape[0]:
                requirement = f"at least {scale_rows[i]} rows for groups 0 .. {group}"
                _check.fail(OP, ("sfa", "sfb")[i], requirement, scale.shape)


# ---- Kernels -------------------------------------------------------------------------------------


def _total_k(data: torch.Tensor, scale: torch.Tensor) -> int:
    if data.dim() == 2:
        return data.shape[0]
    return data.shape[0] * (2 if _is_fp4(data) else 1) // max(scale.shape[1], 1)


def _k_per_row(scale: torch.Tensor, gran_k: int) -> int:
    return 4 * gran_k if scale.dtype == torch.int32 else gran_k


def _group_ranges(ks: torch.Tensor, total: int, step: int) -> Iterator[tuple[int, int]]:
    """(begin, k) of each group as it is computed, whatever the sizes are."""
    begin = 0
    for size in ks.tolist():
        k = min(max(size, 0) // step * step, total - begin)
        yield begin, k
        begin += k


def _group_codes(data: torch.Tensor, rows: int, begin: int, k: int) -> torch.Tensor:
    """The group's matrix [rows, k] in K-major form (FP4: packed)."""
    if data.dim() == 1:
        per_byte = 2 if _is_fp4(data) else 1
        return data[rows * begin // per_byte :][: rows * k // per_byte].unflatten(
            0, (rows, k // per_byte)
        )
    part = data[begin : begin + k]
    if not _is_fp4(data):
        return part.t()
    codes = unpack_nibbles(as_bytes(part)).t()
    return codes[:, ::2] | codes[:, 1::2] << 4


def _group_scales(scale: torch.Tensor, first_row: int, gran_k: int, k: int) -> torch.Tensor:
    """float64 [rows, k]; NaN behind the end of `scale`."""
    groups, wanted = ceil_div(k, gran_k), ceil_div(k, _k_per_row(scale, gran_k))
    part = scale[first_row : first_row + wanted]
    if scale.dtype == torch.int32:
        words = part.unsqueeze(-1) >> torch.arange(0, 32, 8, device=scale.device)
        exponents = (words & 0xFF).to(torch.uint8).transpose(1, 2).flatten(0, 1)[:groups]
    else:
        exponents = exponents_of(part)
    whole = exponents.new_full((groups, scale.shape[1]), E8M0_NAN)
    whole[: exponents.shape[0]] = exponents
    values = whole.view(torch.float8_e8m0fnu).float().double()
    return values.repeat_interleave(gran_k, 0)[:k].t()


def _k_grouped_into(
    out: torch.Tensor,
    a: torch.Tensor,
    sfa: torch.Tensor,
    b: torch.Tensor,
    sfb: torch.Tensor,
    ks: torch.Tensor,
    gran_k_a: int,
    gran_k_b: int,
    c: torch.Tensor | None,
) -> None:
    """Plain PyTorch on any device, sums in float64."""
    if out.numel() == 0:
        return
    scale_row, grans = [0, 0], (gran_k_a, gran_k_b)
    ranges = _group_ranges(ks, _total_k(a, sfa), _step(a, b))
    for group, (begin, k) in enumerate(ranges):
        factors = []
        for i, (data, scale) in enumerate(((a, sfa), (b, sfb))):
            codes = _group_codes(data, scale.shape[1], begin, k)
            scales = _group_scales(scale, scale_row[i], grans[i], k)
            factors.append(decode(codes, torch.float64) * scales)
            scale_row[i] += ceil_div(k, _k_per_row(scale, grans[i]))
        sums = factors[0] @ factors[1].t()
        if c is not None:
            sums = sums + c[group].double()
        out[group] = sums.float().to(out.dtype)


_lib.reference(
    OP,
    check=_check_k_grouped,
    check_out=_check_k_grouped_out,
    into=_k_grouped_into,
    dtypes=OUT_DTYPES,
)


# ---- Wrapper -------------------------------------------------------------------------------------


def _prepare(arg: str, operand: Operand, validate_scales: bool) -> Operand:
    if not isinstance(operand, tuple | list) or len(operand) != 2:
        _check.fail_type(OP, arg, "a pair (data, scale)", type(operand).__name__)
    data, scale = operand
    sf = f"sf{arg}"
    _check.require_tensor(OP, arg, data)
    _check.require_dtype(OP, arg, data, DATA_DTYPES)
    _check.require_tensor(OP, sf, scale, rank=2)
    _check.require_dtype(OP, sf, scale, SCALE_DTYPES)
    _check.require_same_device(OP, arg, **{arg: data, sf: scale})
    _check.require_no_grad(OP, **{arg: data, sf: scale})
    if validate_scales and scale.dtype == torch.float32:
        check_powers_of_two(OP, sf, scale.t())
    return as_bytes(data) if _is_fp4(data) else data, scale


def k_grouped_gemm(
    a: Operand,
    b: Operand,
    ks: torch.Tensor,
    *,
    gran_k_a: int = 128,
    gran_k_b: int = 128,
    c: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    out: torch.Tensor | None = None,
    validate: bool = False,
    validate_scales: bool = True,
) -> torch.Tensor:
    """D[g] = (C[g] +) A_g @ B_g.T over each group's own K, as for weight gradients.

    DeepGEMM's k_grouped_fp8_gemm_nt_contiguous and k_grouped_fp8_gemm_tn_contiguous, by the rank of
    the data, for any pairing of float8_e4m3fn and packed FP4.

    Args:
        a: (data, scale). data, nt: 1-D, of each group [M, k_g] K-major, one after the other,
            16-byte aligned. data, tn: [sum_k, M] (FP4: [sum_k, M / 2], packed along M), any row
            stride; rows that are not 16-byte aligned are read more slowly. scale: float32 powers of
            two, uint8 or float8_e8m0fnu [sum over g of ceil(k_g / gran_k), M], or packed int32 [sum
            over g of ceil(k_g / (4 gran_k)), M]; M contiguous, each group in rows of its own.
        b: the same for N; 1-D or 2-D as a is.
        ks: int32 [G], the sizes k_g: multiples of 16, or of 32 with an FP4 operand; 0 is allowed.
            Only the device reads them. See the module for what sizes that break this give.
        gran_k_a, gran_k_b: values of K that share a scale, 32 or 128.
        c: added to D before rounding; [G, M, N] of D's dtype, last stride 1; may be `out` itself.
        out_dtype: bfloat16 or float32; default that of `out` or `c`, else bfloat16.
        out: D to write, last stride 1, any other strides without overlap.
        validate: check ks on the device (one sync) and raise ValueError that names the first bad
            group. Not possible while a CUDA graph is captured; skipped under torch.compile.
        validate_scales: check that float32 scales are powers of two (see pack_scales()). The whole
            tensor is checked, rows that no group uses too.

    Returns:
        D [G, M, N]. Groups with k_g = 0 give C, or 0.
    """
    a_data, sfa = _prepare("a", a, validate_scales)
    b_data, sfb = _prepare("b", b, validate_scales)
    if c is not None:
        _check.require_tensor(OP, "c", c, rank=3)
        _check.require_no_grad(OP, c=c)
    dtype = _check.output_dtype(OP, out_dtype, out, OUT_DTYPES, c=c)
    inputs, grans = (a_data, sfa, b_data, sfb, ks), (gran_k_a, gran_k_b)
    if not torch.compiler.is_compiling():
        shape = _check_k_grouped(*inputs, *grans, dtype, c)
        if out is not None:
            _check_k_grouped_out(out, shape, *inputs, c)
        if validate and _check.has_address(ks):
            _require_sizes(inputs, grans)
    if out is None:
        result: torch.Tensor = torch.ops.sm120.k_grouped_gemm.default(*inputs, *grans, dtype, c)
        return result
    torch.ops.sm120.k_grouped_gemm.out(*inputs, *grans, c, out=out)
    return out
