"""Drawn cases of bf16_gemm over sizes, layouts, strides, C and D.

SM120_OPS_TEST_CASES sets their number and SM120_OPS_TEST_SEED the first seed; a failure names the
case. Each runs twice and must give the same bits.
"""

from __future__ import annotations

import os
import random
from dataclasses import dataclass

import pytest
import torch
from bf16_cases import LAYOUTS, check, matrix

from sm120_ops import bf16_gemm

SEED = int(os.environ.get("SM120_OPS_TEST_SEED", "0"))
CHUNKS = 10
DEFAULT_CASES = {"cpu": 60, "cuda": 700}


@dataclass(frozen=True)
class Case:
    seed: int
    m: int
    n: int
    k: int
    layout: str
    padding_a: int
    padding_b: int
    fp32: bool
    c: str  # "none", "separate", "row" (one row for all), "out" (in place)
    margin_d: tuple[int, int]  # columns left and right of D in its buffer
    margin_c: tuple[int, int]


def draw(seed: int, small: bool) -> Case:
    rng = random.Random(seed)
    m = rng.choice([rng.randint(0, 4), rng.randint(1, 64), rng.randint(1, 300)])
    m = rng.choice([m, m, 16, 17, 32, 64, 65, 128, 129])
    n = rng.choice([rng.randint(1, 40), rng.randint(1, 600), 8 * rng.randint(1, 75), 128, 256])
    k = rng.choice([rng.randint(0, 200), 8 * rng.randint(1, 256)])
    if small:
        m, n, k = min(m, 96), min(n, 160), min(k, 512)
    margins = [(0, 0), (0, 0), (8, 8), (0, 3), (1, 0), (7, 5)]
    return Case(
        seed=seed,
        m=m,
        n=n,
        k=k,
        layout=rng.choice(LAYOUTS),
        padding_a=rng.choice((0, 0, 8, 56)),
        padding_b=rng.choice((0, 0, 8, 56)),
        fp32=rng.random() < 0.5,
        c=rng.choice(("none", "none", "separate", "row", "out")),
        margin_d=rng.choice(margins),
        margin_c=rng.choice(margins),
    )


def check_case(case: Case, device: torch.device) -> None:
    generator = torch.Generator(device).manual_seed(case.seed)
    m, n, k = case.m, case.n, case.k
    a = matrix(m, k, generator, mn_major=case.layout[0] == "t", padding=case.padding_a)
    b = matrix(n, k, generator, mn_major=case.layout[1] == "n", padding=case.padding_b)
    dtype = torch.float32 if case.fp32 else torch.bfloat16

    def random_matrix(rows: int, margin: tuple[int, int]) -> torch.Tensor:
        shape = (rows, n + sum(margin))
        return (torch.randn(shape, generator=generator, device=device) * k**0.5).to(dtype)

    def middle(buffer: torch.Tensor, margin: tuple[int, int]) -> torch.Tensor:
        return buffer[:, margin[0] : margin[0] + n]

    buffer = torch.full((m, n + sum(case.margin_d)), torch.nan, dtype=dtype, device=device)
    c = None
    if case.c == "out":
        buffer = random_matrix(m, case.margin_d)
        c = middle(buffer, case.margin_d)
    elif case.c == "separate":
        c = middle(random_matrix(m, case.margin_c), case.margin_c)
    elif case.c == "row":
        c = middle(random_matrix(1, case.margin_c), case.margin_c).expand(m, -1)
    results = []
    for _ in range(2):
        target = buffer.clone()
        out = middle(target, case.margin_d)
        bf16_gemm(a, b, c=out if case.c == "out" else c, out=out)
        results.append(target)
    bits = torch.int32 if case.fp32 else torch.int16
    assert torch.equal(results[0].view(bits), results[1].view(bits)), "two runs differ"
    check(middle(results[0], case.margin_d), a, b, c)
    outside = torch.ones(buffer.shape[1], dtype=torch.bool, device=device)
    outside[case.margin_d[0] : case.margin_d[0] + n] = False
    kept, before = results[0][:, outside], buffer[:, outside]
    assert torch.equal(kept.view(bits), before.view(bits)), "wrote outside of D"


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_drawn_cases(device: torch.device, chunk: int) -> None:
    count = int(os.environ.get("SM120_OPS_TEST_CASES", DEFAULT_CASES[device.type]))
    for seed in range(SEED + chunk, SEED + count, CHUNKS):
        case = draw(seed, small=device.type == "cpu")
        try:
            check_case(case, device)
        except Exception as error:
            raise AssertionError(f"{case}: {error}") from error
