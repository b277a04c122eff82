"""Refusals of the MQA family say op, argument, requirement and what it got, on the CPU and CUDA."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from mqa_cases import make_paged, make_ragged
from reference import FP4, FP8

import sm120_ops

ops = torch.ops.sm120


def refused(
    op: str, arg: str, requirement: str, got: str, kind: type[Exception] = ValueError
) -> Any:
    """Expects an error of exactly this text; `...` stands for anything."""
    text = f"sm120_ops.{op}: {arg}: expected {requirement}, got {got}"
    return pytest.raises(kind, match="^" + re.escape(text).replace(re.escape("..."), ".*") + "$")


def ragged(device: torch.device, **change: Any) -> torch.Tensor:
    q, _, k, k_scale, weights, starts, ends = make_ragged(1, device, 5, 16, 64, 40, FP8).args
    args = {"q": q, "k": (k, k_scale), "weights": weights, "starts": starts, "ends": ends}
    return sm120_ops.mqa_logits(**(args | change))


def paged(device: torch.device, **change: Any) -> torch.Tensor:
    case = make_paged(2, device, [[20, 30], [5, 1]], 16, 64, 16, FP8, 40)
    q, _, kv_cache, weights, context_lens, block_table = case.args
    args = {
        "q": q, "kv_cache": kv_cache, "weights": weights, "context_lens": context_lens,
        "block_table": block_table, "max_context_len": 40,
    }  # fmt: skip
    return sm120_ops.paged_mqa_logits(**(args | change))


def test_queries(device: torch.device) -> None:
    def fp8(*shape: int) -> torch.Tensor:
        return torch.zeros(*shape, device=device).to(torch.float8_e4m3fn)

    op = "mqa_logits"
    with refused(op, "q", "H to be one of [8, 16, 32, 64, 128]", "H=12"):
        ragged(device, q=fp8(5, 12, 64))
    with refused(op, "q", "D to be one of [32, 64, 128]", "D=48"):
        ragged(device, q=fp8(5, 16, 48))
    with refused(op, "q", "3 dimensions", "[5, 64]"):
        ragged(device, q=fp8(5, 64))
    with refused(op, "q", "dtype torch.float8_e4m3fn, ...", "torch.float32", TypeError):
        ragged(device, q=torch.zeros(5, 16, 64, device=device))
    word = torch.zeros(5, 16, dtype=torch.int32, device=device)
    with refused(op, "q_scale", "None, q being FP8 (fold it into the weights)", "...", TypeError):
        ragged(device, q=(fp8(5, 16, 64), word))
    packed = torch.zeros(5, 16, 32, dtype=torch.uint8, device=device)
    with refused(op, "q_scale", "packed UE8M0 scales, q being FP4", "None", TypeError):
        ragged(device, q=packed)
    with refused(op, "weights", "shape [5, 16]", "[5, 8]"):
        ragged(device, weights=torch.zeros(5, 8, device=device))
    with refused(op, "weights", "dtype torch.float32", "torch.bfloat16", TypeError):
        ragged(device, weights=torch.zeros(5, 16, device=device, dtype=torch.bfloat16))
    paged_op = "paged_mqa_logits"
    with refused(paged_op, "q", "next_n in 1 .. 8", "next_n=9"):
        paged(device, q=fp8(2, 9, 16, 64), weights=torch.zeros(18, 16, device=device))


def test_keys_and_windows(device: torch.device) -> None:
    k = torch.zeros(40, 64, device=device).to(torch.float8_e4m3fn)
    scale = torch.ones(40, device=device)
    op = "mqa_logits"
    with refused(op, "k", "shape [40, 64]", "[40, 32]"):
        ragged(device, k=(k[:, :32].contiguous(), scale))
    with refused(op, "k", "dtype torch.float8_e4m3fn", "torch.uint8", TypeError):
        ragged(device, k=(k.view(torch.uint8), scale))
    with refused(op, "k", "a pair (data, scale)", "Tensor", TypeError):
        ragged(device, k=k)
    with refused(op, "k_scale", "shape [40]", "[39]"):
        ragged(device, k=(k, scale[:39]))
    with refused(op, "k_scale", "dtype torch.float32", "torch.int32", TypeError):
        ragged(device, k=(k, scale.int()))
    with refused(op, "starts", "shape [5]", "[4]"):
        ragged(device, starts=torch.zeros(4, dtype=torch.int32, device=device))
    with refused(op, "ends", "dtype torch.int32", "torch.int64", TypeError):
        ragged(device, ends=torch.zeros(5, dtype=torch.int64, device=device))
    with refused(op, "out", "13 columns (max_seqlen_k)", "[5, 12]"):
        ragged(device, max_seqlen_k=13, out=torch.zeros(5, 12, device=device))


def test_cache_lengths_and_table(device: torch.device) -> None:
    op = "paged_mqa_logits"
    cache = torch.zeros(9, 16, 1, 68, dtype=torch.uint8, device=device)
    sizes = "block_kv (dimension 1) to be one of [16, 32, 64, 128]"
    with refused(op, "kv_cache", sizes, "[9, 8, 1, 68]"):
        paged(device, kv_cache=cache[:, :8])
    with refused(op, "kv_cache", "shape [9, 16, 1, 68]", "[9, 16, 1, 64]"):
        paged(device, kv_cache=cache[..., :64].contiguous())
    with refused(op, "kv_cache", "dtype torch.uint8", "torch.int8", TypeError):
        paged(device, kv_cache=cache.view(torch.int8))
    ints = torch.zeros(2, 3, dtype=torch.int32, device=device)
    with refused(op, "context_lens", "shape [2] or [2, 2]", "[2, 3]"):
        paged(device, context_lens=ints)
    with refused(op, "block_table", "shape [2, 3]", "[1, 3]"):
        paged(device, block_table=ints[:1])
    with refused(op, "block_table", "dtype torch.int32", "torch.int64", TypeError):
        paged(device, block_table=ints.long())
    with refused(op, "max_context_len", "a width >= 0", "-1"):
        paged(device, max_context_len=-1)
    with refused(op, "metadata", "shape [num_ctas + 1, 2], num_ctas <= 65535", "[2, 3]"):
        paged(device, metadata=ints)
    with refused(op, "q", "next_n in 1 .. 1 with indices", "next_n=2"):
        paged(device, indices=ints[0, :2])


def test_metadata(device: torch.device) -> None:
    lens = torch.zeros(3, dtype=torch.int32, device=device)
    op = "paged_mqa_metadata"
    for ctas in (0, 65536):
        with refused(op, "num_ctas", "a CTA count in 1 .. 65535", str(ctas)):
            sm120_ops.paged_mqa_metadata(lens, ctas)
    with refused(op, "context_lens", "dtype torch.int32", "torch.int64", TypeError):
        sm120_ops.paged_mqa_metadata(lens.long(), 4)
    with refused(op, "out", "shape [5, 2]", "[4, 2]"):
        out = torch.zeros(4, 2, dtype=torch.int32, device=device)
        sm120_ops.paged_mqa_metadata(lens, 4, out=out)


def test_topk_and_cache_writer(device: torch.device) -> None:
    logits = torch.zeros(3, 50, device=device)
    ends = torch.full((3,), 50, dtype=torch.int32, device=device)
    with refused("indexer_topk", "k", "1 .. ...", "0"):
        sm120_ops.indexer_topk(logits, ends, 0)
    with refused("indexer_topk", "logits", "stride(1) == 1", "strides [1, 3]"):
        sm120_ops.indexer_topk(logits.t().contiguous().t(), ends, 8)
    k = torch.zeros(4, 64, dtype=torch.bfloat16, device=device)
    slots = torch.zeros(4, dtype=torch.int64, device=device)
    cache = torch.zeros(2, 16, 1, 68, dtype=torch.uint8, device=device)
    with refused("mqa_cache_write", "format", "'mxfp8' or 'mxfp4'", "'fp8'"):
        sm120_ops.mqa_cache_write(k, slots, cache, "fp8")
    with refused("mqa_cache_write", "k", "dtype torch.bfloat16", "torch.float32", TypeError):
        sm120_ops.mqa_cache_write(k.float(), slots, cache, "mxfp8")
    with refused("mqa_cache_write", "slots", "shape [4]", "[3]"):
        sm120_ops.mqa_cache_write(k, slots[:3], cache, "mxfp8")
    with refused("mqa_cache_write", "kv_cache", "shape [2, 16, 1, 36]", "[2, 16, 1, 68]"):
        sm120_ops.mqa_cache_write(k, slots, cache, "mxfp4")


@pytest.mark.gpu
@pytest.mark.parametrize("fmt", [FP8, FP4])
def test_the_cuda_key_refuses_by_itself(fmt: str) -> None:
    """The op called without its wrapper: C++ checks again."""
    device = torch.device("cuda")
    args = list(make_ragged(1, device, 5, 16, 64, 40, fmt).args)
    args[4] = args[4][:, :8]
    with pytest.raises((ValueError, RuntimeError), match=r"mqa_logits: weights: expected"):
        ops.mqa_logits(*args, 0, True, torch.float32)
