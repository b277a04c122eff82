"""Operands of BF16 GEMMs, and what a product must be."""

from __future__ import annotations

import torch
from reference import assert_gemm_close, calc_diff

LAYOUTS = ("nt", "nn", "tn", "tt")
OUT_DTYPES = (torch.bfloat16, torch.float32)


def sum_error(k: int) -> float:
    """Most that the norm of a float32 product over K may differ from the exact one's, relatively.

    An MMA adds 16 of K and cuts off, towards 0, what does not fit 24 bits: half a unit in the last
    place on average, 2^-24.4 of the sum as it then is, which is 2/3 of the whole sum on average.
    K / 16 of them lose K * 2^-29. (H200: 2.1e-6 at K = 2048, 1.9e-5 at 16384 by one chain, the same
    as cuBLAS.) Longer sums are put together from chains of 8192, so that no product passes the
    1.4e-5 that a calc_diff of 1e-10 is.
    """
    return min(max(1e-6, k * 2.0**-29), 1.4e-5)


def matrix(
    rows: int, k: int, generator: torch.Generator, *, mn_major: bool = False, padding: int = 0
) -> torch.Tensor:
    """[rows, K] of either layout; between lines lie NaNs, `padding` and what 16 bytes need."""
    lines, length = (k, rows) if mn_major else (rows, k)
    stride = -(-length // 8) * 8 + padding
    device = generator.device
    buffer = torch.full((lines, stride), torch.nan, device=device, dtype=torch.bfloat16)
    buffer[:, :length] = torch.randn(lines, length, generator=generator, device=device)
    values = buffer[:, :length]
    return values.t() if mn_major else values


def operands(
    device: torch.device, m: int, n: int, k: int, layout: str = "nt", padding: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """A [M, K] and B [N, K], lying as `layout` says."""
    generator = torch.Generator(device).manual_seed(m + n + k)
    return (
        matrix(m, k, generator, mn_major=layout[0] == "t", padding=padding),
        matrix(n, k, generator, mn_major=layout[1] == "n", padding=padding),
    )


def check(d: torch.Tensor, a: torch.Tensor, b: torch.Tensor, c: torch.Tensor | None = None) -> None:
    a, b = a.double(), b.double()
    assert_gemm_close(d, a, b, c, relative=sum_error(a.shape[1]))
    if d.dtype == torch.float32 and d.numel() > 0 and a.shape[1] > 0:
        exact = a @ b.t() + (0 if c is None else c.double())
        assert calc_diff(d, exact) <= 1e-10
