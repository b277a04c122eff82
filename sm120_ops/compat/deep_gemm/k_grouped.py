"""k-grouped GEMM by DeepGEMM's names: D[g] = (C[g] +) A_g @ B_g.T, K being what the groups split.

Weight gradients: a group is the tokens of an expert. Group sizes are those of `ks`, on the host; a
captured CUDA graph keeps them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from ... import _check
from ...ops.layout import ceil_div
from .gemm import Operand, k_major, reject_extras
from .layout import Recipe, name_of, recipes, required
from .runtime import skips

_gemm_out = torch.ops.sm120.gemm.out


def _check_groups(
    op: str, ks: Sequence[int], d: torch.Tensor, total: int, use_psum_layout: bool
) -> None:
    _check.require(not use_psum_layout, name_of(op), "use_psum_layout", "False", use_psum_layout)
    _check.require_tensor(name_of(op), "d", d, rank=3)
    if len(ks) != d.shape[0]:
        _check.fail(name_of(op), "ks", f"{d.shape[0]} group sizes, as d has groups", list(ks))
    if min(ks, default=0) < 0 or sum(ks) != total:
        _check.fail(name_of(op), "ks", f"sizes >= 0 with the sum {total}", list(ks))


def _groups(ks: Sequence[int], gran_k: int) -> Iterator[tuple[int, int, slice]]:
    """Of each group, its first row of K, its K, and its rows of the scales."""
    start = row = 0
    for k in ks:
        rows = ceil_div(k, gran_k)
        yield start, k, slice(row, row + rows)
        start, row = start + k, row + rows


def _fp8(
    op: str,
    a: Operand,
    b: Operand,
    d: torch.Tensor,
    ks: Sequence[int],
    c: torch.Tensor | None,
    recipe: Recipe,
    use_psum_layout: bool,
    epilogue: object,
    flat: bool,
) -> None:
    reject_extras(op, None, epilogue)
    name = name_of(op)
    rank = 1 if flat else 2
    for arg, (data, sf) in (("a", a), ("b", b)):
        _check.require_tensor(name, arg, data, rank=rank)
        _check.require_dtype(name, arg, data, (torch.float8_e4m3fn,))
        _check.require_tensor(name, f"sf{arg}", sf, rank=2)
    m, n = d.shape[1:]
    total = a[0].shape[0] // max(m, 1) if flat else a[0].shape[0]
    _check_groups(op, ks, d, total, use_psum_layout)
    _check.require_no_grad(name, c=c)
    grans = recipes(op, b[1], recipe, None, None)
    sides = (("sfa", a, m, grans[0]), ("sfb", b, n, grans[1]))
    for g, (start, k, rows) in enumerate(_groups(ks, recipe[2])):
        operands = []
        for arg, (data, sf), mn, gran in sides:
            if flat:
                part = data[start * mn : (start + k) * mn].view(mn, k)
            else:
                part = k_major(data[start : start + k].t())
            operands += [part, required(name, arg, sf[rows].t(), mn, k, gran)]
        _gemm_out(*operands, recipe[2], recipe[2], None if c is None else c[g], (), out=d[g])


def k_grouped_fp8_gemm_nt_contiguous(
    a: Operand,
    b: Operand,
    d: torch.Tensor,
    ks: Sequence[int],
    ks_tensor: torch.Tensor,
    c: torch.Tensor | None = None,
    recipe: Recipe = (1, 1, 128),
    compiled_dims: str = "mn",
    use_psum_layout: bool = False,
    epilogue: object = None,
) -> None:
    """D[g] = (C[g] +) A_g @ B_g.T of FP8 operands.

    Args:
        a: (data, scale). data: FP8, one dimension: the groups' matrices [M, k_g], K-major, one
            after the other. scale: float32 or bytes [sum of ceil(k_g / gran_k), M], any strides.
        b: likewise with N rows.
        d: bfloat16 or float32 [G, M, N]; written. A group of no tokens gives C, or 0.
        ks: K of each group, multiples of 16.
        ks_tensor: the same on the device; not read.
        c: of D's shape and dtype, D itself included; None (which DeepGEMM refuses) for no C.
        recipe: (1, 1, gran_k). compiled_dims: without effect.
        use_psum_layout, epilogue: must be False, None.
    """
    op = "k_grouped_fp8_gemm_nt_contiguous"
    if not skips(f"deep_gemm.{op}"):
        _fp8(op, a, b, d, ks, c, recipe, use_psum_layout, epilogue, flat=True)


def k_grouped_fp8_gemm_tn_contiguous(
    a: Operand,
    b: Operand,
    d: torch.Tensor,
    ks: Sequence[int],
    ks_tensor: torch.Tensor,
    c: torch.Tensor | None = None,
    recipe: Recipe = (1, 1, 128),
    compiled_dims: str = "mn",
    use_psum_layout: bool = False,
    epilogue: object = None,
) -> None:
    """k_grouped_fp8_gemm_nt_contiguous() of data [sum of k_g, M] and [sum of k_g, N]."""
    op = "k_grouped_fp8_gemm_tn_contiguous"
    if not skips(f"deep_gemm.{op}"):
        _fp8(op, a, b, d, ks, c, recipe, use_psum_layout, epilogue, flat=False)
