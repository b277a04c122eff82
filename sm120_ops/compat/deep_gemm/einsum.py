"""Batched products by DeepGEMM's names.

    "bhr,hdr->bhd"   "bhd,hdr->bhr"   "bhd,bhr->hdr"    a product for each h
    "bmk,bnk->mn"                                       one product, summed over b too (BF16)

Each is one launch, on views of what is given. K that is not contiguous costs one more pass over the
operand in FP8 and FP4, none in BF16. Tokens with packed scales and K-major data, what the engines
pass, go straight to the op: its checks are all that is done. Other equations: sm120_ops.einsum().
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from ... import _check
from ...ops.groups import rows_contiguous
from ...ops.layout import FP4_DTYPES
from .gemm import Operand, reject_extras, unpaired
from .grouped import k_major_groups
from .layout import Recipe, name_of, recipes, required
from .runtime import skips

_batched_gemm_out = torch.ops.sm120.batched_gemm.out
_bf16_batched_gemm_out = torch.ops.sm120.bf16_batched_gemm.out
_bf16_batch_sum_out = torch.ops.sm120.bf16_batch_sum.out

View = Callable[[torch.Tensor], torch.Tensor]


def _heads_first(x: torch.Tensor) -> torch.Tensor:
    return x.transpose(0, 1)


def _itself(x: torch.Tensor) -> torch.Tensor:
    return x


def _transposed(x: torch.Tensor) -> torch.Tensor:
    return x.transpose(1, 2)


def _rows_last(x: torch.Tensor) -> torch.Tensor:
    return x.permute(1, 2, 0)


class _Views(NamedTuple):
    """A as [h, M, K], B as [h, N, K], scales as their data; D is [M, h, N] or else [h, M, N]."""

    a: View
    b: View
    rows_first: bool


_TOKENS = "bhr,hdr->bhd"
_EXPRESSIONS = {
    _TOKENS: _Views(_heads_first, _itself, True),
    "bhd,hdr->bhr": _Views(_heads_first, _transposed, True),
    "bhd,bhr->hdr": _Views(_rows_last, _rows_last, False),
}
_SUM = "bmk,bnk->mn"


def _ready(a: torch.Tensor, sfa: torch.Tensor, b: torch.Tensor, sfb: torch.Tensor) -> bool:
    """What the engines pass for tokens: K-major data, packed scales of rows that are contiguous."""
    if sfa.dtype is not torch.int32 or sfb.dtype is not torch.int32:
        return False
    if a.dim() != 3 or sfa.dim() != 3:
        return False
    rows, heads, words = sfa.stride()
    return (
        rows == 1 and heads % 4 == 0 and words % 4 == 0 and a.stride(2) == 1 and b.stride(-1) == 1
    )


def _views(op: str, expr: str, others: tuple[str, ...] = ()) -> _Views:
    found = _EXPRESSIONS.get(expr.replace(" ", ""))
    if found is None:
        accepted = " or ".join(repr(known) for known in (*_EXPRESSIONS, *others))
        _check.fail(name_of(op), "expr", accepted, repr(expr))
    return found


def _check_sizes(
    op: str, a: torch.Tensor, b: torch.Tensor, d: torch.Tensor, rows_first: bool
) -> None:
    """Of the views, and of D as it is; K is compared by the op."""
    heads, m, n = a.shape[0], a.shape[1], b.shape[1]
    shape = (m, heads, n) if rows_first else (heads, m, n)
    if b.shape[0] != heads or tuple(d.shape) != shape:
        requirement = f"batch {heads}, as A, in B and D, and D of {list(shape)}"
        _check.fail(name_of(op), "d", requirement, f"B {list(b.shape)}, D {list(d.shape)}")


def fp8_einsum(
    expr: str,
    a: Operand,
    b: Operand,
    d: torch.Tensor,
    c: torch.Tensor | None = None,
    recipe: Recipe = (1, 128, 128),
    epilogue: object = None,
    use_128x4_sfd_layout: bool = False,
) -> None:
    """A batched product of FP8 or FP4 operands, written into `d`.

    Args:
        expr: one of the first three at the head of this file.
        a, b: (data, scale), data of the shape that `expr` names, scales like it, with K and where
            the recipe says so rows in groups: "bhr,hdr->bhd" has scales [b, h, r / 128] and
            [h, d / 128, r / 128] with the default recipe. Packed scales are int32 [b, h, words] and
            [h, d, words] there; for the others [h, M, words] and [h, N, words].
        d: bfloat16 or float32, last stride 1. A pair (data, scale), for quantised output, is
            refused: there is no such epilogue.
        c: of D's shape and dtype, D itself included.
        recipe: (gran_mn of A, gran_mn of B, gran_k).
        epilogue, use_128x4_sfd_layout: must be None, False.
    """
    op = "fp8_einsum"
    if skips("deep_gemm.fp8_einsum"):
        return
    if epilogue is not None or not isinstance(d, torch.Tensor) or use_128x4_sfd_layout:
        reject_extras(op, None, epilogue)
        got = "a pair or a scale layout for quantised output"
        _check.fail_type(name_of(op), "d", "a bfloat16 or float32 tensor", got)
    a_data, sfa, b_data, sfb = unpaired(op, a, b)
    if expr == _TOKENS and _ready(a_data, sfa, b_data, sfb) and (c is None or not c.requires_grad):
        for_a, for_b = recipes(op, sfb, recipe, None, None)
        a_data, sfa = _heads_first(a_data), _heads_first(sfa)
        _batched_gemm_out(a_data, sfa, b_data, sfb, for_a[1], for_b[1], c, True, out=d)
        return
    views = _views(op, expr)
    for arg, data, sf in (("a", a_data, sfa), ("b", b_data, sfb)):
        _check.require_tensor(name_of(op), arg, data, rank=3)
        _check.require_dtype(name_of(op), arg, data, (torch.float8_e4m3fn, *FP4_DTYPES))
        _check.require_tensor(name_of(op), f"sf{arg}", sf, rank=3)
    for_a, for_b = recipes(op, sfb, recipe, None, None)
    a_data, b_data = k_major_groups(views.a(a_data)), k_major_groups(views.b(b_data))
    _check_sizes(op, a_data, b_data, d, views.rows_first)
    _check.require_no_grad(name_of(op), c=c)
    per_byte = 1 if a_data.dtype == torch.float8_e4m3fn else 2
    heads, m, k = a_data.shape[0], a_data.shape[1], a_data.shape[2] * per_byte
    canonical = sfa.dtype == torch.int32 and views.a is not _heads_first
    sfa = sfa if canonical else views.a(sfa)
    sfb = sfb if sfb.dtype == torch.int32 else views.b(sfb)
    sfa = rows_contiguous(required(name_of(op), "sfa", sfa, m, k, for_a, heads))
    sfb = rows_contiguous(required(name_of(op), "sfb", sfb, b_data.shape[1], k, for_b, heads))
    _batched_gemm_out(a_data, sfa, b_data, sfb, for_a[1], for_b[1], c, views.rows_first, out=d)


def einsum(
    expr: str,
    a: torch.Tensor,
    b: torch.Tensor,
    d: torch.Tensor,
    c: torch.Tensor | None = None,
    use_cublaslt: bool = False,
    epilogue: object = None,
) -> None:
    """A batched product of bfloat16 operands, written into `d`.

    Args:
        expr: any at the head of this file.
        a, b: bfloat16, of the shapes that `expr` names; any strides that DeepGEMM's tests have.
        d: bfloat16 or float32, last stride 1.
        c: of D's shape and dtype, D itself included.
        use_cublaslt: compute it with torch.
        epilogue: must be None.
    """
    op = "einsum"
    if skips("deep_gemm.einsum"):
        return
    if epilogue is not None:
        reject_extras(op, None, epilogue)
    _check.require_no_grad(name_of(op), a=a, b=b, c=c)
    plain = expr.replace(" ", "")
    if use_cublaslt:
        product = torch.einsum(plain, a.float(), b.float())
        d.copy_(product if c is None else product + c)
        return
    if plain == _SUM:
        _bf16_batch_sum_out(a, b, c, out=d)
        return
    views = _views(op, expr, (_SUM,))
    for arg, data in (("a", a), ("b", b), ("d", d)):
        _check.require_tensor(name_of(op), arg, data, rank=3)
    a, b = views.a(a), views.b(b)
    _check_sizes(op, a, b, d, views.rows_first)
    _bf16_batched_gemm_out(a, b, c, views.rows_first, out=d)
