"""Operands of BF16 GEMMs, and what a product must be."""

from __future__ import annotations

import torch

LAYOUTS = ("nt", "nn", "tn", "tt")
OUT_DTYPES = (torch.bfloat16, torch.float32)


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
