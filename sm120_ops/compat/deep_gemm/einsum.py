"""Batched products by DeepGEMM's names.

    "bhr,hdr->bhd"   "bhd,hdr->bhr"   "bhd,bhr->hdr"    a product for each h
    "bmk,bnk->mn"                                       one product, summed over b too (BF16)

Each is A [h, M, K] times B [h, N, K] transposed, as views of what is given, one launch for each h.
K that is not contiguous costs a copy of the operand in FP8 and FP4, not in BF16.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from ... import _check
from ...ops.layout import FP4_DTYPES
from .gemm import Operand, reject_extras
from .grouped import k_major_groups
from .layout import Recipe, name_of, recipes, required
from .runtime import skips

_gemm_out = torch.ops.sm120.gemm.out
_bf16_gemm_out = torch.ops.sm120.bf16_gemm.out

View = Callable[[torch.Tensor], torch.Tensor]


def _heads_first(x: torch.Tensor) -> torch.Tensor:
    return x.permute(1, 0, 2)


def _itself(x: torch.Tensor) -> torch.Tensor:
    return x


def _transposed(x: torch.Tensor) -> torch.Tensor:
    return x.transpose(1, 2)


def _rows_last(x: torch.Tensor) -> torch.Tensor:
    return x.permute(1, 2, 0)


# {expression: views of A, B and D as [h, M, K], [h, N, K], [h, M, N]; scales go as their data}
_VIEWS: dict[str, tuple[View, View, View]] = {
    "bhr,hdr->bhd": (_heads_first, _itself, _heads_first),
    "bhd,hdr->bhr": (_heads_first, _transposed, _heads_first),
    "bhd,bhr->hdr": (_rows_last, _rows_last, _itself),
}
_SUM = "bmk,bnk->mn"


def _views(op: str, expr: str, others: tuple[str, ...] = ()) -> tuple[View, View, View]:
    found = _VIEWS.get(expr.replace(" ", ""))
    if found is None:
        accepted = " or ".join(repr(known) for known in (*_VIEWS, *others))
        _check.fail(name_of(op), "expr", accepted, repr(expr))
    return found


def _check_sizes(op: str, a: torch.Tensor, b: torch.Tensor, d: torch.Tensor) -> None:
    """Of the views; K is compared by the GEMM."""
    shape = (a.shape[0], a.shape[1], b.shape[1])
    if b.shape[0] != a.shape[0] or tuple(d.shape) != shape:
        requirement = f"batch {a.shape[0]}, as A, in B and D, and D of {list(shape)} as [h, M, N]"
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
    view_a, view_b, view_d = _views(op, expr)
    (a_data, sfa), (b_data, sfb) = a, b
    for arg, data, sf in (("a", a_data, sfa), ("b", b_data, sfb)):
        _check.require_tensor(name_of(op), arg, data, rank=3)
        _check.require_dtype(name_of(op), arg, data, (torch.float8_e4m3fn, *FP4_DTYPES))
        _check.require_tensor(name_of(op), f"sf{arg}", sf, rank=3)
    for_a, for_b = recipes(op, sfb, recipe, None, None)
    a_data, b_data = k_major_groups(view_a(a_data)), k_major_groups(view_b(b_data))
    d, c = view_d(d), None if c is None else view_d(c)
    _check_sizes(op, a_data, b_data, d)
    _check.require_no_grad(name_of(op), c=c)
    per_byte = 1 if a_data.dtype == torch.float8_e4m3fn else 2
    heads, m, k = a_data.shape[0], a_data.shape[1], a_data.shape[2] * per_byte
    canonical = sfa.dtype == torch.int32 and view_a is not _heads_first
    sfa = sfa if canonical else view_a(sfa)
    sfb = sfb if sfb.dtype == torch.int32 else view_b(sfb)
    sfa = required(name_of(op), "sfa", sfa, m, k, for_a, heads)
    sfb = required(name_of(op), "sfb", sfb, b_data.shape[1], k, for_b, heads)
    for h in range(heads):
        _gemm_out(
            a_data[h], sfa[h], b_data[h], sfb[h], for_a[1], for_b[1],
            None if c is None else c[h], (), out=d[h],
        )  # fmt: skip


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
    reject_extras(op, None, epilogue)
    _check.require_no_grad(name_of(op), a=a, b=b, c=c)
    plain = expr.replace(" ", "")
    if use_cublaslt:
        product = torch.einsum(plain, a.float(), b.float())
        d.copy_(product if c is None else product + c)
        return
    if plain == _SUM:
        flat_a, flat_b = (x.transpose(0, 1).flatten(1) for x in (a, b))
        _bf16_gemm_out(flat_a, flat_b, c, out=d)
        return
    view_a, view_b, view_d = _views(op, expr, (_SUM,))
    for arg, data in (("a", a), ("b", b), ("d", d)):
        _check.require_tensor(name_of(op), arg, data, rank=3)
    a, b, d = view_a(a), view_b(b), view_d(d)
    c = None if c is None else view_d(c)
    _check_sizes(op, a, b, d)
    for h in range(a.shape[0]):
        _bf16_gemm_out(a[h], b[h], None if c is None else c[h], out=d[h])
