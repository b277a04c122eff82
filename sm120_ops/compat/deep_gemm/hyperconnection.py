"""The GEMM before a block with hyper-connections, by DeepGEMM's name."""

from __future__ import annotations

import torch

from ... import _check
from .runtime import skips

_prenorm_out = torch.ops.sm120.hc_prenorm.out


def tf32_hc_prenorm_gemm(
    a: torch.Tensor,
    b: torch.Tensor,
    d: torch.Tensor,
    sqr_sum: torch.Tensor,
    num_splits: int | None = None,
) -> None:
    """d = a @ b.T in TF32 and sqr_sum = the sums of squares of a's rows, in one pass over a.

    Args:
        a: bfloat16 [M, K]. b: float32 [N, K].
        d, sqr_sum: float32 [M, N] and [M], contiguous; written. With num_splits=S [S, M, N] and
            [S, M], partial sums over parts of K that the caller adds up.
    """
    if not skips("deep_gemm.tf32_hc_prenorm_gemm"):
        _check.require_no_grad("deep_gemm.tf32_hc_prenorm_gemm", a=a, b=b)
        _prenorm_out(a, b, num_splits, None, d=d, sqr_sum=sqr_sum)
