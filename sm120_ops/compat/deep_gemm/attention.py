"""MQA logits of a sparse-attention indexer by DeepGEMM's names.

The two generations of the API differ in what follows the tensors, and the engines use both:

    2.5    ..., clean_logits=True, max_seqlen_k=0, logits_dtype=float32)
    2.8    ..., max_seqlen_k, schedule_meta=None)            never cleaned

A bool stands for clean_logits and an int for max_seqlen_k; paged, a tensor in the place of
clean_logits is `indices`.
"""

from __future__ import annotations

import torch

from ... import _check
from ..._stats import count
from ...ops.layout import FP4_DTYPES, as_bytes
from ...ops.mqa_check import MAX_NEXT_N
from ...ops.mqa_reference import row_lengths

Quantised = tuple[torch.Tensor, torch.Tensor | None]

_mqa = torch.ops.sm120.mqa_logits.default
_paged = torch.ops.sm120.paged_mqa_logits.default
_metadata = torch.ops.sm120.paged_mqa_metadata.default


def _data(data: torch.Tensor) -> torch.Tensor:
    return as_bytes(data) if data.dtype in FP4_DTYPES else data


def fp8_fp4_mqa_logits(
    q: Quantised,
    kv: tuple[torch.Tensor, torch.Tensor],
    weights: torch.Tensor,
    cu_seq_len_k_start: torch.Tensor,
    cu_seq_len_k_end: torch.Tensor,
    clean_logits: bool | int = True,
    max_seqlen_k: int | None = 0,
    logits_dtype: torch.dtype = torch.float32,
    schedule_meta: torch.Tensor | None = None,
) -> torch.Tensor:
    """logits[i, j] = scale_k[j] * sum over h of relu(q[i, h] . k[j]) * weights[i, h].

    Args:
        q: (FP8 [S, H, D], None), or FP4 (int8 [S, H, D / 2], int32 [S, H]).
        kv: (FP8 [SKV, D], float32 [SKV] or [SKV, 1]), or FP4 (int8 [SKV, D / 2], int32 [SKV]).
        weights: float32 [S, H].
        cu_seq_len_k_start, cu_seq_len_k_end: int32 [S], the window of keys of each row.
        clean_logits: -inf outside of the windows. An int is max_seqlen_k, see above.
        max_seqlen_k: gives [S, max_seqlen_k], each row beginning at its first key; 0: [S, SKV].
        logits_dtype: float32 or bfloat16.
        schedule_meta: without effect: the kernel makes its own.
    """
    count("deep_gemm.fp8_fp4_mqa_logits")
    if type(clean_logits) is not bool:
        max_seqlen_k, clean_logits = clean_logits, False
    _check.require_no_grad("deep_gemm.fp8_fp4_mqa_logits", weights=weights)
    (q_data, q_scale), (k_data, k_scale) = q, kv
    return _mqa(
        _data(q_data),
        q_scale,
        _data(k_data),
        k_scale.flatten(),
        weights,
        cu_seq_len_k_start,
        cu_seq_len_k_end,
        max_seqlen_k,
        clean_logits,
        logits_dtype,
    )


def fp8_mqa_logits(
    q: torch.Tensor,
    kv: tuple[torch.Tensor, torch.Tensor],
    weights: torch.Tensor,
    cu_seq_len_k_start: torch.Tensor,
    cu_seq_len_k_end: torch.Tensor,
    clean_logits: bool = True,
    max_seqlen_k: int = 0,
) -> torch.Tensor:
    """fp8_fp4_mqa_logits() of FP8 queries [S, H, D], float32 logits."""
    return fp8_fp4_mqa_logits(
        (q, None), kv, weights, cu_seq_len_k_start, cu_seq_len_k_end, clean_logits, max_seqlen_k
    )


def get_paged_mqa_logits_metadata(
    context_lens: torch.Tensor,
    block_kv: int,
    num_sms: int,
    indices: torch.Tensor | None = None,
) -> torch.Tensor:
    """The schedule that the paged logits take: int32 [num_sms + 1, 2].

    Args:
        context_lens: int32 [B, next_n] or [B].
        block_kv: without effect: work is dealt out in units of 128 keys.
        num_sms: usually get_num_sms().
        indices: as in fp8_fp4_paged_mqa_logits().
    """
    count("deep_gemm.get_paged_mqa_logits_metadata")
    return _metadata(context_lens, num_sms, indices)


def fp8_fp4_paged_mqa_logits(
    q: Quantised,
    kv_cache: torch.Tensor,
    weights: torch.Tensor,
    context_lens: torch.Tensor,
    block_table: torch.Tensor,
    schedule_meta: torch.Tensor | None,
    max_context_len: int,
    clean_logits: bool | torch.Tensor | None = False,
    logits_dtype: torch.dtype = torch.float32,
    indices: torch.Tensor | None = None,
) -> torch.Tensor:
    """The logits of each sequence's next_n rows against its keys in a paged cache.

    Args:
        q: (FP8 [B, next_n, H, D], None), or FP4 (int8 [B, next_n, H, D / 2], int32 [B, next_n, H]).
            More than 8 rows a sequence cost a schedule and a block table of their own in each call.
        kv_cache: uint8 [blocks, block_kv, 1, D + 4] (FP4: D / 2 + 4); in a page first all data,
            then all scales.
        weights: float32 [B * next_n, H].
        context_lens: int32 [B, next_n], the keys that each row sees.
        block_table: int32 [B, blocks a sequence].
        schedule_meta: from get_paged_mqa_logits_metadata().
        max_context_len: columns of the logits.
        clean_logits: -inf past a row's keys, else anything. A tensor is `indices`, see above.
        logits_dtype: float32 or bfloat16.
        indices: with next_n 1, int32 [B], the sequence of each row.
    """
    count("deep_gemm.fp8_fp4_paged_mqa_logits")
    if type(clean_logits) is not bool:
        indices, clean_logits = clean_logits, False
    _check.require_no_grad("deep_gemm.fp8_fp4_paged_mqa_logits", weights=weights)
    q_data, q_scale = q
    if q_data.shape[1] > MAX_NEXT_N:
        next_n = q_data.shape[1]
        q_data = q_data.flatten(0, 1)[:, None]
        q_scale = None if q_scale is None else q_scale.flatten(0, 1)[:, None]
        context_lens = row_lengths(context_lens, next_n)[:, None]
        sequences = torch.arange(block_table.shape[0], dtype=torch.int32, device=q_data.device)
        indices = sequences.repeat_interleave(next_n)
        block_table = block_table.repeat_interleave(next_n, 0)
        if schedule_meta is not None:
            schedule_meta = _metadata(context_lens, schedule_meta.shape[0] - 1, indices)
    return _paged(
        _data(q_data),
        q_scale,
        kv_cache,
        weights,
        context_lens,
        block_table,
        max_context_len,
        schedule_meta,
        indices,
        clean_logits,
        logits_dtype,
    )


def fp8_paged_mqa_logits(
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    weights: torch.Tensor,
    context_lens: torch.Tensor,
    block_table: torch.Tensor,
    schedule_meta: torch.Tensor | None,
    max_context_len: int,
    clean_logits: bool = False,
    indices: torch.Tensor | None = None,
) -> torch.Tensor:
    """fp8_fp4_paged_mqa_logits() of FP8 queries [B, next_n, H, D], float32 logits."""
    return fp8_fp4_paged_mqa_logits(
        (q, None),
        kv_cache,
        weights,
        context_lens,
        block_table,
        schedule_meta,
        max_context_len,
        clean_logits,
        indices=indices,
    )
