"""k-grouped GEMM, weight gradients of MoE experts: the shapes of DeepGEMM's test, both layouts.

Beside each line the same products as one dense call a group, on operands that are K-major and
scaled already: what packing and grouping cost or gain. Peer: a loop of torch.matmul in BF16.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from sm120_ops.bench.ceilings import atom_of
from sm120_ops.bench.record import Line, gemm_bytes, gemm_flops

if TYPE_CHECKING:
    from sm120_ops.bench.context import Context

Parts = list[tuple[torch.Tensor, torch.Tensor]]


class Shape(NamedTuple):
    groups: int
    M: int
    N: int
    k: int  # of a group, on average

    @property
    def ks(self) -> list[int]:
        """Sizes that differ by up to a third, multiples of 128, of the same sum."""
        third = self.k // 3 // 128 * 128
        return [self.k + third * (g % 3 - 1) for g in range(self.groups // 3 * 3)] + [self.k] * (
            self.groups % 3
        )

    @property
    def label(self) -> str:
        return f"G={self.groups} {self.M}x{self.N}x{self.k}"


SHAPES = {
    "quick": (Shape(8, 4096, 7168, 4096),),
    "standard": (Shape(4, 7168, 2048, 8192), Shape(8, 4096, 7168, 4096)),
    "full": (
        Shape(4, 4096, 7168, 8192), Shape(4, 7168, 2048, 8192), Shape(8, 4096, 7168, 4096),
        Shape(8, 7168, 2048, 4096), Shape(16, 4096, 7168, 2048), Shape(16, 7168, 2048, 2048),
        Shape(64, 2048, 4096, 256),
    ),
}  # fmt: skip
FORMATS = (
    (("mxfp8", "mxfp8"), (128, 128)),
    (("mxfp8", "mxfp8"), (32, 32)),
    (("mxfp4", "mxfp4"), (32, 32)),
    (("mxfp8", "mxfp4"), (32, 32)),
)


def joined(parts: Parts, layout: str) -> tuple[torch.Tensor, torch.Tensor]:
    """K-major groups -> data and scales as the op takes them."""
    scales = torch.cat([scale.t() for _, scale in parts])
    if layout == "nt":
        return torch.cat([data.view(torch.uint8).flatten() for data, _ in parts]).view(
            parts[0][0].dtype
        ), scales
    if parts[0][0].dtype == torch.float8_e4m3fn:
        columns = [data.view(torch.uint8).t() for data, _ in parts]
        return torch.cat(columns).view(torch.float8_e4m3fn), scales
    return torch.cat([torch.ops.sm120.transpose_fp4(data) for data, _ in parts]), scales


def dense_loop(a: Parts, b: Parts, grans: Sequence[int], out: torch.Tensor) -> None:
    for group, (left, right) in enumerate(zip(a, b, strict=True)):
        torch.ops.sm120.gemm.out(*left, *right, *grans, None, [], out=out[group])


def matmul_loop(x: list[torch.Tensor], w: list[torch.Tensor], out: torch.Tensor) -> None:
    for group, (left, right) in enumerate(zip(x, w, strict=True)):
        torch.matmul(left, right.t(), out=out[group])


def run(context: Context) -> Iterator[Line]:
    device = context.device
    for shape in SHAPES[context.mode]:
        generator = torch.Generator(device).manual_seed(shape.M)
        x, w = (
            [
                torch.randn(rows, k, device=device, generator=generator, dtype=torch.bfloat16)
                for k in shape.ks
            ]
            for rows in (shape.M, shape.N)
        )
        ks = torch.tensor(shape.ks, dtype=torch.int32, device=device)
        total = sum(shape.ks)
        fields: dict[str, Any] = {"family": "k_grouped", "shape": shape.label}
        fields["flops"] = gemm_flops(shape.M, shape.N, total)
        out = torch.empty(shape.groups, shape.M, shape.N, dtype=torch.bfloat16, device=device)
        for formats, grans in FORMATS:
            a, b = (
                [torch.ops.sm120.quantize(t, fmt, gran) for t in values]
                for values, fmt, gran in zip((x, w), formats, grans, strict=True)
            )
            size = gemm_bytes(shape.M, shape.N, total, formats, grans)
            size += (shape.groups - 1) * 2 * shape.M * shape.N
            name = f"{formats[0]}/{grans[0]} x {formats[1]}/{grans[1]}"
            common = fields | {"bytes": size, "atom": atom_of(formats, grans)}
            for layout in ("nt", "tn"):
                call = functools.partial(
                    torch.ops.sm120.k_grouped_gemm.out,
                    *joined(a, layout),
                    *joined(b, layout),
                    ks,
                    *grans,
                    None,
                    out=out,
                )
                yield context.time(call, name=f"{name} {layout}", provider="sm120_ops", **common)
            call = functools.partial(dense_loop, a, b, grans, out)
            yield context.time(call, name=name, provider="sm120_ops.gemm a group", **common)
        if context.with_peers:
            call = functools.partial(matmul_loop, x, w, out)
            yield context.time_peer(call, name="bf16", provider="torch.matmul a group", **fields)
