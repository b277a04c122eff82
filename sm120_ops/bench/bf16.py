"""BF16 GEMM: the design's shapes, every layout at full size, and model sets with --full; then
groups of them (bf16_grouped.py).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from sm120_ops.bench import bf16_grouped
from sm120_ops.bench.gemm import FULL_M, MODEL_SETS, calc_diff
from sm120_ops.bench.record import Line, Mark, gemm_bytes, gemm_flops

if TYPE_CHECKING:
    from sm120_ops.bench.context import Context


class Case(NamedTuple):
    M: int
    N: int
    K: int
    layout: str = "nt"
    mark: Mark | None = None

    @property
    def label(self) -> str:
        return f"{self.M}x{self.N}x{self.K}"


def _at_most(us: float) -> Mark:
    return Mark("us", "<=", us, "us", gpu="H200")


LARGE = Mark("tflops", ">=", 500, "TFLOP/s", gpu="H200")
# 95 % of the K-major rate that is asked for.
LARGE_MN = Mark("tflops", ">=", 475, "TFLOP/s", gpu="H200")

TABLE = (
    Case(1, 2112, 7168, mark=_at_most(14)),
    Case(1, 7168, 16384),
    Case(16, 7168, 2048),
    Case(32, 2112, 7168),
    Case(64, 7168, 2048),
    Case(128, 2112, 7168),
    Case(128, 7168, 2048, mark=_at_most(17)),
    Case(128, 7168, 2048, "nn"),
    Case(4096, 7168, 16384, mark=LARGE),
    Case(4096, 7168, 16384, "nn", LARGE_MN),
    Case(4096, 7168, 16384, "tn", LARGE_MN),
    Case(4096, 7168, 16384, "tt", LARGE_MN),
)


def cases(mode: str) -> Iterator[Case]:
    yield from TABLE
    if mode == "full":
        for shapes in MODEL_SETS.values():
            for N, K in shapes:
                for M in FULL_M:
                    yield Case(M, N, K)


def run(context: Context) -> Iterator[Line]:
    for case in cases(context.mode):
        M, N, K = case[:3]
        generator = torch.Generator(context.device).manual_seed(M * 31 + N * 7 + K)

        def normal(
            rows: int, mn_major: bool, K: int = K, generator: torch.Generator = generator
        ) -> torch.Tensor:
            shape = (K, rows) if mn_major else (rows, K)
            x = torch.randn(shape, device=context.device, generator=generator, dtype=torch.bfloat16)
            return x.T if mn_major else x

        a, b = normal(M, case.layout[0] == "t"), normal(N, case.layout[1] == "n")
        d = torch.full((M, N), float("nan"), device=context.device, dtype=torch.bfloat16)
        peer = torch.empty_like(d)
        product = torch.matmul(a, b.T)
        fields: dict[str, Any] = {
            "family": "bf16",
            "name": f"bf16 {case.layout}",
            "shape": case.label,
            "flops": gemm_flops(M, N, K),
            "bytes": gemm_bytes(M, N, K, ("bf16", "bf16"), (0, 0)),
            "weight_bytes": 2 * N * K,
        }
        line = context.time(
            functools.partial(torch.ops.sm120.bf16_gemm.out, a, b, out=d),
            provider="sm120_ops",
            atom="bf16",
            mark=case.mark,
            **fields,
        )
        line.diff = calc_diff(d, product)
        yield line
        if context.with_peers:
            call = functools.partial(torch.matmul, a, b.T, out=peer)
            yield context.time_peer(call, provider="torch.matmul", **fields)
    yield from bf16_grouped.lines(context)
