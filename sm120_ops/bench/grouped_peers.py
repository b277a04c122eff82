"""What else multiplies groups: torch, one expert at a time and grouped, and Triton's dot_scaled."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch

from sm120_ops.bench.peers import _quantize_fp32_scale
from sm120_ops.bench.record import Line, gemm_flops

if TYPE_CHECKING:
    from sm120_ops.bench.context import Context
    from sm120_ops.bench.grouped import Case, Tokens, Weights


def run(context: Context, case: Case, tokens: Tokens, weights: Weights) -> Iterator[Line]:
    """torch's peers work on FP8 or BF16 weights of the same shape, and get no padding segments."""
    # Every group starts at a multiple of 16 rows, as torch's grouped products ask for.
    padded = [-(-count // 16) * 16 for count in case.counts]
    x = torch.randn(sum(padded), case.K, device=context.device, dtype=torch.bfloat16)
    yield from _torch_fp8(context, case, x, padded)
    yield from _torch_bf16(context, case, x, padded)
    yield from _triton(context, case, tokens, weights)


def _line(
    context: Context,
    case: Case,
    call: Callable[[], object],
    provider: str,
    name: str,
    element_bytes: float,
) -> Line:
    fields: dict[str, Any] = {
        "family": "grouped",
        "name": name,
        "shape": case.label,
        "provider": provider,
        "flops": gemm_flops(sum(case.counts), case.N, case.K),
        "weight_bytes": int(len(case.hit) * case.N * case.K * element_bytes),
    }
    return context.time_peer(call, **fields)


def _ends(padded: list[int], device: torch.device) -> torch.Tensor:
    return torch.tensor(padded, device=device).cumsum(0).to(torch.int32)


def _torch_fp8(context: Context, case: Case, x: torch.Tensor, padded: list[int]) -> Iterator[Line]:
    data, scale = _quantize_fp32_scale(x, None)
    w = torch.zeros(len(padded), case.N, case.K, device=context.device, dtype=torch.float8_e4m3fn)
    one = torch.ones((), device=context.device)
    starts = [0, *itertools.accumulate(padded)]

    def loop() -> None:
        for expert in case.hit:
            part = data[starts[expert] : starts[expert + 1]]
            torch._scaled_mm(part, w[expert].t(), scale, one, out_dtype=torch.bfloat16)

    if hasattr(torch, "_scaled_mm"):
        yield _line(context, case, loop, "torch._scaled_mm, a loop", "fp8 tensorwise", 1)
    row_scale = torch.ones(len(x), device=context.device)
    column_scale = torch.ones(len(padded), case.N, device=context.device)
    ends = _ends(padded, context.device)

    def grouped() -> None:
        torch._scaled_grouped_mm(
            data, w.transpose(1, 2), row_scale, column_scale, offs=ends,
            out_dtype=torch.bfloat16, use_fast_accum=True,
        )  # fmt: skip

    if hasattr(torch, "_scaled_grouped_mm"):
        yield _line(context, case, grouped, "torch._scaled_grouped_mm", "fp8 rowwise", 1)


def _torch_bf16(context: Context, case: Case, x: torch.Tensor, padded: list[int]) -> Iterator[Line]:
    if not hasattr(torch, "_grouped_mm"):
        return
    w = torch.zeros(len(padded), case.N, case.K, device=context.device, dtype=torch.bfloat16)
    ends = _ends(padded, context.device)
    yield _line(
        context,
        case,
        lambda: torch._grouped_mm(x, w.transpose(1, 2), offs=ends),
        "torch._grouped_mm",
        "bf16",
        2,
    )


def _triton(context: Context, case: Case, tokens: Tokens, weights: Weights) -> Iterator[Line]:
    if case.grans != (32, 32) or case.alignment < 64:
        return
    try:
        from sm120_ops.bench import triton_peer
    except ImportError:  # triton is an optional peer
        return
    d = torch.zeros(len(tokens.x), case.N, device=context.device, dtype=torch.bfloat16)
    sfa = torch.ops.sm120.unpack_scales(tokens.scale, case.K // 32, torch.uint8)
    sfb = torch.stack(
        [torch.ops.sm120.unpack_scales(s, case.K // 32, torch.uint8) for s in weights.scale]
    )
    yield _line(
        context,
        case,
        lambda: triton_peer.grouped_gemm(tokens.data, sfa, weights.data, sfb, tokens.m_indices, d),
        "triton dot_scaled",
        case.title,
        0.5 if case.formats[1] == "mxfp4" else 1,
    )
