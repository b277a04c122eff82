"""What an indexer step needs beside the logits of mqa.py: the KV cache's writer, and top-k.

Cache pages are those of mqa.py: block_kv rows of data, then their block_kv scales of 4 bytes. A row
k [D] is quantised by the rule "deepgemm" of quantize.py: FP8 with one power-of-two scale a row,
stored as float32; FP4 with one UE8M0 byte for each 32 values, the bytes past D / 32 being 0.

Top-k order: larger logits first, NaN above everything, equal logits (-0 and +0 are equal) by lower
column. The chosen columns are given in ascending order, -1 after the last.
"""

from __future__ import annotations

import torch

from .. import _check
from .layout import TAGS, check_out, fresh
from .library import Library
from .mqa_check import BLOCK_SIZES, HEAD_DIMS, check_cache, check_ints, require_shape
from .quantize import FORMATS

MAX_K = 2048
LOGIT_DTYPES = (torch.float32, torch.bfloat16)
SLOT_DTYPES = (torch.int32, torch.int64)

_lib = Library()
_TOPK = (
    "Tensor logits, Tensor? starts, Tensor ends, int k, bool relative=False,"
    " Tensor? block_table=None, int block_kv=64"
)
_lib.define(f"indexer_topk({_TOPK}) -> Tensor", tags=TAGS)
_lib.define(f"indexer_topk.out({_TOPK}, *, Tensor(a!) out) -> ()", tags=TAGS)
_lib.define(
    "mqa_cache_write(Tensor k, Tensor slots, Tensor(a!) kv_cache, str format) -> ()", tags=TAGS
)


# ---- indexer_topk --------------------------------------------------------------------------------


def _check_topk(
    logits: torch.Tensor,
    starts: torch.Tensor | None,
    ends: torch.Tensor,
    k: int,
    relative: bool,
    block_table: torch.Tensor | None,
    block_kv: int,
) -> tuple[int, int]:
    """Gives the shape of the result."""
    op = "indexer_topk"
    _check.require_tensor(op, "logits", logits, rank=2)
    _check.require_dtype(op, "logits", logits, LOGIT_DTYPES)
    if logits.stride(1) != 1 and logits.shape[1] > 1:
        _check.fail(op, "logits", "stride(1) == 1", f"strides {list(logits.stride())}")
    rows = logits.shape[0]
    check_ints(op, "ends", ends, (rows,))
    if starts is not None:
        check_ints(op, "starts", starts, (rows,))
    elif relative:
        _check.fail_type(op, "starts", "a tensor, for relative=True", "None")
    _check.require_number(op, "k", k, integer=True)
    _check.require(1 <= k <= MAX_K, op, "k", f"1 .. {MAX_K}", k)
    _check.require_number(op, "block_kv", block_kv, integer=True)
    if block_table is not None:
        _check.require_tensor(op, "block_table", block_table, rank=2)
        _check.require_dtype(op, "block_table", block_table, (torch.int32,))
        batch = block_table.shape[0]
        if (batch == 0 and rows > 0) or (batch > 0 and rows % batch != 0):
            requirement = f"a number of rows that divides the {rows} of logits"
            _check.fail(op, "block_table", requirement, block_table.shape)
        if block_table.stride(1) != 1 and block_table.shape[1] > 1:
            _check.fail(op, "block_table", "stride(1) == 1", f"strides {block_table.stride()}")
        _check.require_choice(op, "block_kv", block_kv, BLOCK_SIZES)
    _check.require_same_device(
        op, "logits", logits=logits, starts=starts, ends=ends, block_table=block_table
    )
    return rows, k


def _check_topk_out(
    out: torch.Tensor,
    shape: tuple[int, int],
    logits: torch.Tensor,
    starts: torch.Tensor | None,
    ends: torch.Tensor,
    block_table: torch.Tensor | None,
) -> None:
    op = "indexer_topk"
    check_out(op, "out", out, shape, (torch.int32,))
    _check.require_same_device(op, "out", out=out, logits=logits)
    inputs = {"logits": logits, "starts": starts, "ends": ends, "block_table": block_table}
    _check.require_no_overlap(op, "out", out, **inputs)


def _topk_into(
    out: torch.Tensor,
    logits: torch.Tensor,
    starts: torch.Tensor | None,
    ends: torch.Tensor,
    k: int,
    relative: bool,
    block_table: torch.Tensor | None,
    block_kv: int,
) -> None:
    rows, columns = logits.shape
    out.fill_(-1)
    per_sequence = rows // block_table.shape[0] if block_table is not None and rows else 1
    begins = [0] * rows if starts is None else starts.tolist()
    for i, (start, end) in enumerate(zip(begins, ends.tolist(), strict=True)):
        start, end = max(start, 0), min(end, columns)
        if end <= start:
            continue
        order = torch.sort(logits[i, start:end].float(), descending=True, stable=True).indices
        chosen = order[:k].sort().values + (0 if relative else start)
        if block_table is not None:
            table = block_table[i // per_sequence].long()
            page = chosen // block_kv
            known = page < len(table)
            block = torch.full_like(chosen, -1)
            block[known] = table[page[known]]
            chosen = torch.where(block < 0, -1, block * block_kv + chosen % block_kv)
        out[i, : len(chosen)] = chosen.to(torch.int32)


_lib.reference(
    "indexer_topk",
    check=_check_topk,
    check_out=_check_topk_out,
    new=lambda ends, shape: ends.new_empty(shape),
    into=_topk_into,
)


def indexer_topk(
    logits: torch.Tensor,
    ends: torch.Tensor,
    k: int,
    *,
    starts: torch.Tensor | None = None,
    relative: bool = False,
    block_table: torch.Tensor | None = None,
    block_kv: int = 64,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """The k largest logits of each row within its window. See the head of the file for the order.

    Args:
        logits: float32 or bfloat16 [R, C], any row stride. Columns outside a row's window are
            never read.
        ends: int32 [R]; row i's window ends before column ends[i] (paged: its context length).
        k: 1 .. 2048, indices a row.
        starts: int32 [R], the window's first column; None for 0. Windows are cut to 0 .. C.
        relative: count from the window's first column.
        block_table: int32 [B, W] with R a multiple of B, row i belonging to sequence i // (R / B).
            An index p then becomes the cache slot block_table[b, p // block_kv] * block_kv + p %
            block_kv, or -1 where the table has no such entry or a negative one.
        block_kv: rows of a cache page, 16, 32, 64 or 128.
        out: int32 [R, k] to write, contiguous.

    Returns:
        int32 [R, k]: columns in ascending order (mapped ones in the order of what they are mapped
        from), then -1.
    """
    args = (logits, starts, ends, k, relative, block_table, block_kv)
    if not torch.compiler.is_compiling():
        _check_topk(*args)
    _check.require_no_grad("indexer_topk", logits=logits, out=out)
    if out is None:
        return torch.ops.sm120.indexer_topk.default(*args)
    torch.ops.sm120.indexer_topk.out(*args, out=out)
    return out


# ---- mqa_cache_write -----------------------------------------------------------------------------


def _check_cache_write(
    k: torch.Tensor, slots: torch.Tensor, kv_cache: torch.Tensor, format: str
) -> int:
    """Gives the block size."""
    op = "mqa_cache_write"
    _check.require_choice(op, "format", format, FORMATS)
    _check.require_tensor(op, "k", k, rank=2)
    _check.require_dtype(op, "k", k, (torch.bfloat16,))
    rows, dim = k.shape
    _check.require(dim in HEAD_DIMS, op, "k", f"D to be one of {list(HEAD_DIMS)}", f"D={dim}")
    if k.stride(1) != 1 or (k.stride(0) % 8 != 0 and rows > 1):
        requirement = "stride(1) == 1 and a row stride that is a multiple of 8"
        _check.fail(op, "k", requirement, f"strides {list(k.stride())}")
    _check.require_aligned(op, "k", k)
    _check.require_tensor(op, "slots", slots)
    _check.require_dtype(op, "slots", slots, SLOT_DTYPES)
    require_shape(op, "slots", slots, (rows,))
    if not slots.is_contiguous():
        _check.fail(op, "slots", "a contiguous tensor", f"strides {list(slots.stride())}")
    block_kv = check_cache(op, kv_cache, dim if format == "mxfp8" else dim // 2)
    _check.require_same_device(op, "k", k=k, slots=slots, kv_cache=kv_cache)
    _check.require_no_overlap(op, "kv_cache", kv_cache, k=k, slots=slots)
    return block_kv


@torch.library.register_fake("sm120::mqa_cache_write", lib=_lib)
def _cache_write_fake(
    k: torch.Tensor, slots: torch.Tensor, kv_cache: torch.Tensor, format: str
) -> None:
    _check_cache_write(k, slots, kv_cache, format)


@torch.library.impl(_lib, "mqa_cache_write", "CPU")
def _cache_write_cpu(
    k: torch.Tensor, slots: torch.Tensor, kv_cache: torch.Tensor, format: str
) -> None:
    block_kv = _check_cache_write(k, slots, kv_cache, format)
    data, words = torch.ops.sm120.quantize.default(k, format, 128 if format == "mxfp8" else 32)
    if format == "mxfp8":
        words = torch.ops.sm120.unpack_scales.default(words, 1, torch.float32)
    data, scale = data.view(torch.uint8), fresh(words).view(torch.uint8)
    width = data.shape[1]
    kept = (slots >= 0) & (slots < kv_cache.shape[0] * block_kv)
    block, row = (slots[kept] // block_kv).long(), (slots[kept] % block_kv).long()
    pages = kv_cache.flatten(1)
    columns = row[:, None] * width + torch.arange(width)
    pages[block[:, None], columns] = data[kept]
    columns = block_kv * width + row[:, None] * 4 + torch.arange(4)
    pages[block[:, None], columns] = scale[kept]


def mqa_cache_write(
    k: torch.Tensor, slots: torch.Tensor, kv_cache: torch.Tensor, format: str = "mxfp8"
) -> None:
    """Quantises rows of keys and stores them with their scales in a paged cache.

    Args:
        k: bfloat16 [T, D], D 32, 64 or 128; rows at multiples of 16 bytes.
        slots: int32 or int64 [T]: row i goes to row slots[i] % block_kv of page slots[i] //
            block_kv. A slot of -1, or any other that is not in the cache, is skipped. Of rows with
            the same slot, any one may be kept.
        kv_cache: uint8 [num_blocks, block_kv, 1, W + 4] as in paged_mqa_logits(); written in place.
        format: "mxfp8" or "mxfp4". See the head of the file for the scales.
    """
    if not torch.compiler.is_compiling():
        _check_cache_write(k, slots, kv_cache, format)
    _check.require_no_grad("mqa_cache_write", k=k)
    torch.ops.sm120.mqa_cache_write.default(k, slots, kv_cache, format)
