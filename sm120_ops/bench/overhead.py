"""Host time of a call: what a decode step pays for each op, however small the work is."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch

from sm120_ops.bench.record import Line, Mark
from sm120_ops.bench.timing import measure_host_us

if TYPE_CHECKING:
    from sm120_ops.bench.context import Context

HOST_TIME = Mark("us", "<=", 10, "us host")
M, N, K = 16, 128, 128  # far below a launch's own time on the GPU


def run(context: Context) -> Iterator[Line]:
    import sm120_ops

    x = torch.randn(M, K, device=context.device, dtype=torch.bfloat16)
    w = torch.randn(N, K, device=context.device, dtype=torch.bfloat16)
    a, sfa = torch.ops.sm120.quantize(x, "mxfp8", 128)
    b, sfb = torch.ops.sm120.quantize(w, "mxfp8", 128)
    out = torch.empty(M, N, device=context.device, dtype=torch.bfloat16)
    gemm, quantize = torch.ops.sm120.gemm, torch.ops.sm120.quantize
    operands = (a, sfa, b, sfb, 128, 128)
    calls: tuple[tuple[str, str, Callable[[], object], Mark | None], ...] = (
        (
            "torch.ops.sm120.gemm.out",
            "sm120_ops",
            functools.partial(gemm.out, *operands, None, [], out=out),
            HOST_TIME,
        ),
        (
            "torch.ops.sm120.gemm",
            "sm120_ops",
            functools.partial(gemm.default, *operands, torch.bfloat16),
            None,
        ),
        (
            "torch.ops.sm120.quantize.out",
            "sm120_ops",
            functools.partial(quantize.out, x, "mxfp8", 128, 1, "deepgemm", out=a, out_scale=sfa),
            HOST_TIME,
        ),
        (
            "sm120_ops.gemm (wrapper)",
            "sm120_ops",
            functools.partial(
                sm120_ops.gemm, (a, sfa), (b, sfb), gran_k_a=128, gran_k_b=128, out=out
            ),
            None,
        ),
        ("bf16 out=", "torch.matmul", functools.partial(torch.matmul, x, w.T, out=out), None),
    )
    with torch.no_grad():
        for name, provider, call, mark in calls:
            us = measure_host_us(call, context.device, quick=context.mode == "quick")
            yield context.judge(
                Line(
                    family="overhead",
                    name=name,
                    shape=f"{M}x{N}x{K}",
                    provider=provider,
                    us=us,
                    mark=mark,
                    note="host time per call",
                )
            )
