"""What DeepGEMM's names cost a call: the wrapper's own time, with the op under it taken out."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from sm120_ops.compat import deep_gemm
from sm120_ops.compat.deep_gemm import attention, gemm, grouped, hyperconnection

LIMIT_US = 5.0


def nothing(*args: Any, **options: Any) -> None:
    """In the place of the op."""


def best_us(function: Callable[[], Any]) -> float:
    """The best of many batches: a busy machine only ever adds."""
    best = float("inf")
    for _ in range(40):
        begin = time.perf_counter()
        for _ in range(100):
            function()
        best = min(best, time.perf_counter() - begin)
    return best / 100 * 1e6


def packed(rows: int, groups: int | None = None) -> Any:
    lead = () if groups is None else (groups,)
    data = torch.zeros(*lead, rows, 512, dtype=torch.uint8).view(torch.float8_e4m3fn)
    return data, torch.zeros(*lead, 1, rows, dtype=torch.int32).transpose(-1, -2)


A, B, B3 = packed(16), packed(128), packed(128, 4)
D = torch.empty(16, 128, dtype=torch.bfloat16)
INDEX = torch.zeros(16, dtype=torch.int32)
X = torch.zeros(1)

# name: (module, the op it binds, the call as the engines make it)
CALLS: dict[str, tuple[Any, str, Callable[[], Any]]] = {
    "fp8_gemm_nt": (
        gemm,
        "_gemm_out",
        lambda: deep_gemm.fp8_gemm_nt(A, B, D, disable_ue8m0_cast=False),
    ),
    "fp8_fp4_gemm_nt": (
        gemm,
        "_gemm_out",
        lambda: deep_gemm.fp8_fp4_gemm_nt(
            A, B, D, recipe_a=(1, 32), recipe_b=(1, 32), disable_ue8m0_cast=True
        ),
    ),
    "m_grouped_fp8_fp4_gemm_nt_contiguous": (
        grouped,
        "_contiguous_out",
        lambda: deep_gemm.m_grouped_fp8_fp4_gemm_nt_contiguous(
            A, B3, D, INDEX, use_psum_layout=False, recipe_a=(1, 128), recipe_b=(1, 32)
        ),
    ),
    "fp8_m_grouped_gemm_nt_masked": (
        grouped,
        "_masked_out",
        lambda: deep_gemm.fp8_m_grouped_gemm_nt_masked(B3, B3, D, INDEX, 4),
    ),
    "fp8_fp4_mqa_logits": (
        attention,
        "_mqa",
        lambda: deep_gemm.fp8_fp4_mqa_logits((X, None), (X, X), X, X, X, 512),
    ),
    "fp8_paged_mqa_logits": (
        attention,
        "_paged",
        lambda: deep_gemm.fp8_paged_mqa_logits(X, X, X, X, X, X, 512, clean_logits=False),
    ),
    "get_paged_mqa_logits_metadata": (
        attention,
        "_metadata",
        lambda: deep_gemm.get_paged_mqa_logits_metadata(X, 64, 132),
    ),
    "tf32_hc_prenorm_gemm": (
        hyperconnection,
        "_prenorm_out",
        lambda: deep_gemm.tf32_hc_prenorm_gemm(X, X, X, X, num_splits=4),
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_overhead(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    module, op, call = CALLS[name]
    monkeypatch.setattr(module, op, nothing)
    us = best_us(call)
    print(f"{name}: {us:.2f} us")
    assert us <= LIMIT_US


@pytest.mark.gpu
def test_overhead_on_the_gpu() -> None:
    """The whole call against the raw op, both with host time alone."""
    a, b = ((data.cuda(), sf.transpose(0, 1).contiguous().cuda().t()) for data, sf in (A, B))
    d = D.cuda()
    raw = torch.ops.sm120.gemm.out
    without = best_us(lambda: raw(*a, *b, 128, 128, None, (), out=d))
    torch.cuda.synchronize()
    with_name = best_us(lambda: deep_gemm.fp8_gemm_nt(a, b, d))
    torch.cuda.synchronize()
    print(f"raw op {without:.2f} us, deep_gemm.fp8_gemm_nt {with_name:.2f} us")
    assert with_name - without <= LIMIT_US
