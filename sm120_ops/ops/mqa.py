"""MQA logits of a sparse-attention indexer, on FP8 or FP4 queries and keys.

    logit[i, j] = scale_k[j] * sum over heads h of relu(q[i, h] . k[j]) * weights[i, h]

for the keys j of row i's window. FP8: q and k are E4M3, scale_k is a float32 a key, and q's scale
is folded into the weights by the caller. FP4: q and k are MXFP4, dequantised by their own scales
(groups of 32, one packed word a row of D <= 128), and scale_k is 1. H, the number of heads, is 8,
16, 32, 64 or 128, and D is 32, 64 or 128. (Definition: the lightning indexer of DeepSeek-V3.2;
layouts as in DeepGEMM.)

Windows never make a read out of bounds. Ragged: [starts[i], ends[i]), cut to [0, SKV); one that is
empty or inverted after that gives an empty row. Paged: a row of length n sees keys 0 .. n - 1;
lengths are cut to 0 .. min(max_context_len, block_table width * block_kv). A key whose block-table
entry names no block of the cache has the logit -inf.

The CPU kernels sum in float64 and round once to float32, and from there to bfloat16.
"""

from __future__ import annotations

import torch

from .. import _check
from .layout import FP4_DTYPES, TAGS, as_bytes
from .library import Library
from .mqa_check import (
    MAX_CTAS,
    OUT_DTYPES,
    check_lens,
    check_metadata,
    check_out,
    check_paged,
    check_ragged,
)
from .mqa_reference import paged_into, ragged_into, schedule_into

Quantised = torch.Tensor | tuple[torch.Tensor, torch.Tensor]

_lib = Library()
_RAGGED = (
    "Tensor q, Tensor? q_scale, Tensor k, Tensor k_scale, Tensor weights, Tensor starts,"
    " Tensor ends"
)
_PAGED = (
    "Tensor q, Tensor? q_scale, Tensor kv_cache, Tensor weights, Tensor context_lens,"
    " Tensor block_table"
)
_lib.define(
    f"mqa_logits({_RAGGED}, SymInt max_seqlen_k, bool clean, ScalarType out_dtype) -> Tensor",
    tags=TAGS,
)
_lib.define(
    f"mqa_logits.out({_RAGGED}, bool compressed, bool clean, *, Tensor(a!) out) -> ()", tags=TAGS
)
_lib.define(
    f"paged_mqa_logits({_PAGED}, SymInt max_context_len, Tensor? metadata, Tensor? indices,"
    " bool clean, ScalarType out_dtype) -> Tensor",
    tags=TAGS,
)
_lib.define(
    f"paged_mqa_logits.out({_PAGED}, Tensor? metadata, Tensor? indices, bool clean, *,"
    " Tensor(a!) out) -> ()",
    tags=TAGS,
)
_lib.define(
    "paged_mqa_metadata(Tensor context_lens, int num_ctas, Tensor? indices=None) -> Tensor",
    tags=TAGS,
)
_lib.define(
    "paged_mqa_metadata.out(Tensor context_lens, Tensor? indices=None, *, Tensor(a!) out) -> ()",
    tags=TAGS,
)


# ---- Kernels -------------------------------------------------------------------------------------


def _check_ragged(
    q: torch.Tensor,
    q_scale: torch.Tensor | None,
    k: torch.Tensor,
    k_scale: torch.Tensor,
    weights: torch.Tensor,
    starts: torch.Tensor,
    ends: torch.Tensor,
    max_seqlen_k: int = 0,
    out_dtype: torch.dtype = torch.float32,
) -> tuple[int, int]:
    """Gives the shape of new logits."""
    check_ragged(q, q_scale, k, k_scale, weights, starts, ends)
    _check.require_choice("mqa_logits", "out_dtype", out_dtype, OUT_DTYPES)
    requirement = "a width >= 1, or 0 for logits of all keys"
    _check.require(max_seqlen_k >= 0, "mqa_logits", "max_seqlen_k", requirement, max_seqlen_k)
    return q.shape[0], max_seqlen_k if max_seqlen_k > 0 else k.shape[0]


def _check_ragged_out(
    out: torch.Tensor,
    q: torch.Tensor,
    q_scale: torch.Tensor | None,
    k: torch.Tensor,
    k_scale: torch.Tensor,
    weights: torch.Tensor,
    starts: torch.Tensor,
    ends: torch.Tensor,
    compressed: bool,
) -> None:
    check_out(
        "mqa_logits", out, q.shape[0], None if compressed else k.shape[0], q=q, q_scale=q_scale,
        k=k, k_scale=k_scale, weights=weights, starts=starts, ends=ends,
    )  # fmt: skip


def _ragged_into(
    out: torch.Tensor,
    q: torch.Tensor,
    q_scale: torch.Tensor | None,
    k: torch.Tensor,
    k_scale: torch.Tensor,
    weights: torch.Tensor,
    starts: torch.Tensor,
    ends: torch.Tensor,
    clean: bool,
    max_seqlen_k: int = 0,  # of the allocating form
    compressed: bool = False,  # of the `out` form
) -> None:
    ragged_into(
        out, q, q_scale, k, k_scale, weights, starts, ends, compressed or max_seqlen_k > 0, clean
    )


_lib.reference(
    "mqa_logits", check=_check_ragged, check_out=_check_ragged_out, into=_ragged_into, clear=True
)


def _check_paged(
    q: torch.Tensor,
    q_scale: torch.Tensor | None,
    kv_cache: torch.Tensor,
    weights: torch.Tensor,
    context_lens: torch.Tensor,
    block_table: torch.Tensor,
    metadata: torch.Tensor | None,
    indices: torch.Tensor | None,
    max_context_len: int = 0,
    out_dtype: torch.dtype = torch.float32,
) -> tuple[int, int]:
    """Gives the shape of new logits."""
    op = "paged_mqa_logits"
    check_paged(q, q_scale, kv_cache, weights, context_lens, block_table, metadata, indices)
    _check.require_choice(op, "out_dtype", out_dtype, OUT_DTYPES)
    _check.require(max_context_len >= 0, op, "max_context_len", "a width >= 0", max_context_len)
    return q.shape[0] * q.shape[1], max_context_len


def _check_paged_out(
    out: torch.Tensor,
    q: torch.Tensor,
    q_scale: torch.Tensor | None,
    kv_cache: torch.Tensor,
    weights: torch.Tensor,
    context_lens: torch.Tensor,
    block_table: torch.Tensor,
    metadata: torch.Tensor | None,
    indices: torch.Tensor | None,
) -> None:
    check_out(
        "paged_mqa_logits", out, q.shape[0] * q.shape[1], None, q=q, q_scale=q_scale,
        kv_cache=kv_cache, weights=weights, context_lens=context_lens, block_table=block_table,
        metadata=metadata, indices=indices,
    )  # fmt: skip


def _paged_into(
    out: torch.Tensor,
    q: torch.Tensor,
    q_scale: torch.Tensor | None,
    kv_cache: torch.Tensor,
    weights: torch.Tensor,
    context_lens: torch.Tensor,
    block_table: torch.Tensor,
    clean: bool,
) -> None:
    paged_into(out, q, q_scale, kv_cache, weights, context_lens, block_table, clean)


_lib.reference(
    "paged_mqa_logits", check=_check_paged, check_out=_check_paged_out, into=_paged_into, clear=True
)


def _check_schedule(
    context_lens: torch.Tensor, indices: torch.Tensor | None, num_ctas: int = 1
) -> tuple[int, int]:
    """Gives the shape of a new schedule."""
    op = "paged_mqa_metadata"
    check_lens(op, context_lens, indices, None)
    requirement = f"a CTA count in 1 .. {MAX_CTAS}"
    _check.require(1 <= num_ctas <= MAX_CTAS, op, "num_ctas", requirement, num_ctas)
    return num_ctas + 1, 2


def _check_schedule_out(
    out: torch.Tensor, context_lens: torch.Tensor, indices: torch.Tensor | None
) -> None:
    op = "paged_mqa_metadata"
    check_metadata(op, "out", out)
    _check.require_same_device(op, "out", out=out, context_lens=context_lens)
    _check.require_no_overlap(op, "out", out, context_lens=context_lens, indices=indices)


def _schedule_into(
    out: torch.Tensor, context_lens: torch.Tensor, indices: torch.Tensor | None
) -> None:
    schedule_into(out, context_lens, indices)


_lib.reference(
    "paged_mqa_metadata",
    check=_check_schedule,
    check_out=_check_schedule_out,
    new=lambda context_lens, shape: context_lens.new_empty(shape),
    into=_schedule_into,
)


# ---- Wrappers ------------------------------------------------------------------------------------


def _pair(op: str, arg: str, value: Quantised) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(data, scale or None) of an operand given as data or as a pair; FP4 data as uint8."""
    data, scale = value if isinstance(value, tuple | list) and len(value) == 2 else (value, None)
    _check.require_tensor(op, arg, data)
    if scale is not None:
        _check.require_tensor(op, f"{arg}_scale", scale)
    return (as_bytes(data) if data.dtype in FP4_DTYPES else data), scale


def mqa_logits(
    q: Quantised,
    k: Quantised,
    weights: torch.Tensor,
    starts: torch.Tensor,
    ends: torch.Tensor,
    *,
    max_seqlen_k: int = 0,
    clean: bool = True,
    out_dtype: torch.dtype | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Ragged MQA logits: row i against the keys starts[i] .. ends[i] - 1. See the head of the file.

    Args:
        q: FP8, float8_e4m3fn [S, H, D] alone; FP4, a pair of packed [S, H, D / 2] and scales int32
            [S, H], one word of four UE8M0 bytes (groups of 32) a head. Contiguous.
        k: a pair. FP8 [SKV, D] and float32 scales [SKV]; FP4 [SKV, D / 2] and int32 [SKV]. Rows at
            multiples of 16 bytes.
        weights: float32 [S, H], any row stride.
        starts, ends: int32 [S]. A window is cut to 0 .. SKV; an empty one gives an empty row.
        max_seqlen_k: 0 gives logits [S, SKV]. Otherwise [S, max_seqlen_k], compressed: column 0 is
            the row's first key, longer windows are cut, and what is past the window is -inf.
        clean: fill columns outside the window with -inf, in the same kernel. Otherwise they keep
            what `out` had, and are arbitrary in a new tensor. Compressed logits are always clean.
        out_dtype: float32 (default) or bfloat16.
        out: logits to write, stride(1) == 1, any row stride.
    """
    op = "mqa_logits"
    (q_data, q_scale), (k_data, k_scale) = _pair(op, "q", q), _pair(op, "k", k)
    if k_scale is None:
        _check.fail_type(op, "k", "a pair (data, scale)", type(k).__name__)
    _check.require_no_grad(op, weights=weights)
    _check.require_number(op, "max_seqlen_k", max_seqlen_k, integer=True)
    dtype = _check.output_dtype(op, out_dtype, out, OUT_DTYPES, default=torch.float32)
    args = (q_data, q_scale, k_data, k_scale, weights, starts, ends)
    if not torch.compiler.is_compiling():
        check_ragged(*args)
    if out is None:
        return torch.ops.sm120.mqa_logits.default(*args, max_seqlen_k, clean, dtype)
    if max_seqlen_k > 0 and out.shape[1] != max_seqlen_k:
        _check.fail(op, "out", f"{max_seqlen_k} columns (max_seqlen_k)", out.shape)
    torch.ops.sm120.mqa_logits.out(*args, max_seqlen_k > 0, clean, out=out)
    return out


def paged_mqa_logits(
    q: Quantised,
    kv_cache: torch.Tensor,
    weights: torch.Tensor,
    context_lens: torch.Tensor,
    block_table: torch.Tensor,
    max_context_len: int,
    *,
    metadata: torch.Tensor | None = None,
    indices: torch.Tensor | None = None,
    clean: bool = False,
    out_dtype: torch.dtype | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Paged MQA logits: the next_n rows of sequence b against its keys in a paged cache.

    Args:
        q: FP8, float8_e4m3fn [B, next_n, H, D] alone; FP4, a pair of packed [B, next_n, H, D / 2]
            and scales int32 [B, next_n, H]. next_n is 1 .. 8. Contiguous.
        kv_cache: uint8 [num_blocks, block_kv, 1, W + 4], W = D (FP8) or D / 2 (FP4) bytes. A page
            holds block_kv * W data bytes, then block_kv scales of 4 bytes: float32 (FP8) or packed
            UE8M0 (FP4). block_kv is 16, 32, 64 or 128; pages may be any multiple of 16 bytes apart.
        weights: float32 [B * next_n, H], any row stride.
        context_lens: int32 [B, next_n], the length of each row; or [B], that of a sequence's last
            row, every row before it seeing one key less. Cut to the range that can be read.
        block_table: int32 [B, W], any row stride; a key whose entry is no block has logit -inf.
        max_context_len: columns of the logits; longer contexts are cut.
        metadata: a schedule from paged_mqa_metadata() for the same lengths. Without it the kernel
            works the schedule out itself.
        indices: varlen, with next_n = 1: int32 [B], the sequence of each row. Neighbouring rows of
            one sequence, which must have the same block table as far as they see, share the cache's
            traffic; results do not depend on it.
        clean: fill the columns past a row's length with -inf. Otherwise they keep what `out` had,
            and are arbitrary in a new tensor.
        out_dtype: float32 (default) or bfloat16.
        out: logits [B * next_n, max_context_len] to write, stride(1) == 1, any row stride.
    """
    op = "paged_mqa_logits"
    q_data, q_scale = _pair(op, "q", q)
    _check.require_no_grad(op, weights=weights)
    _check.require_number(op, "max_context_len", max_context_len, integer=True)
    dtype = _check.output_dtype(op, out_dtype, out, OUT_DTYPES, default=torch.float32)
    args = (q_data, q_scale, kv_cache, weights, context_lens, block_table)
    if not torch.compiler.is_compiling():
        check_paged(*args, metadata, indices)
    if out is None:
        return torch.ops.sm120.paged_mqa_logits.default(
            *args, max_context_len, metadata, indices, clean, dtype
        )
    if out.shape[1] != max_context_len:
        _check.fail(op, "out", f"{max_context_len} columns (max_context_len)", out.shape)
    torch.ops.sm120.paged_mqa_logits.out(*args, metadata, indices, clean, out=out)
    return out


def paged_mqa_metadata(
    context_lens: torch.Tensor,
    num_ctas: int,
    indices: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """The schedule of paged_mqa_logits(): int32 [num_ctas + 1, 2].

    The sequences' tiles of 128 keys are laid end to end and cut into num_ctas equal ranges (to
    within one tile); entry c is the (sequence, tile) at which CTA c starts and CTA c - 1 ends.

    Args:
        context_lens: int32 [B] or [B, next_n], as in paged_mqa_logits().
        num_ctas: usually the GPU's number of SMs.
        indices: as in paged_mqa_logits().
        out: int32 [num_ctas + 1, 2] to write.
    """
    op = "paged_mqa_metadata"
    _check.require_number(op, "num_ctas", num_ctas, integer=True)
    if not torch.compiler.is_compiling():
        check_lens(op, context_lens, indices, None)
    if out is None:
        return torch.ops.sm120.paged_mqa_metadata.default(context_lens, num_ctas, indices)
    check_metadata(op, "out", out)
    if out.shape[0] != num_ctas + 1:
        _check.fail(op, "out", f"shape [{num_ctas + 1}, 2]", out.shape)
    torch.ops.sm120.paged_mqa_metadata.out(context_lens, indices, out=out)
    return out
