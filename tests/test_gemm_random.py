"""Drawn GEMM cases over shapes, formats, granularities, strides, C, dtypes and head splits.

SM120_OPS_TEST_CASES sets their number and SM120_OPS_TEST_SEED the first seed; a failure names the
case, whose seed draws it again.
"""

from __future__ import annotations

import os
import random
from dataclasses import dataclass

import pytest
import reference
import torch
from reference import FP4, FP8, random_operand

import sm120_ops

CHUNKS = 20
DEFAULT_CASES = {"cpu": 60, "cuda": 2000}
SEED = int(os.environ.get("SM120_OPS_TEST_SEED", "0"))


@dataclass(frozen=True)
class Case:
    seed: int
    m: int
    n: int
    k: int
    fmt_a: str
    fmt_b: str
    gran_k_a: int
    gran_k_b: int
    padding_a: int  # bytes between rows
    padding_b: int
    fp32: bool
    c: str  # "none", "separate", "row" (one row for all), "out" (in place)
    margin_d: tuple[int, int]  # columns left and right of D in its buffer
    margin_c: tuple[int, int]
    head_splits: tuple[int, int, int] | None


def draw(seed: int, small: bool) -> Case:
    rng = random.Random(seed)
    fmt_a, fmt_b = rng.choice((FP8, FP4)), rng.choice((FP8, FP4))
    multiple = 16 if fmt_a == fmt_b == FP8 else 32
    # Decode, tile edges and everything else in turn.
    m = rng.choice([rng.randint(0, 4), rng.randint(1, 64), rng.randint(1, 300)])
    m = rng.choice([m, m, 16, 17, 32, 64, 65, 128, 129])
    n = rng.choice([rng.randint(1, 600), 8 * rng.randint(1, 75), 128, 256])
    k = multiple * rng.randint(1, 2048 // multiple)
    if small:
        m, n, k = min(m, 96), min(n, 160), min(k, 512)
    head_splits = None
    if rng.random() < 0.3:
        left, right = rng.choice([(64, 64), (16, 8), (5, 3), (1, 0), (0, 7), (32, 0)])
        n = max(n // (left + right), 1) * (left + right)
        head_splits = (left, rng.choice([0, 1, 8, 13]), right)
    margins = [(0, 0), (0, 0), (8, 8), (0, 3), (1, 0), (7, 5)]
    return Case(
        seed=seed,
        m=m,
        n=n,
        k=k,
        fmt_a=fmt_a,
        fmt_b=fmt_b,
        gran_k_a=rng.choice((32, 128)),
        gran_k_b=rng.choice((32, 128)),
        padding_a=rng.choice((0, 0, 16, 112)),
        padding_b=rng.choice((0, 0, 16, 112)),
        fp32=rng.random() < 0.5,
        c=rng.choice(("none", "none", "separate", "row", "out")),
        margin_d=rng.choice(margins),
        margin_c=rng.choice(margins),
        head_splits=head_splits,
    )


def padding_to_16(k: int, fmt: str, padding: int) -> int:
    row = k if fmt == FP8 else k // 2
    return -row % 16 + padding


def check_case(case: Case, device: torch.device) -> None:
    generator = torch.Generator(device).manual_seed(case.seed)
    a = random_operand(
        case.m,
        case.k,
        case.fmt_a,
        case.gran_k_a,
        generator,
        row_padding=padding_to_16(case.k, case.fmt_a, case.padding_a),
    )
    b = random_operand(
        case.n,
        case.k,
        case.fmt_b,
        case.gran_k_b,
        generator,
        row_padding=padding_to_16(case.k, case.fmt_b, case.padding_b),
    )
    dtype = torch.float32 if case.fp32 else torch.bfloat16
    columns = torch.arange(case.n, device=device)
    width = case.n
    if case.head_splits is not None:
        left, mid, right = case.head_splits
        columns = columns + (columns + right) // (left + right) * mid
        width = case.n + case.n // (left + right) * mid

    def random_matrix(rows: int, margin: tuple[int, int]) -> torch.Tensor:
        """Of about D's magnitude, with `margin` columns around it."""
        size = (case.k * 0.5) ** 0.5 * (100 if case.fmt_a == FP8 else 3)
        shape = (rows, width + sum(margin))
        values = torch.randn(shape, generator=generator, device=device) * size
        return values.to(dtype)

    def middle(buffer: torch.Tensor, margin: tuple[int, int]) -> torch.Tensor:
        return buffer[:, margin[0] : margin[0] + width]

    buffer = torch.full((case.m, width + sum(case.margin_d)), torch.nan, dtype=dtype, device=device)
    c = None
    if case.c == "out":
        buffer = random_matrix(case.m, case.margin_d)
        c = middle(buffer, case.margin_d)
    elif case.c == "separate":
        c = middle(random_matrix(case.m, case.margin_c), case.margin_c)
    elif case.c == "row":
        c = middle(random_matrix(1, case.margin_c), case.margin_c).expand(case.m, -1)

    results = []
    for _ in range(2):
        target = buffer.clone()
        out = middle(target, case.margin_d)
        sm120_ops.gemm(
            a.pair,
            b.pair,
            gran_k_a=case.gran_k_a,
            gran_k_b=case.gran_k_b,
            c=out if case.c == "out" else c,
            out=out,
            head_splits=case.head_splits,
        )
        results.append(target)
    bits = torch.int32 if case.fp32 else torch.int16
    assert torch.equal(results[0].view(bits), results[1].view(bits)), "two runs differ"

    result = middle(results[0], case.margin_d)
    reference.assert_gemm_close(
        result[:, columns], a.values, b.values, None if c is None else c[:, columns]
    )
    written = torch.zeros(buffer.shape[1], dtype=torch.bool, device=device)
    written[columns + case.margin_d[0]] = True
    kept, before = results[0][:, ~written], buffer[:, ~written]
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
