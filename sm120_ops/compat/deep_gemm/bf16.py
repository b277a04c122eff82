"""BF16 GEMM by DeepGEMM's names: D = (C +) A @ B.T, written into `d`; dense and in groups.

`nt` takes A [M, K] and B [N, K]; `nn`, `tn` and `tt` take B, A and B, or A transposed. Operands may
be contiguous along either dimension: no layout costs a copy. Rows that belong to no group are not
read into a result and not written.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from ... import _check
from .gemm import reject_extras
from .grouped import clear_padding
from .layout import name_of
from .runtime import get_mk_alignment_for_contiguous_layout, skips

_MAX_ALIGNMENT = 128

_gemm_out = torch.ops.sm120.bf16_gemm.out
_contiguous_out = torch.ops.sm120.bf16_grouped_gemm.out
_psum_out = torch.ops.sm120.bf16_grouped_gemm_psum.out
_masked_out = torch.ops.sm120.bf16_grouped_gemm_masked.out
_k_grouped_out = torch.ops.sm120.bf16_k_grouped_gemm.out


def _run(
    op: str,
    a: torch.Tensor,
    b: torch.Tensor,
    d: torch.Tensor,
    c: torch.Tensor | None,
    alpha: object,
    epilogue: object,
) -> None:
    if alpha is not None or epilogue is not None:
        reject_extras(op, alpha, epilogue)
    _check.require_no_grad(name_of(op), a=a, b=b, c=c)
    _gemm_out(a, b, c, out=d)


def bf16_gemm_nt(
    a: torch.Tensor,
    b: torch.Tensor,
    d: torch.Tensor,
    c: torch.Tensor | None = None,
    compiled_dims: str = "nk",
    alpha: object = None,
    epilogue: object = None,
) -> None:
    """D = (C +) A @ B.T.

    Args:
        a, b: bfloat16 [M, K] and [N, K].
        d: bfloat16 or float32 [M, N], stride(1) == 1, any row stride; written.
        c: of D's shape and dtype, D itself included.
        compiled_dims: without effect.
        alpha, epilogue: must be None.
    """
    if not skips("deep_gemm.bf16_gemm_nt"):
        _run("bf16_gemm_nt", a, b, d, c, alpha, epilogue)


def bf16_gemm_nn(
    a: torch.Tensor,
    b: torch.Tensor,
    d: torch.Tensor,
    c: torch.Tensor | None = None,
    compiled_dims: str = "nk",
    alpha: object = None,
    epilogue: object = None,
) -> None:
    """bf16_gemm_nt() of B [K, N]."""
    if not skips("deep_gemm.bf16_gemm_nn"):
        _run("bf16_gemm_nn", a, b.t(), d, c, alpha, epilogue)


def bf16_gemm_tn(
    a: torch.Tensor,
    b: torch.Tensor,
    d: torch.Tensor,
    c: torch.Tensor | None = None,
    compiled_dims: str = "mn",
    alpha: object = None,
    epilogue: object = None,
) -> None:
    """bf16_gemm_nt() of A [K, M] and B [K, N]."""
    if not skips("deep_gemm.bf16_gemm_tn"):
        _run("bf16_gemm_tn", a.t(), b.t(), d, c, alpha, epilogue)


def bf16_gemm_tt(
    a: torch.Tensor,
    b: torch.Tensor,
    d: torch.Tensor,
    c: torch.Tensor | None = None,
    compiled_dims: str = "mn",
    alpha: object = None,
    epilogue: object = None,
) -> None:
    """bf16_gemm_nt() of A [K, M]."""
    if not skips("deep_gemm.bf16_gemm_tt"):
        _run("bf16_gemm_tt", a.t(), b, d, c, alpha, epilogue)


def _contiguous(
    op: str,
    a: torch.Tensor,
    b: torch.Tensor,
    d: torch.Tensor,
    grouped_layout: torch.Tensor,
    use_psum_layout: bool,
    expected_m: int | None,
    ensure_zero_padding: bool,
    epilogue: object,
) -> None:
    reject_extras(op, None, epilogue)
    _check.require_no_grad(name_of(op), a=a, b=b)
    alignment = get_mk_alignment_for_contiguous_layout()
    if use_psum_layout:
        _psum_out(a, b, grouped_layout, alignment, expected_m or 0, out=d)
    else:
        # Rows in segments of 256 are in segments of 128 too.
        alignment = math.gcd(alignment, _MAX_ALIGNMENT)
        _contiguous_out(a, b, grouped_layout, alignment, out=d)
    if ensure_zero_padding:
        clear_padding(d, grouped_layout, use_psum_layout, alignment)


def m_grouped_bf16_gemm_nt_contiguous(
    a: torch.Tensor,
    b: torch.Tensor,
    d: torch.Tensor,
    grouped_layout: torch.Tensor,
    compiled_dims: str = "nk",
    use_psum_layout: bool = False,
    expected_m_for_psum_layout: int | None = None,
    ensure_zero_padding: bool = False,
    epilogue: object = None,
) -> None:
    """D[m] = A[m] @ B[expert of m].T.

    Args:
        a: bfloat16 [M, K]. b: bfloat16 [G, N, K].
        d: bfloat16 or float32 [M, N], stride(1) == 1; written.
        grouped_layout: int32. Without use_psum_layout [M], the expert of each row or -1; rows in
            segments of get_mk_alignment_for_contiguous_layout(), each of one expert, padding last.
            With it [G], the end of each group; a group starts where the one before it ended,
            rounded up to that alignment.
        expected_m_for_psum_layout: rows a group is expected to have; steers the choice of tiles.
        ensure_zero_padding: also zero the rows of D that belong to no group.
        compiled_dims: without effect.
        epilogue: must be None.
    """
    op = "m_grouped_bf16_gemm_nt_contiguous"
    if not skips(f"deep_gemm.{op}"):
        _contiguous(
            op, a, b, d, grouped_layout, use_psum_layout, expected_m_for_psum_layout,
            ensure_zero_padding, epilogue,
        )  # fmt: skip


def m_grouped_bf16_gemm_nn_contiguous(
    a: torch.Tensor,
    b: torch.Tensor,
    d: torch.Tensor,
    grouped_layout: torch.Tensor,
    compiled_dims: str = "nk",
    use_psum_layout: bool = False,
    ensure_zero_padding: bool = False,
    epilogue: object = None,
) -> None:
    """m_grouped_bf16_gemm_nt_contiguous() of B [G, K, N]."""
    op = "m_grouped_bf16_gemm_nn_contiguous"
    if not skips(f"deep_gemm.{op}"):
        _contiguous(
            op, a, b.transpose(1, 2), d, grouped_layout, use_psum_layout, None,
            ensure_zero_padding, epilogue,
        )  # fmt: skip


def m_grouped_bf16_gemm_nt_masked(
    a: torch.Tensor,
    b: torch.Tensor,
    d: torch.Tensor,
    masked_m: torch.Tensor,
    expected_m: int,
    compiled_dims: str = "nk",
    epilogue: object = None,
) -> None:
    """D[g, :masked_m[g]] = A[g, :masked_m[g]] @ B[g].T; the other rows of D are left as they are.

    Args:
        a: bfloat16 [G, M, K]. b: bfloat16 [G, N, K].
        d: bfloat16 or float32 [G, M, N]; written.
        masked_m: int32 [G].
        expected_m: rows a group is expected to have; steers the choice of tiles.
        compiled_dims: without effect.
        epilogue: must be None.
    """
    op = "m_grouped_bf16_gemm_nt_masked"
    if skips(f"deep_gemm.{op}"):
        return
    reject_extras(op, None, epilogue)
    _check.require_no_grad(name_of(op), a=a, b=b)
    _masked_out(a, b, masked_m, expected_m, out=d)


bf16_m_grouped_gemm_nt_masked = m_grouped_bf16_gemm_nt_masked


def k_grouped_bf16_gemm_tn_contiguous(
    a: torch.Tensor,
    b: torch.Tensor,
    d: torch.Tensor,
    ks: Sequence[int],
    ks_tensor: torch.Tensor,
    c: torch.Tensor | None = None,
    compiled_dims: str = "mn",
    use_psum_layout: bool = False,
    epilogue: object = None,
) -> None:
    """D[g] = (C[g] +) A_g.T @ B_g over each group's own rows.

    Args:
        a: bfloat16 [sum of k_g, M]. b: bfloat16 [sum of k_g, N].
        d: bfloat16 or float32 [G, M, N]; written. A group without rows gives C, or 0.
        ks: sizes of the groups, any numbers; only their count and sum are looked at.
        ks_tensor: the same as int32 on the device, which alone decides: a captured CUDA graph may
            be replayed with others.
        c: of D's shape and dtype, D itself included; None (which DeepGEMM refuses) for no C.
        compiled_dims: without effect.
        use_psum_layout, epilogue: must be False, None.
    """
    op = "k_grouped_bf16_gemm_tn_contiguous"
    if skips(f"deep_gemm.{op}"):
        return
    reject_extras(op, None, epilogue)
    name = name_of(op)
    _check.require_no_grad(name, a=a, b=b, c=c)
    _check.require(not use_psum_layout, name, "use_psum_layout", "False", use_psum_layout)
    _check.require_tensor(name, "d", d, rank=3)
    if len(ks) != d.shape[0]:
        _check.fail(name, "ks", f"{d.shape[0]} group sizes, as d has groups", list(ks))
    if min(ks, default=0) < 0 or sum(ks) != a.shape[0]:
        _check.fail(name, "ks", f"sizes >= 0 with the sum {a.shape[0]}", list(ks))
    _k_grouped_out(a, b, ks_tensor, c, out=d)
