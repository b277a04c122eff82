"""Dense GEMM by DeepGEMM's names: D = (C +) A @ B.T, written into `d`.

`nt` is the canonical layout, A [M, K] and B [N, K]. `nn`, `tn` and `tt` take B, A and B, or A
transposed, with the scales transposed in the same way. FP4 is packed along the dimension that is
contiguous. Operands whose K is not the contiguous dimension are repacked at each call.

Packed scales with K-major data, what the engines pass, go straight to the op: its checks are all
that is done.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ... import _check
from ...ops.layout import FP4_DTYPES, as_bytes
from ...ops.quantize import logical_k
from .layout import Recipe, name_of, recipes, required
from .runtime import skips

Operand = tuple[torch.Tensor, torch.Tensor]
_PAIR = (tuple, list)

_gemm_out = torch.ops.sm120.gemm.out


def reject_extras(op: str, alpha: object, epilogue: object) -> None:
    """Later DeepGEMM versions scale the product, or apply more, inside the GEMM."""
    for arg, value in (("alpha", alpha), ("epilogue", epilogue)):
        if value is not None:
            _check.fail(name_of(op), arg, "None (this package has no such epilogue)", value)


def unpaired(
    op: str, a: Any, b: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """A's data and scale, B's data and scale."""
    for operand in (a, b):
        if not isinstance(operand, _PAIR) or len(operand) != 2:
            arg = "a" if operand is a else "b"
            _check.fail_type(name_of(op), arg, "a pair (data, scale)", type(operand).__name__)
    (a_data, sfa), (b_data, sfb) = a, b
    if not (isinstance(sfa, torch.Tensor) and isinstance(sfb, torch.Tensor)):
        _check.require_tensor(name_of(op), "sfa", sfa)
        _check.require_tensor(name_of(op), "sfb", sfb)
    return a_data, sfa, b_data, sfb


def k_major(data: torch.Tensor) -> torch.Tensor:
    """[rows, K] data with K along its rows: itself, or one pass over it."""
    if data.stride(-1) == 1:
        return data
    if data.dtype not in FP4_DTYPES:
        return data.view(torch.uint8).contiguous().view(data.dtype)
    packed = as_bytes(data.t().contiguous())  # FP4 packed along the rows: [K, rows / 2]
    return torch.ops.sm120.transpose_fp4.default(packed).view(data.dtype)


def _converted(
    op: str, arg: str, operand: Operand, gran: tuple[int, int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """K-major data and packed scales."""
    data, sf = operand
    name = name_of(op)
    _check.require_tensor(name, arg, data, rank=2)
    _check.require_dtype(name, arg, data, (torch.float8_e4m3fn, *FP4_DTYPES))
    data = k_major(data)
    return data, required(name, f"sf{arg}", sf, data.shape[0], logical_k(data), gran)


def _transposed(operand: Operand) -> Operand:
    return operand[0].t(), operand[1].t()


def _dense(
    op: str,
    a: Operand,
    b: Operand,
    d: torch.Tensor,
    c: torch.Tensor | None,
    head_splits: Sequence[int],
    recipe: Recipe | None,
    recipe_a: Recipe | None,
    recipe_b: Recipe | None,
) -> None:
    a_data, sfa, b_data, sfb = unpaired(op, a, b)
    if c is not None:
        _check.require_no_grad(name_of(op), c=c)
    default = recipe is None and recipe_a is None and recipe_b is None
    packed = sfa.dtype is torch.int32 and sfb.dtype is torch.int32
    if packed and a_data.stride(-1) == 1 and b_data.stride(-1) == 1:
        if default:
            _gemm_out(a_data, sfa, b_data, sfb, 128, 128, c, head_splits, out=d)
            return
        for_a, for_b = recipes(op, sfb, recipe, recipe_a, recipe_b)
    else:
        for_a, for_b = recipes(op, sfb, recipe, recipe_a, recipe_b)
        a_data, sfa = _converted(op, "a", a, for_a)
        b_data, sfb = _converted(op, "b", b, for_b)
    _gemm_out(a_data, sfa, b_data, sfb, for_a[1], for_b[1], c, head_splits, out=d)


def fp8_fp4_gemm_nt(
    a: Operand,
    b: Operand,
    d: torch.Tensor,
    c: torch.Tensor | None = None,
    recipe: Recipe | None = None,
    recipe_a: Recipe | None = None,
    recipe_b: Recipe | None = None,
    compiled_dims: str = "nk",
    disable_ue8m0_cast: bool = False,
    alpha: object = None,
    epilogue: object = None,
) -> None:
    """D = (C +) A @ B.T of FP8 and FP4 operands in any pairing.

    Args:
        a, b: (data, scale). data: float8_e4m3fn [rows, K], or FP4 as int8 [rows, K / 2]; any dense
            layout, see the head of the file. scale: see layout.py.
        d: bfloat16 or float32 [M, N], stride(1) == 1, any row stride; written.
        c: of D's shape and dtype, D itself included.
        recipe, recipe_a, recipe_b: granularities of the scales, see layout.py. By default A has one
            scale a row and 128 of K, B one for 128 x 128, or a row where its scales are packed.
        compiled_dims, disable_ue8m0_cast: without effect.
        alpha, epilogue: must be None.
    """
    op = "fp8_fp4_gemm_nt"
    if skips("deep_gemm.fp8_fp4_gemm_nt"):
        return
    if alpha is not None or epilogue is not None:
        reject_extras(op, alpha, epilogue)
    _dense(op, a, b, d, c, (), recipe, recipe_a, recipe_b)


def fp8_fp4_gemm_nn(
    a: Operand,
    b: Operand,
    d: torch.Tensor,
    c: torch.Tensor | None = None,
    recipe: Recipe | None = None,
    recipe_a: Recipe | None = None,
    recipe_b: Recipe | None = None,
    compiled_dims: str = "nk",
    disable_ue8m0_cast: bool = False,
    alpha: object = None,
    epilogue: object = None,
) -> None:
    """fp8_fp4_gemm_nt() of B [K, N] and its scales transposed."""
    if skips("deep_gemm.fp8_fp4_gemm_nn"):
        return
    reject_extras("fp8_fp4_gemm_nn", alpha, epilogue)
    _dense("fp8_fp4_gemm_nn", a, _transposed(b), d, c, (), recipe, recipe_a, recipe_b)


def fp8_fp4_gemm_tn(
    a: Operand,
    b: Operand,
    d: torch.Tensor,
    c: torch.Tensor | None = None,
    recipe: Recipe | None = None,
    recipe_a: Recipe | None = None,
    recipe_b: Recipe | None = None,
    compiled_dims: str = "mn",
    disable_ue8m0_cast: bool = False,
    alpha: object = None,
    epilogue: object = None,
) -> None:
    """fp8_fp4_gemm_nt() of A [K, M] and B [K, N], and their scales transposed."""
    if skips("deep_gemm.fp8_fp4_gemm_tn"):
        return
    reject_extras("fp8_fp4_gemm_tn", alpha, epilogue)
    a, b = _transposed(a), _transposed(b)
    _dense("fp8_fp4_gemm_tn", a, b, d, c, (), recipe, recipe_a, recipe_b)


def fp8_fp4_gemm_tt(
    a: Operand,
    b: Operand,
    d: torch.Tensor,
    c: torch.Tensor | None = None,
    recipe: Recipe | None = None,
    recipe_a: Recipe | None = None,
    recipe_b: Recipe | None = None,
    compiled_dims: str = "mn",
    disable_ue8m0_cast: bool = False,
    alpha: object = None,
    epilogue: object = None,
) -> None:
    """fp8_fp4_gemm_nt() of A [K, M] and its scales transposed."""
    if skips("deep_gemm.fp8_fp4_gemm_tt"):
        return
    reject_extras("fp8_fp4_gemm_tt", alpha, epilogue)
    _dense("fp8_fp4_gemm_tt", _transposed(a), b, d, c, (), recipe, recipe_a, recipe_b)


def fp8_gemm_nt_skip_head_mid(
    a: Operand,
    b: Operand,
    d: torch.Tensor,
    head_splits: Sequence[int],
    recipe: Recipe | None = None,
    compiled_dims: str = "nk",
    disable_ue8m0_cast: bool = False,
) -> None:
    """fp8_fp4_gemm_nt() into a `d` whose heads have columns between that are left as they are.

    Args:
        head_splits: (left, mid, right): N divides by left + right, and after the first `left`
            columns of each head of D come `mid` that are not written.
    """
    if skips("deep_gemm.fp8_gemm_nt_skip_head_mid"):
        return
    _dense("fp8_gemm_nt_skip_head_mid", a, b, d, None, list(head_splits), recipe, None, None)


fp8_gemm_nt = fp4_gemm_nt = fp8_fp4_gemm_nt
fp8_gemm_nn = fp8_fp4_gemm_nn
fp8_gemm_tn = fp8_fp4_gemm_tn
fp8_gemm_tt = fp8_fp4_gemm_tt


# ---- cuBLASLt ------------------------------------------------------------------------------------
# DeepGEMM's baseline of unscaled operands; torch's own GEMM is that on CUDA.


def _torch_gemm(
    name: str, a: torch.Tensor, b: torch.Tensor, d: torch.Tensor, c: torch.Tensor | None
) -> None:
    """d = (c +) a @ b."""
    if skips(f"deep_gemm.{name}"):
        return
    if c is None and d.dtype == a.dtype:
        torch.mm(a, b, out=d)
        return
    if a.is_cuda and a.dtype != torch.float32:
        product = torch.mm(a, b, out_dtype=torch.float32)
    else:
        product = a.float() @ b.float()
    d.copy_(product if c is None else product + c)


def cublaslt_gemm_nt(
    a: torch.Tensor, b: torch.Tensor, d: torch.Tensor, c: torch.Tensor | None = None
) -> None:
    """d = (c +) a @ b.T by torch, of bfloat16, float16 or float32 operands."""
    _torch_gemm("cublaslt_gemm_nt", a, b.t(), d, c)


def cublaslt_gemm_nn(
    a: torch.Tensor, b: torch.Tensor, d: torch.Tensor, c: torch.Tensor | None = None
) -> None:
    """cublaslt_gemm_nt() of b [K, N]."""
    _torch_gemm("cublaslt_gemm_nn", a, b, d, c)


def cublaslt_gemm_tn(
    a: torch.Tensor, b: torch.Tensor, d: torch.Tensor, c: torch.Tensor | None = None
) -> None:
    """cublaslt_gemm_nt() of a [K, M] and b [K, N]."""
    _torch_gemm("cublaslt_gemm_tn", a.t(), b, d, c)


def cublaslt_gemm_tt(
    a: torch.Tensor, b: torch.Tensor, d: torch.Tensor, c: torch.Tensor | None = None
) -> None:
    """cublaslt_gemm_nt() of a [K, M]."""
    _torch_gemm("cublaslt_gemm_tt", a.t(), b.t(), d, c)
