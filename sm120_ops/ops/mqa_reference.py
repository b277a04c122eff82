"""The CPU kernels of mqa.py in plain PyTorch: the definition of what those ops compute."""

from __future__ import annotations

import torch

from .layout import ceil_div
from .quantize import decode, scale_values

TILE_KV = 128  # keys that are copied and scheduled together
VARLEN_GROUP = 8  # varlen rows that may share a pass over the cache: those of an aligned 8


def _values(data: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    """[rows, D] codes as float64; with the packed words [rows] of FP4, dequantised."""
    codes = decode(data, torch.float64)
    if scale is None:
        return codes
    return codes * scale_values(scale.reshape(-1, 1), 32, codes.shape[1], torch.float64)


def _logits(q: torch.Tensor, keys: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """One row in float64: q [H, D], keys [n, D], weights [H] -> [n], before any float32 scale."""
    return weights.double() @ torch.relu(q @ keys.t())


def _query_values(q: torch.Tensor, q_scale: torch.Tensor | None) -> torch.Tensor:
    heads = q.shape[-2]
    flat = q.reshape(-1, q.shape[-1])
    return _values(flat, None if q_scale is None else q_scale.reshape(-1)).unflatten(0, (-1, heads))


def ragged_into(
    out: torch.Tensor,
    q: torch.Tensor,
    q_scale: torch.Tensor | None,
    k: torch.Tensor,
    k_scale: torch.Tensor,
    weights: torch.Tensor,
    starts: torch.Tensor,
    ends: torch.Tensor,
    compressed: bool,
    clean: bool,
) -> None:
    fp4 = q_scale is not None
    queries, keys = _query_values(q, q_scale), _values(k, k_scale if fp4 else None)
    if clean or compressed:
        out.fill_(-torch.inf)
    for i, (start, end) in enumerate(zip(starts.tolist(), ends.tolist(), strict=True)):
        start, end = max(start, 0), min(end, k.shape[0])
        if compressed:
            end = min(end, start + out.shape[1])
        if end <= start:
            continue
        row = _logits(queries[i], keys[start:end], weights[i])
        if not fp4:
            row = row * k_scale[start:end].double()
        column = 0 if compressed else start
        out[i, column : column + end - start] = row.float().to(out.dtype)


def row_lengths(context_lens: torch.Tensor, next_n: int) -> torch.Tensor:
    """The length of each of B * next_n rows. One length a sequence is that of its last row; each
    row before it sees one key less."""
    if context_lens.dim() == 2:
        return context_lens.reshape(-1)
    back = torch.arange(next_n - 1, -1, -1, dtype=torch.int32, device=context_lens.device)
    return (context_lens[:, None] - back).reshape(-1)


def paged_into(
    out: torch.Tensor,
    q: torch.Tensor,
    q_scale: torch.Tensor | None,
    kv_cache: torch.Tensor,
    weights: torch.Tensor,
    context_lens: torch.Tensor,
    block_table: torch.Tensor,
    clean: bool,
) -> None:
    fp4 = q_scale is not None
    next_n, width = q.shape[1], q.shape[3]
    blocks, block_kv = kv_cache.shape[:2]
    limit = min(out.shape[1], block_table.shape[1] * block_kv)
    queries = _query_values(q, q_scale)
    if clean:
        out.fill_(-torch.inf)
    for i, length in enumerate(row_lengths(context_lens, next_n).tolist()):
        length = min(length, limit)
        if length <= 0:
            continue
        ids = block_table[i // next_n, : ceil_div(length, block_kv)].long()
        known = (ids >= 0) & (ids < blocks)
        row = torch.full((len(ids), block_kv), -torch.inf, dtype=torch.float64)
        pages = kv_cache.flatten(1)[ids[known]]
        data = pages[:, : block_kv * width].reshape(-1, width)
        scale = pages[:, block_kv * width :].contiguous()
        if fp4:
            keys = _values(data, scale.view(torch.int32).reshape(-1))
            part = _logits(queries[i], keys, weights[i])
        else:
            keys = _values(data.view(torch.float8_e4m3fn), None)
            part = _logits(queries[i], keys, weights[i])
            part = part * scale.view(torch.float32).reshape(-1).double()
        row[known] = part.reshape(-1, block_kv)
        out[i, :length] = row.reshape(-1)[:length].float().to(out.dtype)


def _group_lengths(context_lens: torch.Tensor, indices: torch.Tensor | None) -> list[int]:
    """The longest context of each sequence. Varlen: of each run of rows with one index within an
    aligned group, told at its first row; 0 at the others."""
    if context_lens.dim() == 2:
        lengths = context_lens.max(1).values.tolist() if context_lens.numel() else []
    else:
        lengths = context_lens.tolist()
    if indices is None:
        return lengths
    names = indices.tolist()
    result = [0] * len(lengths)
    leader = 0
    for i, length in enumerate(lengths):
        if i % VARLEN_GROUP == 0 or names[i] != names[i - 1]:
            leader = i
        result[leader] = max(result[leader], length)
    return result


def schedule_into(
    out: torch.Tensor, context_lens: torch.Tensor, indices: torch.Tensor | None
) -> None:
    """Lays the tiles of all sequences end to end and cuts them into equal ranges: entry c is the
    (sequence, tile) at which CTA c starts and CTA c - 1 ends."""
    tiles = [ceil_div(max(n, 0), TILE_KV) for n in _group_lengths(context_lens, indices)]
    total, ctas = sum(tiles), out.shape[0] - 1
    cell = before = 0
    for c in range(ctas + 1):
        unit = c * total // ctas
        while cell < len(tiles) and before + tiles[cell] <= unit:
            before += tiles[cell]
            cell += 1
        out[c, 0], out[c, 1] = cell, unit - before
