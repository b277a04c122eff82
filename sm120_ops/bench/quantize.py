"""Quantisation: BF16 in, data and packed scales out, measured in bytes a second."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch

from sm120_ops.bench.record import Line, Mark, quantize_bytes

if TYPE_CHECKING:
    from sm120_ops.bench.context import Context

COPY_LIKE = Mark("tbps", ">=", 2.8, "TB/s", gpu="H200")


class Case(NamedTuple):
    name: str
    format: str
    gran_k: int
    gran_mn: int = 1
    transposed: bool = False
    mark: Mark | None = None


CASES = (
    Case("mxfp8 gran 128 per token", "mxfp8", 128, mark=COPY_LIKE),
    Case("mxfp8 gran 32 per token", "mxfp8", 32, mark=COPY_LIKE),
    Case("mxfp4 gran 32 per token", "mxfp4", 32),
    Case("mxfp8 128x128 block", "mxfp8", 128, 128),
    Case("mxfp8 32x32 block", "mxfp8", 32, 32),
    Case("mxfp8 gran 32 transposed", "mxfp8", 32, transposed=True),
    Case("mxfp4 gran 32 transposed", "mxfp4", 32, transposed=True),
)
SHAPES = {
    "quick": ((8192, 7168),),
    "standard": ((8192, 7168),),
    "full": ((8192, 7168), (1, 7168), (128, 7168), (8192, 2880), (4096, 16384)),
}


def run(context: Context) -> Iterator[Line]:
    for M, K in SHAPES[context.mode]:
        x = torch.randn(M, K, device=context.device, dtype=torch.bfloat16)
        for case in CASES:
            # A transposed view has the same [M, K] shape, with rows instead of columns contiguous.
            source = x.T.contiguous().T if case.transposed else x
            data, scale = torch.ops.sm120.quantize(source, case.format, case.gran_k, case.gran_mn)
            call = functools.partial(
                torch.ops.sm120.quantize.out,
                source,
                case.format,
                case.gran_k,
                case.gran_mn,
                "deepgemm",
                out=data,
                out_scale=scale,
            )
            yield context.time(
                call,
                family="quantize",
                name=case.name,
                shape=f"{M}x{K}",
                provider="sm120_ops",
                bytes=quantize_bytes(M, K, case.format, case.gran_k),
                mark=case.mark if (M, K) == (8192, 7168) else None,
            )
