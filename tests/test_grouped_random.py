"""Drawn cases of the m-grouped GEMM over layouts, formats, groups, sizes, routings and strides.

SM120_OPS_TEST_CASES sets their number and SM120_OPS_TEST_SEED the first seed; a failure names the
case. Rows of no group hold NaN, D's buffer a mark; each case runs twice and must give the same
bits.
"""

from __future__ import annotations

import os
import random

import pytest
import torch
from grouped_cases import CONTIGUOUS, MASKED, OPS, Case, Problem, bits, draw_index
from reference import FP4, FP8

CHUNKS = 20
DEFAULT_CASES = {"cpu": 60, "cuda": 1500}
SEED = int(os.environ.get("SM120_OPS_TEST_SEED", "0"))


def draw(seed: int, small: bool) -> Case:
    rng = random.Random(seed)
    op = rng.choice(OPS)
    fmt_a, fmt_b = rng.choice((FP8, FP4)), rng.choice((FP8, FP4))
    multiple = 16 if fmt_a == fmt_b == FP8 else 32
    groups = rng.choice([0, 1, 2, rng.randint(1, 16), rng.randint(1, 64), rng.randint(64, 384)])
    rows = rng.choice([rng.randint(0, 40), rng.randint(1, 400), rng.randint(1, 5000)])
    n = rng.choice([rng.randint(1, 300), 8 * rng.randint(1, 40), 128])
    k = multiple * rng.randint(1, 1024 // multiple)
    if small:
        groups, rows, n, k = groups % 20, min(rows, 300), min(n, 50), min(k, 288)
    if op == MASKED:
        rows = min(rows, 2000 // max(groups, 1) + 5 if small else 20000 // max(groups, 1) + 5)
    while groups * n * k > 1 << 25:  # the float64 copies of the weights
        n, k = n // 2 + 1, max(k // 2 // multiple, 1) * multiple
    return Case(
        op,
        groups,
        rows,
        n,
        k,
        fmt_a,
        fmt_b,
        gran_k_a=rng.choice((32, 128)),
        gran_k_b=rng.choice((32, 128)),
        alignment=rng.choice((16, 32, 64, 128)),
        fp32=rng.random() < 0.5,
        seed=seed,
        expected_m=rng.choice((0, 0, 1, 20, 100, 1000)),
        margin=rng.choice((0, 0, 8, 3)),
        routing=rng.choice(("mixed", "mixed", "few", "full", "one", "none")),
        scale_view=n % 4 == 0 and rng.random() < 0.5,
    )


def break_layout(case: Case, index: list[int], rng: random.Random) -> None:
    """Random values in place of some."""
    high = case.groups + 3 if case.op == CONTIGUOUS else case.rows + 100
    for _ in range(rng.randint(1, 5) if index else 0):
        index[rng.randrange(len(index))] = rng.randint(-5, high)


def check_case(case: Case, device: torch.device) -> None:
    rng = random.Random(case.seed + 1)
    index = draw_index(case, rng)
    if rng.random() < 0.15:
        break_layout(case, index, rng)
    problem = Problem(case, device, index)
    first, second = problem.run(), problem.run()
    assert torch.equal(bits(first), bits(second)), "two runs differ"
    problem.check(first)


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_drawn_cases(device: torch.device, chunk: int) -> None:
    count = int(os.environ.get("SM120_OPS_TEST_CASES", DEFAULT_CASES[device.type]))
    for seed in range(SEED + chunk, SEED + count, CHUNKS):
        case = draw(seed, small=device.type == "cpu")
        try:
            check_case(case, device)
        except Exception as error:
            raise AssertionError(f"{case}: {error}") from error
