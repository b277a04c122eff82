"""BF16 GEMM by DeepGEMM's names: D = (C +) A @ B.T, written into `d`.

`nt` takes A [M, K] and B [N, K]; `nn`, `tn` and `tt` take B, A and B, or A transposed. Operands may
be contiguous along either dimension: no layout costs a copy.
"""

from __future__ import annotations

import torch

from .gemm import reject_extras
from .runtime import skips

_gemm_out = torch.ops.sm120.bf16_gemm.out


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
    if skips("deep_gemm.bf16_gemm_nt"):
        return
    if alpha is not None or epilogue is not None:
        reject_extras("bf16_gemm_nt", alpha, epilogue)
    _gemm_out(a, b, c, out=d)


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
    if skips("deep_gemm.bf16_gemm_nn"):
        return
    reject_extras("bf16_gemm_nn", alpha, epilogue)
    _gemm_out(a, b.t(), c, out=d)


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
    if skips("deep_gemm.bf16_gemm_tn"):
        return
    reject_extras("bf16_gemm_tn", alpha, epilogue)
    _gemm_out(a.t(), b.t(), c, out=d)


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
    if skips("deep_gemm.bf16_gemm_tt"):
        return
    reject_extras("bf16_gemm_tt", alpha, epilogue)
    _gemm_out(a.t(), b, c, out=d)
