"""A block-scaled GEMM in Triton, as its tutorial writes it, autotuned over a few tiles.

Importing this module needs triton. Where the GPU has no block-scaled MMA that Triton knows,
``tl.dot_scaled`` itself falls back to BF16 MMA.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

CONFIGS = [
    triton.Config({"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k}, num_warps=warps, num_stages=stages)
    for m, n, k, warps, stages in (
        (128, 128, 128, 8, 2),
        (128, 128, 128, 4, 2),
        (64, 128, 128, 4, 3),
        (16, 128, 256, 4, 2),
    )
]


# Tiles of segments of 64 or more rows of one expert.
GROUPED_CONFIGS = [
    triton.Config({"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k}, num_warps=warps, num_stages=stages)
    for m, n, k, warps, stages in ((64, 128, 128, 4, 3), (16, 128, 256, 4, 2), (32, 128, 128, 4, 3))
]


@triton.jit
def _product(
    a_ptr,
    sfa_ptr,
    b_ptr,
    sfb_ptr,
    d_ptr,
    experts_ptr,  # of each row of A, -1 for none; one expert a tile
    M,
    N,
    K,
    PACK_A: tl.constexpr,  # values a byte: 1 for FP8, 2 for FP4
    PACK_B: tl.constexpr,
    FORMAT_A: tl.constexpr,
    FORMAT_B: tl.constexpr,
    GROUPED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # Tiles of 8 rows of blocks at a time, so that the B tiles of a group stay in L2.
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    pid = tl.program_id(0)
    first = pid // (8 * tiles_n) * 8
    rows = min(tiles_m - first, 8)
    tile_m = first + pid % (8 * tiles_n) % rows
    tile_n = pid % (8 * tiles_n) // rows
    if GROUPED:
        expert = tl.load(experts_ptr + tile_m * BLOCK_M).to(tl.int64)
        if expert < 0:
            return
        b_ptr += expert * N * (K // PACK_B)
        sfb_ptr += expert * N * (K // 32)
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m_in, n_in = (m < M)[:, None], (n < N)[:, None]
    k_a = tl.arange(0, BLOCK_K // PACK_A)
    k_b = tl.arange(0, BLOCK_K // PACK_B)
    groups = tl.arange(0, BLOCK_K // 32)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(0, K, BLOCK_K):
        a_cols, b_cols = k // PACK_A + k_a, k // PACK_B + k_b
        s_cols = k // 32 + groups
        a_at = m[:, None].to(tl.int64) * (K // PACK_A) + a_cols[None, :]
        b_at = n[:, None].to(tl.int64) * (K // PACK_B) + b_cols[None, :]
        a = tl.load(a_ptr + a_at, mask=m_in & (a_cols < K // PACK_A)[None, :], other=0.0)
        b = tl.load(b_ptr + b_at, mask=n_in & (b_cols < K // PACK_B)[None, :], other=0.0)
        s_in = (s_cols < K // 32)[None, :]
        sfa = tl.load(sfa_ptr + m[:, None] * (K // 32) + s_cols[None, :], mask=m_in & s_in, other=0)
        sfb = tl.load(sfb_ptr + n[:, None] * (K // 32) + s_cols[None, :], mask=n_in & s_in, other=0)
        acc = tl.dot_scaled(a, sfa, FORMAT_A, b.T, sfb, FORMAT_B, acc)
    d_at = m[:, None].to(tl.int64) * N + n[None, :]
    tl.store(d_ptr + d_at, acc.to(tl.bfloat16), mask=m_in & (n < N)[None, :])


_kernel = triton.autotune(configs=CONFIGS, key=["M", "N", "K"])(_product)
_grouped_kernel = triton.autotune(configs=GROUPED_CONFIGS, key=["M", "N", "K"])(_product)


def _operand(data: torch.Tensor) -> tuple[torch.Tensor, int, str]:
    """Data as Triton wants it, values a byte, and its name of the format."""
    if data.dtype == torch.float8_e4m3fn:
        return data, 1, "e4m3"
    return data.view(torch.uint8), 2, "e2m1"


def gemm(
    a: torch.Tensor, sfa: torch.Tensor, b: torch.Tensor, sfb: torch.Tensor, out: torch.Tensor
) -> None:
    """out [M, N] = a [M, K] b [N, K]^T; scales are UE8M0 bytes, [rows, K / 32] row-major."""
    _launch(_kernel, a, sfa, b, sfb, None, out)


def grouped_gemm(
    a: torch.Tensor,
    sfa: torch.Tensor,
    b: torch.Tensor,
    sfb: torch.Tensor,
    experts: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """The same with b [G, N, K], row m times expert experts[m]; segments of 64 rows or more."""
    _launch(_grouped_kernel, a, sfa, b, sfb, experts, out)


def _launch(
    kernel: Any,
    a: torch.Tensor,
    sfa: torch.Tensor,
    b: torch.Tensor,
    sfb: torch.Tensor,
    experts: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    (a, pack_a, format_a), (b, pack_b, format_b) = _operand(a), _operand(b)
    M, N, K = a.shape[0], b.shape[-2], a.shape[1] * pack_a

    def grid(meta: dict[str, Any]) -> tuple[int]:
        return (triton.cdiv(M, meta["BLOCK_M"]) * triton.cdiv(N, meta["BLOCK_N"]),)

    kernel[grid](
        a, sfa, b, sfb, out, experts, M, N, K, pack_a, pack_b, format_a, format_b,
        experts is not None,
    )  # fmt: skip
