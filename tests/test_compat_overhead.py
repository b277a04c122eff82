"""What DeepGEMM's names cost a call: the wrapper's own time, with the op under it taken out."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from sm120_ops.compat import deep_gemm
from sm120_ops.compat.deep_gemm import attention, bf16, gemm, grouped, hyperconnection, k_grouped

einsum = importlib.import_module("sm120_ops.compat.deep_gemm.einsum")  # the name is a function's
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


A, B, B1, B3 = packed(16), packed(128), packed(128, 1), packed(128, 4)
C, D = (torch.empty(16, 128, dtype=torch.bfloat16) for _ in range(2))
HEADS, D_HEADS = (A[0][:, None], A[1][:, None]), D[:, None]
D3 = torch.empty(4, 128, 128, dtype=torch.bfloat16)
X2, W = torch.empty(16, 512, dtype=torch.bfloat16), torch.empty(1, 128, 512, dtype=torch.bfloat16)
X_HEADS = X2[:, None]
FLAT = (
    torch.empty(4 * 128 * 512, dtype=torch.float8_e4m3fn),
    torch.zeros(4, 128, dtype=torch.int32),
)
W3 = torch.empty(4, 128, 512, dtype=torch.bfloat16)
FLAT_2D = torch.empty(2048, 128, dtype=torch.bfloat16)
KS, KS_TENSOR = [512] * 4, torch.full((4,), 512, dtype=torch.int32)
INDEX = torch.zeros(16, dtype=torch.int32)
X = torch.zeros(1)
Q = torch.zeros(2, 1, 16, 64)

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
    "fp8_gemm_nt with C": (
        gemm,
        "_gemm_out",
        lambda: deep_gemm.fp8_gemm_nt(A, B, D, C),
    ),
    "fp8_gemm_nt_skip_head_mid": (
        gemm,
        "_gemm_out",
        lambda: deep_gemm.fp8_gemm_nt_skip_head_mid(A, B, D, (64, 64, 0)),
    ),
    "bf16_gemm_nt": (
        bf16,
        "_gemm_out",
        lambda: deep_gemm.bf16_gemm_nt(X2, X2, D),
    ),
    "m_grouped_bf16_gemm_nt_contiguous": (
        bf16,
        "_contiguous_out",
        lambda: deep_gemm.m_grouped_bf16_gemm_nt_contiguous(X2, W3, D, INDEX),
    ),
    "m_grouped_bf16_gemm_nt_masked": (
        bf16,
        "_masked_out",
        lambda: deep_gemm.m_grouped_bf16_gemm_nt_masked(X2, W3, D, INDEX, 4),
    ),
    "k_grouped_bf16_gemm_tn_contiguous": (
        bf16,
        "_k_grouped_out",
        lambda: deep_gemm.k_grouped_bf16_gemm_tn_contiguous(FLAT_2D, FLAT_2D, D3, KS, KS_TENSOR),
    ),
    "k_grouped_fp8_gemm_nt_contiguous": (
        k_grouped,
        "_k_grouped_out",
        lambda: deep_gemm.k_grouped_fp8_gemm_nt_contiguous(FLAT, FLAT, D3, KS, KS_TENSOR, D3),
    ),
    "m_grouped_fp8_gemm_nt_contiguous, psum": (
        grouped,
        "_psum_out",
        lambda: deep_gemm.m_grouped_fp8_gemm_nt_contiguous(A, B3, D, INDEX, use_psum_layout=True),
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
    "fp8_einsum": (
        einsum,
        "_batched_gemm_out",
        lambda: deep_gemm.fp8_einsum("bhr,hdr->bhd", HEADS, B1, D_HEADS, recipe=(1, 1, 128)),
    ),
    "einsum": (
        einsum,
        "_bf16_batched_gemm_out",
        lambda: deep_gemm.einsum("bhr,hdr->bhd", X_HEADS, W, D_HEADS),
    ),
    "fp8_fp4_mqa_logits": (
        attention,
        "_mqa",
        lambda: deep_gemm.fp8_fp4_mqa_logits((X, None), (X, X), X, X, X, 512),
    ),
    "fp8_paged_mqa_logits": (
        attention,
        "_paged",
        lambda: deep_gemm.fp8_paged_mqa_logits(Q, X, X, X, X, X, 512, clean_logits=False),
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
    """Whole calls against the raw op, host time alone."""
    (a, sfa), (b, sfb) = ((x.cuda(), sf.t().contiguous().cuda().t()) for x, sf in (A, B))
    a3, b3 = (
        (x.cuda(), sf.transpose(1, 2).contiguous().cuda().transpose(1, 2))
        for x, sf in (packed(16, 4), B3)
    )
    x, w, fn = X2.cuda(), torch.zeros(128, 512, dtype=X2.dtype).cuda(), torch.zeros(24, 512).cuda()
    d, c, d3 = D.cuda(), C.cuda(), D.cuda().repeat(4, 1, 1)
    out, sums = torch.empty(16, 24).cuda(), torch.empty(16).cuda()
    counts = torch.zeros(4, dtype=torch.int32).cuda()
    ops = torch.ops.sm120
    pairs: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
        "fp8_gemm_nt": (
            lambda: ops.gemm.out(a, sfa, b, sfb, 128, 128, None, (), out=d),
            lambda: deep_gemm.fp8_gemm_nt((a, sfa), (b, sfb), d),
        ),
        "fp8_gemm_nt with C": (
            lambda: ops.gemm.out(a, sfa, b, sfb, 128, 128, c, (), out=d),
            lambda: deep_gemm.fp8_gemm_nt((a, sfa), (b, sfb), d, c),
        ),
        "bf16_gemm_nt": (
            lambda: ops.bf16_gemm.out(x, w, None, out=d),
            lambda: deep_gemm.bf16_gemm_nt(x, w, d),
        ),
        "fp8_m_grouped_gemm_nt_masked": (
            lambda: ops.grouped_gemm_masked.out(*a3, *b3, counts, 128, 128, 4, out=d3),
            lambda: deep_gemm.fp8_m_grouped_gemm_nt_masked(a3, b3, d3, counts, 4),
        ),
        "tf32_hc_prenorm_gemm": (
            lambda: ops.hc_prenorm.out(x, fn, None, None, d=out, sqr_sum=sums),
            lambda: deep_gemm.tf32_hc_prenorm_gemm(x, fn, out, sums),
        ),
    }
    for name, (raw, named) in pairs.items():
        times = []
        for function in (raw, named):
            times.append(best_us(function))
            torch.cuda.synchronize()
        print(f"{name}: raw op {times[0]:.2f} us, by DeepGEMM's name {times[1]:.2f} us")
        assert times[1] - times[0] <= LIMIT_US
