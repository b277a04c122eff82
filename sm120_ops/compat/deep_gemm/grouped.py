"""m-grouped GEMM by DeepGEMM's names: D = A @ B[expert].T, for the experts of a MoE layer.

Rows that belong to no group are not read into a result and not written.
"""

from __future__ import annotations

import math

import torch
from torch.nn import functional

from ... import _check
from ...ops import groups
from ...ops.layout import FP4_DTYPES
from .gemm import Operand, k_major, reject_extras, unpaired
from .layout import Recipe, name_of, recipes, required
from .runtime import get_mk_alignment_for_contiguous_layout, skips

_MAX_ALIGNMENT = 128

_contiguous_out = torch.ops.sm120.grouped_gemm.out
_psum_out = torch.ops.sm120.grouped_gemm_psum.out
_masked_out = torch.ops.sm120.grouped_gemm_masked.out


def k_major_groups(data: torch.Tensor) -> torch.Tensor:
    """[G, rows, K] data with K along its rows: itself, or one pass over it."""
    packed_rows = data.dtype in FP4_DTYPES and data.stride(-1) != 1
    return groups.k_major_groups(data, packed_rows)


def _prepared(
    op: str,
    a: Operand,
    b: Operand,
    recipe: Recipe | None,
    recipe_a: Recipe | None,
    recipe_b: Recipe | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, int, int]:
    """The op's operands, and gran_k of each."""
    a_data, sfa, b_data, sfb = unpaired(op, a, b)
    for_a, for_b = recipes(op, sfb, recipe, recipe_a, recipe_b)
    packed = sfa.dtype is torch.int32 and sfb.dtype is torch.int32
    if not packed or a_data.stride(-1) != 1 or b_data.stride(-1) != 1:
        a_data, sfa, b_data, sfb = _converted(op, a, b, for_a, for_b)
    return a_data, sfa, b_data, sfb, for_a[1], for_b[1]


def _converted(
    op: str, a: Operand, b: Operand, for_a: tuple[int, int], for_b: tuple[int, int]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """K-major data and packed scales."""
    (a_data, sfa), (b_data, sfb) = a, b
    name = name_of(op)
    for arg, data, rank in (("a", a_data, None), ("b", b_data, 3)):
        _check.require_tensor(name, arg, data, rank=rank)
        _check.require_dtype(name, arg, data, (torch.float8_e4m3fn, *FP4_DTYPES))
    a_data = k_major_groups(a_data) if a_data.dim() == 3 else k_major(a_data)
    b_data = k_major_groups(b_data)
    experts, n, width = b_data.shape
    k = width if b_data.dtype == torch.float8_e4m3fn else 2 * width
    if sfa.dtype != torch.int32:
        sfa = required(
            name, "sfa", sfa, a_data.shape[-2], k, for_a, experts if a_data.dim() == 3 else None
        )
    if sfb.dtype != torch.int32:
        sfb = required(name, "sfb", sfb, n, k, for_b, experts)
    return a_data, sfa, b_data, sfb


def _clear_padding(d: torch.Tensor, layout: torch.Tensor, psum: bool, alignment: int) -> None:
    """Zeroes the rows of `d` that belong to no group."""
    if not psum:
        d.masked_fill_((layout < 0)[:, None], 0)
        return
    ends_before = functional.pad(layout[:-1], (1, 0))
    starts = (ends_before + (alignment - 1)) // alignment * alignment
    rows = torch.arange(d.shape[0], device=d.device)
    group = torch.searchsorted(layout, rows, right=True)
    inside = group < layout.shape[0]
    inside &= rows >= starts[group.clamp(max=layout.shape[0] - 1)]
    d.masked_fill_(~inside[:, None], 0)


def _contiguous(
    op: str,
    a: Operand,
    b: Operand,
    d: torch.Tensor,
    grouped_layout: torch.Tensor,
    recipe: Recipe | None,
    recipe_a: Recipe | None,
    recipe_b: Recipe | None,
    use_psum_layout: bool,
    expected_m: int | None,
    ensure_zero_padding: bool,
) -> None:
    operands = _prepared(op, a, b, recipe, recipe_a, recipe_b)
    alignment = get_mk_alignment_for_contiguous_layout()
    inputs, grans = operands[:4], operands[4:]
    if use_psum_layout:
        _psum_out(*inputs, grouped_layout, *grans, alignment, expected_m or 0, out=d)
    else:
        # Rows in segments of 256 are in segments of 128 too.
        alignment = math.gcd(alignment, _MAX_ALIGNMENT)
        _contiguous_out(*inputs, grouped_layout, *grans, alignment, out=d)
    if ensure_zero_padding:
        _clear_padding(d, grouped_layout, use_psum_layout, alignment)


def m_grouped_fp8_fp4_gemm_nt_contiguous(
    a: Operand,
    b: Operand,
    d: torch.Tensor,
    grouped_layout: torch.Tensor,
    recipe: Recipe | None = None,
    recipe_a: Recipe | None = None,
    recipe_b: Recipe | None = None,
    compiled_dims: str = "nk",
    disable_ue8m0_cast: bool = False,
    use_psum_layout: bool = False,
    expected_m_for_psum_layout: int | None = None,
    ensure_zero_padding: bool = False,
    epilogue: object = None,
) -> None:
    """D[m] = A[m] @ B[expert of m].T of FP8 and FP4 operands in any pairing.

    Args:
        a: (data [M, K], scale). b: (data [G, N, K], scale [G, ...]).
        d: bfloat16 or float32 [M, N], stride(1) == 1; written.
        grouped_layout: int32. Without use_psum_layout [M], the expert of each row or -1; rows in
            segments of get_mk_alignment_for_contiguous_layout(), each of one expert, padding last.
            With it [G], the end of each group; a group starts where the one before it ended,
            rounded up to that alignment.
        recipe, recipe_a, recipe_b: granularities of the scales, see layout.py.
        expected_m_for_psum_layout: rows a group is expected to have; steers the choice of tiles.
        ensure_zero_padding: also zero the rows of D that belong to no group.
        compiled_dims, disable_ue8m0_cast: without effect.
        epilogue: must be None.
    """
    op = "m_grouped_fp8_fp4_gemm_nt_contiguous"
    if skips(f"deep_gemm.{op}"):
        return
    if epilogue is not None:
        reject_extras(op, None, epilogue)
    _contiguous(
        op, a, b, d, grouped_layout, recipe, recipe_a, recipe_b, use_psum_layout,
        expected_m_for_psum_layout, ensure_zero_padding,
    )  # fmt: skip


def m_grouped_fp8_fp4_gemm_nn_contiguous(
    a: Operand,
    b: Operand,
    d: torch.Tensor,
    grouped_layout: torch.Tensor,
    recipe: Recipe | None = None,
    recipe_a: Recipe | None = None,
    recipe_b: Recipe | None = None,
    compiled_dims: str = "nk",
    disable_ue8m0_cast: bool = False,
    use_psum_layout: bool = False,
    ensure_zero_padding: bool = False,
    epilogue: object = None,
) -> None:
    """m_grouped_fp8_fp4_gemm_nt_contiguous() of B [G, K, N] and its scales transposed."""
    op = "m_grouped_fp8_fp4_gemm_nn_contiguous"
    if skips(f"deep_gemm.{op}"):
        return
    reject_extras(op, None, epilogue)
    b = (b[0].transpose(1, 2), b[1].transpose(1, 2))
    _contiguous(
        op, a, b, d, grouped_layout, recipe, recipe_a, recipe_b, use_psum_layout, None,
        ensure_zero_padding,
    )  # fmt: skip


def m_grouped_fp8_fp4_gemm_nt_masked(
    a: Operand,
    b: Operand,
    d: torch.Tensor,
    masked_m: torch.Tensor,
    expected_m: int,
    recipe: Recipe | None = None,
    recipe_a: Recipe | None = None,
    recipe_b: Recipe | None = None,
    compiled_dims: str = "nk",
    disable_ue8m0_cast: bool = False,
    epilogue: object = None,
    enable_overlap: bool = False,
    max_block_n: int = 256,
    signal: torch.Tensor | None = None,
) -> None:
    """D[g, :masked_m[g]] = A[g, :masked_m[g]] @ B[g].T; the other rows of D are left as they are.

    Args:
        a: (data [G, M, K], scale [G, ...]). b: (data [G, N, K], scale [G, ...]).
        d: bfloat16 or float32 [G, M, N]; written.
        masked_m: int32 [G].
        expected_m: rows a group is expected to have; steers the choice of tiles.
        enable_overlap: must be False: there is no signal per tile for another kernel.
        max_block_n, signal: without effect.
    """
    op = "m_grouped_fp8_fp4_gemm_nt_masked"
    if skips(f"deep_gemm.{op}"):
        return
    if epilogue is not None or enable_overlap:
        reject_extras(op, None, epilogue)
        _check.fail(name_of(op), "enable_overlap", "False (no signals per tile)", enable_overlap)
    inputs = _prepared(op, a, b, recipe, recipe_a, recipe_b)
    _masked_out(*inputs[:4], masked_m, *inputs[4:], expected_m, out=d)


m_grouped_fp8_gemm_nt_contiguous = m_grouped_fp8_fp4_gemm_nt_contiguous
m_grouped_fp8_gemm_nn_contiguous = m_grouped_fp8_fp4_gemm_nn_contiguous
m_grouped_fp8_gemm_nt_masked = m_grouped_fp8_fp4_gemm_nt_masked
fp8_m_grouped_gemm_nt_masked = m_grouped_fp8_fp4_gemm_nt_masked
m_grouped_fp4_gemm_nt_contiguous = m_grouped_fp8_fp4_gemm_nt_contiguous
m_grouped_fp4_gemm_nt_masked = m_grouped_fp8_fp4_gemm_nt_masked
