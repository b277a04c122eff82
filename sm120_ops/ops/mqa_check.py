"""Argument checks of the MQA family (mqa.py, indexer.py)."""

from __future__ import annotations

import torch

from .. import _check
from .layout import FP4_DTYPES

HEADS = (8, 16, 32, 64, 128)
HEAD_DIMS = (32, 64, 128)
BLOCK_SIZES = (16, 32, 64, 128)
MAX_NEXT_N = 8
MAX_CTAS = 65535
OUT_DTYPES = (torch.float32, torch.bfloat16)


def require_shape(op: str, arg: str, tensor: torch.Tensor, shape: tuple[int, ...]) -> None:
    if tensor.dim() != len(shape) or any(
        have != want for have, want in zip(tensor.shape, shape, strict=True)
    ):
        _check.fail(op, arg, f"shape {list(shape)}", tensor.shape)


def require_contiguous(op: str, arg: str, tensor: torch.Tensor) -> None:
    if not tensor.is_contiguous():
        _check.fail(op, arg, "a contiguous tensor", f"strides {list(tensor.stride())}")


def check_ints(op: str, arg: str, tensor: torch.Tensor, shape: tuple[int, ...]) -> None:
    _check.require_tensor(op, arg, tensor)
    _check.require_dtype(op, arg, tensor, (torch.int32,))
    require_shape(op, arg, tensor, shape)
    require_contiguous(op, arg, tensor)


def _check_q(
    op: str, q: torch.Tensor, q_scale: torch.Tensor | None, weights: torch.Tensor, rank: int
) -> tuple[int, int, bool]:
    """Checks q, its scales and the weights; gives H, D and whether they are FP4."""
    _check.require_tensor(op, "q", q, rank=rank)
    _check.require_dtype(op, "q", q, (torch.float8_e4m3fn, *FP4_DTYPES))
    fp4 = q.dtype != torch.float8_e4m3fn
    heads, dim = q.shape[-2], q.shape[-1] * (2 if fp4 else 1)
    _check.require(heads in HEADS, op, "q", f"H to be one of {list(HEADS)}", f"H={heads}")
    _check.require(dim in HEAD_DIMS, op, "q", f"D to be one of {list(HEAD_DIMS)}", f"D={dim}")
    require_contiguous(op, "q", q)
    _check.require_aligned(op, "q", q)
    if fp4:
        if q_scale is None:
            _check.fail_type(op, "q_scale", "packed UE8M0 scales, q being FP4", "None")
        check_ints(op, "q_scale", q_scale, tuple(q.shape[:-1]))
    elif q_scale is not None:
        _check.fail_type(op, "q_scale", "None, q being FP8 (fold it into the weights)", q_scale)
    rows = q.shape[0] if rank == 3 else q.shape[0] * q.shape[1]
    _check.require_tensor(op, "weights", weights)
    _check.require_dtype(op, "weights", weights, (torch.float32,))
    require_shape(op, "weights", weights, (rows, heads))
    if weights.stride(1) != 1:
        _check.fail(op, "weights", "stride(1) == 1", f"strides {list(weights.stride())}")
    return heads, dim, fp4


def check_ragged(
    q: torch.Tensor,
    q_scale: torch.Tensor | None,
    k: torch.Tensor,
    k_scale: torch.Tensor,
    weights: torch.Tensor,
    starts: torch.Tensor,
    ends: torch.Tensor,
) -> None:
    op = "mqa_logits"
    _, dim, fp4 = _check_q(op, q, q_scale, weights, 3)
    _check.require_tensor(op, "k", k, rank=2)
    _check.require_dtype(op, "k", k, FP4_DTYPES if fp4 else (torch.float8_e4m3fn,))
    width = dim // 2 if fp4 else dim
    require_shape(op, "k", k, (k.shape[0], width))
    row = k.stride(0)
    if k.stride(1) != 1 or ((row % 16 != 0 or row < width) and k.shape[0] > 1):
        requirement = f"K-major rows a multiple of 16 bytes >= {width} apart"
        _check.fail(op, "k", requirement, f"strides {list(k.stride())}")
    _check.require_aligned(op, "k", k)
    _check.require_tensor(op, "k_scale", k_scale)
    _check.require_dtype(op, "k_scale", k_scale, (torch.int32 if fp4 else torch.float32,))
    require_shape(op, "k_scale", k_scale, (k.shape[0],))
    require_contiguous(op, "k_scale", k_scale)
    _check.require_aligned(op, "k_scale", k_scale)
    check_ints(op, "starts", starts, (q.shape[0],))
    check_ints(op, "ends", ends, (q.shape[0],))
    _check.require_same_device(
        op, "q", q=q, q_scale=q_scale, k=k, k_scale=k_scale, weights=weights, starts=starts,
        ends=ends,
    )  # fmt: skip


def check_cache(op: str, kv_cache: torch.Tensor, width: int) -> int:
    """Checks a paged cache whose rows have `width` data bytes; gives its block size."""
    _check.require_tensor(op, "kv_cache", kv_cache, rank=4)
    _check.require_dtype(op, "kv_cache", kv_cache, (torch.uint8,))
    blocks, block_kv = kv_cache.shape[0], kv_cache.shape[1]
    requirement = f"block_kv (dimension 1) to be one of {list(BLOCK_SIZES)}"
    _check.require(block_kv in BLOCK_SIZES, op, "kv_cache", requirement, kv_cache.shape)
    require_shape(op, "kv_cache", kv_cache, (blocks, block_kv, 1, width + 4))
    page = block_kv * (width + 4)
    stride = kv_cache.stride()
    inner = stride[3] == 1 and stride[1] == width + 4
    if not inner or ((stride[0] % 16 != 0 or stride[0] < page) and blocks > 1):
        requirement = f"contiguous pages a multiple of 16 bytes >= {page} apart"
        _check.fail(op, "kv_cache", requirement, f"strides {list(stride)}")
    _check.require_aligned(op, "kv_cache", kv_cache)
    return block_kv


def check_lens(
    op: str, context_lens: torch.Tensor, indices: torch.Tensor | None, next_n: int | None
) -> None:
    _check.require_tensor(op, "context_lens", context_lens)
    if context_lens.dim() not in (1, 2):
        _check.fail(op, "context_lens", "shape [B] or [B, next_n]", context_lens.shape)
    batch = context_lens.shape[0]
    columns = tuple(context_lens.shape[1:])
    if next_n is not None and columns not in ((), (next_n,)):
        requirement = f"shape [{batch}] or [{batch}, {next_n}]"
        _check.fail(op, "context_lens", requirement, context_lens.shape)
    check_ints(op, "context_lens", context_lens, (batch, *columns))
    if indices is not None:
        check_ints(op, "indices", indices, (batch,))
        if columns not in ((), (1,)):
            _check.fail(op, "context_lens", "shape [B] or [B, 1] with indices", context_lens.shape)
    _check.require_same_device(op, "context_lens", context_lens=context_lens, indices=indices)


def check_metadata(op: str, arg: str, metadata: torch.Tensor) -> None:
    _check.require_tensor(op, arg, metadata, rank=2)
    _check.require_dtype(op, arg, metadata, (torch.int32,))
    if metadata.shape[1] != 2 or not 2 <= metadata.shape[0] <= MAX_CTAS + 1:
        _check.fail(op, arg, f"shape [num_ctas + 1, 2], num_ctas <= {MAX_CTAS}", metadata.shape)
    require_contiguous(op, arg, metadata)


def check_paged(
    q: torch.Tensor,
    q_scale: torch.Tensor | None,
    kv_cache: torch.Tensor,
    weights: torch.Tensor,
    context_lens: torch.Tensor,
    block_table: torch.Tensor,
    metadata: torch.Tensor | None,
    indices: torch.Tensor | None,
) -> None:
    op = "paged_mqa_logits"
    _, dim, fp4 = _check_q(op, q, q_scale, weights, 4)
    batch, next_n = q.shape[0], q.shape[1]
    most = 1 if indices is not None else MAX_NEXT_N
    requirement = f"next_n in 1 .. {most}" + (" with indices" if most == 1 else "")
    _check.require(1 <= next_n <= most, op, "q", requirement, f"next_n={next_n}")
    check_cache(op, kv_cache, dim // 2 if fp4 else dim)
    check_lens(op, context_lens, indices, next_n)
    if context_lens.shape[0] != batch:
        _check.fail(
            op, "context_lens", f"shape [{batch}] or [{batch}, {next_n}]", context_lens.shape
        )
    _check.require_tensor(op, "block_table", block_table, rank=2)
    _check.require_dtype(op, "block_table", block_table, (torch.int32,))
    require_shape(op, "block_table", block_table, (batch, block_table.shape[1]))
    if block_table.stride(1) != 1 and block_table.shape[1] > 1:
        _check.fail(op, "block_table", "stride(1) == 1", f"strides {list(block_table.stride())}")
    if metadata is not None:
        check_metadata(op, "metadata", metadata)
    _check.require_same_device(
        op, "q", q=q, q_scale=q_scale, kv_cache=kv_cache, weights=weights,
        context_lens=context_lens, block_table=block_table, metadata=metadata, indices=indices,
    )  # fmt: skip


def check_out(
    op: str, out: torch.Tensor, rows: int, columns: int | None, **inputs: torch.Tensor | None
) -> None:
    _check.require_tensor(op, "out", out, rank=2)
    _check.require_dtype(op, "out", out, OUT_DTYPES)
    columns = out.shape[1] if columns is None else columns
    require_shape(op, "out", out, (rows, columns))
    if out.stride(1) != 1 or (out.stride(0) < columns and rows > 1):
        requirement = f"stride(1) == 1 and a row stride >= {columns}"
        _check.fail(op, "out", requirement, f"strides {list(out.stride())}")
    _check.require_same_device(op, "out", out=out, **inputs)
    _check.require_no_overlap(op, "out", out, **inputs)
