"""Other libraries' GEMMs in the same run: cuBLAS through torch, and Triton's tl.dot_scaled.

A peer that does not take a shape or a GPU gives a line that says so; it never stops the run.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from sm120_ops.bench.record import Line, gemm_bytes, gemm_flops

if TYPE_CHECKING:
    from sm120_ops.bench.context import Context
    from sm120_ops.bench.gemm import Case, Inputs

E4M3_MAX = 448.0


def of_shape(context: Context, case: Case, inputs: Inputs) -> Iterator[Line]:
    """cuBLAS in BF16, and in FP8 with one FP32 scale a tensor or a row. Once for each shape."""
    out = torch.empty_like(inputs.product)
    yield context.time_peer(
        lambda: torch.matmul(inputs.x, inputs.w.T, out=out),
        family="gemm",
        name="bf16",
        shape=case.label,
        provider="torch.matmul",
        flops=gemm_flops(*case.shape),
        bytes=gemm_bytes(*case.shape, ("bf16", "bf16"), (0, 0)),
        weight_bytes=inputs.w.nbytes,
    )
    if not hasattr(torch, "_scaled_mm"):
        return
    for name, dim in (("fp8 tensorwise", None), ("fp8 rowwise", 1)):
        (a, scale_a), (b, scale_b) = (_quantize_fp32_scale(t, dim) for t in (inputs.x, inputs.w))
        # torch wants B column-major, which w [N, K] transposed is, and its row scales as [1, N].
        b, scale_b = b.T, scale_b.T if dim else scale_b

        def call(
            a: torch.Tensor = a,
            b: torch.Tensor = b,
            scale_a: torch.Tensor = scale_a,
            scale_b: torch.Tensor = scale_b,
        ) -> torch.Tensor:
            return torch._scaled_mm(
                a, b, scale_a, scale_b, out_dtype=torch.bfloat16, use_fast_accum=True
            )

        yield context.time_peer(
            call,
            family="gemm",
            name=name,
            shape=case.label,
            provider="torch._scaled_mm",
            flops=gemm_flops(*case.shape),
            bytes=a.nbytes + b.nbytes + scale_a.nbytes + scale_b.nbytes + out.nbytes,
            weight_bytes=b.nbytes,
        )


def _quantize_fp32_scale(x: torch.Tensor, dim: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """FP8 data and its FP32 scale, one for the tensor (``dim=None``) or for each row."""
    amax = x.float().abs().max() if dim is None else x.float().abs().amax(dim, keepdim=True)
    scale = amax.clamp(min=1e-4) / E4M3_MAX
    return (x.float() / scale).to(torch.float8_e4m3fn), scale


def of_format(context: Context, case: Case, inputs: Inputs) -> Iterator[Line]:
    """Triton's block-scaled product, for the formats it shares: one scale per 32 of K."""
    if case.grans != (32, 32):
        return
    try:
        from sm120_ops.bench import triton_peer
    except ImportError:  # triton is an optional peer
        return
    M, _, K = case.shape
    out = torch.full_like(inputs.product, float("nan"))
    operands = []
    for x, fmt in ((inputs.x, case.formats[0]), (inputs.w, case.formats[1])):
        data, packed = torch.ops.sm120.quantize(x, fmt, 32)
        operands += [data, torch.ops.sm120.unpack_scales(packed, K // 32, torch.uint8)]
    a, sfa, b, sfb = operands
    line = context.time_peer(
        lambda: triton_peer.gemm(a, sfa, b, sfb, out),
        family="gemm",
        name=case.name,
        shape=case.label,
        provider="triton dot_scaled",
        flops=gemm_flops(*case.shape),
        bytes=gemm_bytes(*case.shape, case.formats, case.grans),
        weight_bytes=b.nbytes,
    )
    if line.us is not None:
        from sm120_ops.bench.gemm import calc_diff

        line.diff = calc_diff(out[:M], inputs.product)
    yield line
