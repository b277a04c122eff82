"""FP8 MQA logits in Triton as inference engines write them: a program takes a row, or the rows of a
sequence in turn, and a block of keys. Importing this module needs triton.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _ragged(
    q, k, k_scale, weights, starts, ends, out, keys, out_stride,
    H: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    j = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    start, end = tl.load(starts + row), tl.load(ends + row)
    if tl.program_id(1) * BLOCK < end and (tl.program_id(1) + 1) * BLOCK > start:
        h, d = tl.arange(0, H), tl.arange(0, D)
        q_tile = tl.load(q + row * H * D + h[:, None] * D + d[None, :])
        inside = (j >= start) & (j < end)
        k_tile = tl.load(k + j[:, None].to(tl.int64) * D + d[None, :], mask=inside[:, None])
        products = tl.dot(k_tile, q_tile.T)
        weight = tl.load(weights + row * H + h)
        logits = tl.sum(tl.maximum(products, 0.0) * weight[None, :], 1)
        logits *= tl.load(k_scale + j, mask=inside, other=0.0)
        tl.store(out + row.to(tl.int64) * out_stride + j, logits, mask=inside)


@triton.jit
def _paged(
    q, cache, scales, weights, lengths, table, out, page_bytes, table_stride, out_stride,
    N: tl.constexpr, H: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    sequence, page = tl.program_id(0), tl.program_id(1)
    length = tl.load(lengths + sequence)
    if page * PAGE < length:
        block = tl.load(table + sequence * table_stride + page).to(tl.int64)
        h, d, j = tl.arange(0, H), tl.arange(0, D), tl.arange(0, PAGE)
        k_tile = tl.load(cache + block * page_bytes + j[:, None] * D + d[None, :])
        scale = tl.load(scales + block * (page_bytes // 4) + PAGE * D // 4 + j)
        for n in range(N):
            row = sequence * N + n
            q_tile = tl.load(q + row * H * D + h[:, None] * D + d[None, :])
            products = tl.dot(k_tile, q_tile.T)
            weight = tl.load(weights + row * H + h)
            logits = tl.sum(tl.maximum(products, 0.0) * weight[None, :], 1) * scale
            column = page * PAGE + j
            inside = column < length - (N - 1 - n)
            tl.store(out + row.to(tl.int64) * out_stride + column, logits, mask=inside)


def ragged(
    q: torch.Tensor, _: None, k: torch.Tensor, k_scale: torch.Tensor, weights: torch.Tensor,
    starts: torch.Tensor, ends: torch.Tensor, out: torch.Tensor,
) -> None:  # fmt: skip
    rows, heads, dim = q.shape
    grid = (rows, triton.cdiv(len(k), 128))
    _ragged[grid](
        q, k, k_scale, weights, starts, ends, out, len(k), out.stride(0), heads, dim, 128,
        num_warps=4,
    )  # fmt: skip


def paged(
    q: torch.Tensor, _: None, cache: torch.Tensor, weights: torch.Tensor, lengths: torch.Tensor,
    table: torch.Tensor, out: torch.Tensor,
) -> None:  # fmt: skip
    batch, next_n, heads, dim = q.shape
    page = cache.shape[1]
    flat = cache.view(cache.shape[0], -1)
    _paged[(batch, table.shape[1])](
        q, flat.view(torch.float8_e4m3fn), flat.view(torch.float32), weights, lengths, table, out,
        flat.stride(0), table.stride(0), out.stride(0), next_n, heads, dim, page, num_warps=4,
    )  # fmt: skip
