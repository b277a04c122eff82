"""Hyper-connection prenorm: the residual streams of DeepSeek-V4 and V4.1, read once."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from sm120_ops.bench.gemm import calc_diff
from sm120_ops.bench.record import Line, Mark, data_bytes, gemm_flops

if TYPE_CHECKING:
    from sm120_ops.bench.context import Context

N = 24  # 4 streams: 4 * (4 + 2)


class Case(NamedTuple):
    M: int
    K: int
    num_splits: int | None = None
    mark: Mark | None = None


def _at_most(us: float) -> Mark:
    return Mark("us", "<=", us, "us", gpu="H200")


TABLE = (
    Case(13, 28672, mark=_at_most(12)),
    Case(13, 28672, 16),
    Case(1, 16384),
    Case(128, 28672),
    Case(1024, 20480),
    Case(4096, 28672, mark=_at_most(68)),
    Case(4096, 28672, 16),
)


def cases(mode: str) -> Iterator[Case]:
    yield from TABLE
    if mode == "full":
        for K in (16384, 20480, 28672):
            for M in (1, 2, 4, 8, 16, 32, 64, 256, 512, 2048, 8192):
                yield Case(M, K)


def two_passes(x: torch.Tensor, fn: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    wide = x.float()
    return wide @ fn.T, wide.square().sum(1)


def run(context: Context) -> Iterator[Line]:
    for case in cases(context.mode):
        generator = torch.Generator(context.device).manual_seed(case.M + case.K)
        x = torch.randn(case.M, case.K, device=context.device, generator=generator)
        x = x.to(torch.bfloat16)
        fn = torch.randn(N, case.K, device=context.device, generator=generator)
        lead = () if case.num_splits is None else (case.num_splits,)
        d = torch.full((*lead, case.M, N), float("nan"), device=context.device)
        sqr_sum = torch.full((*lead, case.M), float("nan"), device=context.device)
        outputs = data_bytes(case.M, N + 1, "fp32") * (case.num_splits or 1)
        fields: dict[str, Any] = {
            "family": "hc_prenorm",
            "name": "tf32" if case.num_splits is None else f"tf32, {case.num_splits} splits",
            "shape": f"{case.M}x{N}x{case.K}",
            "flops": gemm_flops(case.M, N, case.K),
            "bytes": x.nbytes + fn.nbytes + outputs,
        }
        call = functools.partial(
            torch.ops.sm120.hc_prenorm.out, x, fn, case.num_splits, d=d, sqr_sum=sqr_sum
        )
        line = context.time(call, provider="sm120_ops", mark=case.mark, **fields)
        total = d if case.num_splits is None else d.sum(0)
        line.diff = calc_diff(total, x.double() @ fn.double().T)
        yield line
        if context.with_peers and case.num_splits is None:
            yield context.time_peer(
                functools.partial(two_passes, x, fn),
                provider="torch, 2 passes",
                **fields,
            )
