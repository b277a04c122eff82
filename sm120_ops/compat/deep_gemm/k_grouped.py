"""k-grouped GEMM by DeepGEMM's names: D[g] = (C[g] +) A_g @ B_g.T, K being what the groups split.

Weight gradients: a group is the tokens of an expert. DeepGEMM takes the sizes twice, and so do
these: `ks` on the host is checked, and what the tensor on the device says is computed, in a
replayed CUDA graph what it says then.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ... import _check
from ...ops.layout import FP4_DTYPES, as_bytes, check_powers_of_two
from ...ops.quantize import GRANS_K
from .gemm import Operand, reject_extras, unpaired
from .layout import Recipe, name_of
from .runtime import skips

_k_grouped_out = torch.ops.sm120.k_grouped_gemm.out


def _check_groups(
    op: str, ks: Sequence[int], d: torch.Tensor, total: int, step: int, use_psum_layout: bool
) -> None:
    if use_psum_layout:
        _check.fail(name_of(op), "use_psum_layout", "False", use_psum_layout)
    if len(ks) != d.shape[0]:
        _check.fail(name_of(op), "ks", f"{d.shape[0]} group sizes, as d has groups", list(ks))
    if sum(ks) != total:
        _check.fail(name_of(op), "ks", f"sizes with the sum {total}", list(ks))
    if [k for k in ks if k < 0 or k % step != 0]:
        _check.fail(name_of(op), "ks", f"multiples of {step}, none negative", list(ks))


def _rows(sf: torch.Tensor, ks: Sequence[int], gran_k: int) -> int:
    """Of scales: each group begins a new one."""
    per_row = 4 * gran_k if sf.dtype is torch.int32 else gran_k
    return sum([-(-k // per_row) for k in ks])


def _scales(op: str, arg: str, sf: torch.Tensor, rows: int, mn: int) -> torch.Tensor:
    """[rows, mn] with mn contiguous, of scales in that shape or, as DeepGEMM takes too, turned."""
    if sf.shape != (rows, mn):
        if sf.shape != (mn, rows):
            _check.fail(name_of(op), arg, f"shape {[rows, mn]}, or its transpose", sf.shape)
        sf = sf.t()
    if sf.dtype is torch.float32:
        check_powers_of_two(name_of(op), arg, sf.t())
    return sf if sf.stride(1) == 1 else sf.contiguous()


def _block_scaled(
    op: str,
    rank: int,
    a: Operand,
    b: Operand,
    d: torch.Tensor,
    ks: Sequence[int],
    ks_tensor: torch.Tensor,
    c: torch.Tensor | None,
    recipe: Recipe,
    use_psum_layout: bool,
    epilogue: object,
) -> None:
    if epilogue is not None:
        reject_extras(op, None, epilogue)
    a_data, sfa, b_data, sfb = unpaired(op, a, b)
    if a_data.dim() != rank or b_data.dim() != rank or d.dim() != 3:
        shapes = f"a {list(a_data.shape)}, b {list(b_data.shape)}, d {list(d.shape)}"
        _check.fail(name_of(op), "a", f"a and b of {rank} dimensions, d of 3", shapes)
    if c is not None:
        _check.require_no_grad(name_of(op), c=c)
    if len(recipe) != 3 or recipe[0] != 1 or recipe[1] != 1 or recipe[2] not in GRANS_K:
        choices = " or ".join(f"(1, 1, {gran_k})" for gran_k in GRANS_K)
        _check.fail(name_of(op), "recipe", choices, tuple(recipe))
    _, m, n = d.shape
    total, step = a_data.shape[0], 16
    if a_data.dtype in FP4_DTYPES:
        a_data, step = as_bytes(a_data), 32
        total = total if rank == 2 else 2 * total
    if b_data.dtype in FP4_DTYPES:
        b_data, step = as_bytes(b_data), 32
    _check_groups(op, ks, d, total if rank == 2 else total // max(m, 1), step, use_psum_layout)
    gran_k = recipe[2]
    rows = _rows(sfa, ks, gran_k)
    rows_b = rows if sfb.dtype is sfa.dtype else _rows(sfb, ks, gran_k)
    sfa = _scales(op, "sfa", sfa, rows, m)
    sfb = _scales(op, "sfb", sfb, rows_b, n)
    _k_grouped_out(a_data, sfa, b_data, sfb, ks_tensor, gran_k, gran_k, c, out=d)


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
    """D[g] = (C[g] +) A_g @ B_g.T of FP8 and FP4 operands in any pairing.

    Args:
        a: (data, scale). data, one dimension: the groups' matrices [M, k_g], K-major, one after
            the other, FP4 packed along K. scale: float32 or bytes [sum of ceil(k_g / gran_k), M],
            or packed int32 [sum of ceil(k_g / (4 gran_k)), M], or either transposed.
        b: likewise with N rows.
        d: bfloat16 or float32 [G, M, N], last stride 1; written. A group of no tokens gives C or 0.
        ks: K of each group, multiples of 16, or of 32 with an FP4 operand.
        ks_tensor: the same on the device, int32 [G].
        c: of D's shape and dtype, D itself included; None (which DeepGEMM refuses) for no C.
        recipe: (1, 1, gran_k). compiled_dims: without effect.
        use_psum_layout, epilogue: must be False, None.
    """
    op = "k_grouped_fp8_gemm_nt_contiguous"
    if not skips(f"deep_gemm.{op}"):
        _block_scaled(op, 1, a, b, d, ks, ks_tensor, c, recipe, use_psum_layout, epilogue)


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
    """k_grouped_fp8_gemm_nt_contiguous() of data [sum of k_g, M] and [sum of k_g, N].

    FP4 is packed along M and along N.
    """
    op = "k_grouped_fp8_gemm_tn_contiguous"
    if not skips(f"deep_gemm.{op}"):
        _block_scaled(op, 2, a, b, d, ks, ks_tensor, c, recipe, use_psum_layout, epilogue)
