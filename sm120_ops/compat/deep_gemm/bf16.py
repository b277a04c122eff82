"""BF16 GEMM by DeepGEMM's names: D = (C +) A @ B.T, written into `d`.

`nt` takes A [M, K] and B [N, K]; `nn`, `tn` and `tt` take B, A and B, or A transposed. Operands may
be contiguous along either dimension: no layout costs a copy.
"""

from __future__ import annotations

import torch

from ... import _check
from .gemm import reject_extras
from .layout import name_of
from .runtime import skips

_gemm_out = torch.ops.sm120.bf16_gemm.out


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
