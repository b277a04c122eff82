"""Dense block-scaled GEMM: the shapes of the design's table, and whole model sets with --full."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from sm120_ops.bench import peers
from sm120_ops.bench.ceilings import atom_of
from sm120_ops.bench.record import Line, Mark, gemm_bytes, gemm_flops

if TYPE_CHECKING:
    from sm120_ops.bench.context import Context

FP8_128 = ("mxfp8", 128, "mxfp8", 128)
FP8_32 = ("mxfp8", 32, "mxfp8", 32)
FP4 = ("mxfp4", 32, "mxfp4", 32)
W4A8 = ("mxfp8", 32, "mxfp4", 32)
W4A8_128 = ("mxfp8", 128, "mxfp4", 32)  # DeepSeek-V4's experts: activations per 128, weights per 32

WEIGHTS = Mark("weight_tbps", ">=", 2.8, "TB/s weights", gpu="H200")


@dataclasses.dataclass(frozen=True)
class Case:
    M: int
    N: int
    K: int
    operands: tuple[str, int, str, int]  # format and gran_k of A, then of B
    mark: Mark | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.M, self.N, self.K

    @property
    def label(self) -> str:
        return f"{self.M}x{self.N}x{self.K}"

    @property
    def formats(self) -> tuple[str, str]:
        return self.operands[0], self.operands[2]

    @property
    def grans(self) -> tuple[int, int]:
        return self.operands[1], self.operands[3]

    @property
    def name(self) -> str:
        a, gran_a, b, gran_b = self.operands
        return (
            f"{a} gran {gran_a}" if (a, gran_a) == (b, gran_b) else f"{a}/{gran_a} x {b}/{gran_b}"
        )


def _at_most(us: float) -> Mark:
    return Mark("us", "<=", us, "us", gpu="H200")


def _share(value: float) -> Mark:
    return Mark("ceiling_share", ">=", value, "% of atom")


TABLE = (
    *(Case(M, 7168, 16384, FP8_128, WEIGHTS) for M in (1, 2, 4, 8, 16)),
    Case(1, 2112, 7168, FP8_128, _at_most(12)),
    Case(128, 2112, 7168, FP8_128, _at_most(20)),
    Case(128, 7168, 2048, FP8_128, _at_most(15)),
    Case(4096, 7168, 16384, FP8_128, _share(0.80)),
    Case(4096, 7168, 16384, FP8_32, _share(0.75)),
    Case(4096, 7168, 16384, FP4, _share(0.75)),
    Case(4096, 7168, 16384, W4A8, _share(0.75)),
)
QUICK = tuple(case for case in TABLE if case.M not in (2, 4, 8))

# (N, K) of the dense layers of the models that these formats are served with.
MODEL_SETS = {
    "DeepSeek-V3": (
        (2112, 7168), (24576, 1536), (32768, 512), (7168, 16384), (4096, 7168), (7168, 2048),
        (576, 7168),
    ),
    "DeepSeek-V4-Flash": (
        (1536, 4096), (32768, 1024), (8192, 1024), (4096, 8192), (4096, 4096), (4096, 2048),
    ),
    "DeepSeek-V4.1 TP4": (
        (576, 5120), (1792, 5120), (5120, 1024), (4096, 1280), (5120, 288), (25600, 6144),
    ),
    "Qwen3.6-27B": ((14336, 5120), (5120, 6144), (34816, 5120), (5120, 17408)),
    "gpt-oss-120b": ((5760, 2880), (2880, 2880)),
}  # fmt: skip
FULL_M = (1, 2, 4, 8, 16, 32, 64, 128, 512, 2048, 4096, 8192)
FULL_OPERANDS = (FP8_128, FP8_32, FP4, W4A8_128)


def cases(mode: str) -> Iterator[Case]:
    if mode == "quick":
        yield from QUICK
        return
    yield from TABLE
    if mode == "full":
        listed = {(c.M, c.N, c.K, c.operands) for c in TABLE}
        for shapes in MODEL_SETS.values():
            for N, K in shapes:
                for M in FULL_M:
                    for operands in FULL_OPERANDS:
                        if (M, N, K, operands) not in listed:
                            yield Case(M, N, K, operands)


def calc_diff(got: torch.Tensor, want: torch.Tensor) -> float:
    """1 - 2<x,y> / (|x|^2 + |y|^2), as DeepGEMM's tests count it."""
    x, y = got.float(), want.float()
    total = (x * x).sum(dtype=torch.float64) + (y * y).sum(dtype=torch.float64)
    return (1 - 2 * (x * y).sum(dtype=torch.float64) / total).item() if total.item() else 0.0


class Inputs:
    """Random operands of one shape in BF16, kept while the formats of that shape take turns."""

    def __init__(self, shape: tuple[int, int, int], device: torch.device):
        M, N, K = self.shape = shape
        generator = torch.Generator(device).manual_seed(M * 31 + N * 7 + K)

        def normal(rows: int) -> torch.Tensor:
            return torch.randn(rows, K, device=device, generator=generator, dtype=torch.bfloat16)

        self.x, self.w = normal(M), normal(N)
        self.product = self.x @ self.w.T


def run(context: Context) -> Iterator[Line]:
    inputs: Inputs | None = None
    for case in cases(context.mode):
        first_of_shape = inputs is None or inputs.shape != case.shape
        if inputs is None or first_of_shape:
            inputs = None  # frees the last operands before the next are made
            inputs = Inputs(case.shape, context.device)
        a, sfa = torch.ops.sm120.quantize(inputs.x, case.formats[0], case.grans[0])
        b, sfb = torch.ops.sm120.quantize(inputs.w, case.formats[1], case.grans[1])
        d = torch.full_like(inputs.product, float("nan"))
        call = functools.partial(
            torch.ops.sm120.gemm.out, a, sfa, b, sfb, *case.grans, None, [], out=d
        )
        line = context.time(
            call,
            family="gemm",
            name=case.name,
            shape=case.label,
            provider="sm120_ops",
            flops=gemm_flops(*case.shape),
            bytes=gemm_bytes(*case.shape, case.formats, case.grans),
            weight_bytes=b.nbytes,
            atom=atom_of(case.formats, case.grans),
            mark=case.mark,
        )
        line.diff = calc_diff(d, inputs.product)
        yield line
        if context.with_peers and first_of_shape:
            yield from peers.of_shape(context, case, inputs)
        if context.with_peers and context.mode != "full":
            yield from peers.of_format(context, case, inputs)
