"""Grouped BF16 GEMMs, m-grouped in three layouts and k-grouped, against float64; bad input.

SM120_OPS_TEST_CASES sets the number of drawn cases and SM120_OPS_TEST_SEED the first seed; a
failure names the case. Each runs twice and must give the same bits.
"""

from __future__ import annotations

import os
import random

import pytest
import reference
import torch
from bf16_cases import LAYOUTS, matrix
from bf16_grouped_cases import (
    CONTIGUOUS,
    MASKED,
    OPS,
    PSUM,
    KCase,
    Problem,
    Routing,
    bits,
    check_k_case,
    draw_index,
    draw_k_case,
    draw_routing,
)
from test_grouped_random import break_layout

import sm120_ops
from sm120_ops import bf16_grouped_gemm, bf16_k_grouped_gemm

SEED = int(os.environ.get("SM120_OPS_TEST_SEED", "0"))
CHUNKS = 10
DEFAULT_CASES = {"cpu": 40, "cuda": 400}


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("fp32", [False, True])
def test_layouts(device: torch.device, op: str, layout: str, fp32: bool) -> None:
    for routing in ("mixed", "few", "full", "none"):
        case = Routing(op, 5, 200, 72, 136, alignment=32, fp32=fp32, routing=routing)
        problem = Problem(case, device, layout=layout, padding=8)
        problem.check(problem.run(validate=True))


@pytest.mark.parametrize("op", OPS)
def test_without_out(device: torch.device, op: str) -> None:
    """Rows of no group are 0."""
    case = Routing(op, 4, 100, 40, 64, alignment=16, margin=0)
    problem = Problem(case, device)
    given = problem.run().reshape(-1, 40)
    options = {} if op == MASKED else {"alignment": 16}
    d = getattr(sm120_ops, problem.op)(problem.a, problem.b, problem.index, **options)
    d = d.reshape(-1, 40)
    assert torch.equal(d[problem.valid], given[problem.valid])
    assert (d[~problem.valid] == 0).all()


def test_empty(device: torch.device) -> None:
    for op in OPS:
        for groups, rows, n, k in [(0, 20, 16, 32), (3, 0, 16, 32), (3, 20, 0, 32), (3, 20, 16, 0)]:
            problem = Problem(Routing(op, groups, rows, n, k, alignment=16), device)
            problem.check(problem.run())
    for ks, spare in [((), 8), ((0, 0, 0), 0), ((0, 5, 0), 0)]:
        for c in ("none", "separate", "out"):
            check_k_case(KCase(1, 24, 40, ks, spare, c=c), device)
    for m, n in [(0, 8), (8, 0)]:
        check_k_case(KCase(1, m, n, (3, 4)), device)


@pytest.mark.parametrize("c", ["none", "separate", "out"])
def test_k_grouped_any_sizes(device: torch.device, c: str) -> None:
    """A group may begin and end anywhere; the next group's rows are NaN."""
    generator = torch.Generator(device).manual_seed(3)
    for k in (1, 2, 7, 8, 15, 31, 32, 33, 63, 64, 65, 127, 200):
        check_k_case(KCase(k, 40, 24, (k, 3, 0, k), 9, c=c), device)
        a, b = matrix(2 * k, 40, generator), matrix(2 * k, 24, generator)
        a[k:], b[k:] = torch.nan, torch.inf
        ks = torch.tensor([k, k], dtype=torch.int32, device=device)
        d = bf16_k_grouped_gemm(a, b, ks, out_dtype=torch.float32)
        reference.assert_gemm_close(d[0], a[:k].double().t(), b[:k].double().t())
        assert d[1].isnan().all()


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_drawn_m_grouped(device: torch.device, chunk: int) -> None:
    count = int(os.environ.get("SM120_OPS_TEST_CASES", DEFAULT_CASES[device.type]))
    for seed in range(SEED + chunk, SEED + count, CHUNKS):
        case, layout, padding = draw_routing(seed, small=device.type == "cpu")
        try:
            rng = random.Random(seed + 1)
            index = draw_index(case, rng)
            if rng.random() < 0.15:
                break_layout(case, index, rng)
            problem = Problem(case, device, index, layout, padding)
            first, second = problem.run(), problem.run()
            assert torch.equal(bits(first), bits(second)), "two runs differ"
            problem.check(first)
        except Exception as error:
            raise AssertionError(f"{case} {layout} {padding}: {error}") from error


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_drawn_k_grouped(device: torch.device, chunk: int) -> None:
    count = int(os.environ.get("SM120_OPS_TEST_CASES", DEFAULT_CASES[device.type]))
    for seed in range(SEED + chunk, SEED + count, CHUNKS):
        case = draw_k_case(seed, small=device.type == "cpu")
        try:
            check_k_case(case, device)
        except Exception as error:
            raise AssertionError(f"{case}: {error}") from error


# ---- Bad input -----------------------------------------------------------------------------------


def refused(
    op: str, arg: str, requirement: str, got: str, kind: type[Exception] = ValueError
) -> pytest.RaisesExc:
    return pytest.raises(
        kind, match=rf"^sm120_ops.{op}: {arg}: expected {requirement}, got .*{got}"
    )


@pytest.mark.parametrize("op", OPS)
def test_bad_m_grouped(device: torch.device, op: str) -> None:
    problem = Problem(Routing(op, 3, 64, 24, 40, alignment=16), device)
    a, b, index, name = problem.a, problem.b, problem.index, problem.op
    run = getattr(sm120_ops, name)
    arg = {CONTIGUOUS: "m_indices", PSUM: "group_ends", MASKED: "masked_m"}[op]
    with refused(name, "a", "dtype torch.bfloat16", "torch.float16", TypeError):
        run(a.half(), b, index)
    with refused(name, "b", "3 dimensions", r"\[24, 40\]"):
        run(a, b[0], index)
    with refused(name, "b", "K=40 as in a", "K=32"):
        run(a, b[..., :32], index)
    with refused(name, "b", "one stride to be 1 and the other a multiple of 8 .*", "strides"):
        run(a, torch.zeros(3, 24, 80, dtype=torch.bfloat16, device=device)[..., ::2], index)
    odd = torch.zeros(3 * 964, dtype=torch.bfloat16, device=device)
    with refused(name, "b", "a group stride that is a multiple of 8 .*", "strides"):
        run(a, odd.as_strided((3, 24, 40), (964, 40, 1)), index)
    with refused(name, arg, "dtype torch.int32", "torch.int64", TypeError):
        run(a, b, index.long())
    with refused(name, arg, r"shape \[\d+\]", r"\[\d+\]"):
        run(a, b, index[:-1])
    with refused(name, arg, "a contiguous tensor", "strides"):
        run(a, b, torch.stack([index, index], 1)[:, 0])
    with refused(name, "expected_m", "a row count, or 0 for unknown", "-1"):
        run(a, b, index, expected_m=-1)
    with refused(name, "out_dtype", "torch.bfloat16 or torch.float32", "torch.float16"):
        run(a, b, index, out_dtype=torch.float16)
    shape = (*a.shape[:-1], 24)
    with refused(name, "out", r"shape \[.*24\]", r"32\]"):
        run(a, b, index, out=torch.zeros(*a.shape[:-1], 32, device=device))
    with refused(name, "out", "contiguous rows .*", "strides"):
        run(a, b, index, out=torch.zeros(*shape[:-1], 48, device=device)[..., ::2])
    with refused(name, "out", "memory apart from a", "overlapping memory"):
        run(a, b, index, out=a[..., :24])
    with refused(name, "b", "a tensor that needs no gradient .*", "requires", RuntimeError):
        run(a, b.clone().requires_grad_(), index)
    if op == MASKED:
        with refused(name, "a", "3 groups as in b", r"\[2, 64, 40\]"):
            run(a[:2], b, index)
    else:
        with refused(name, "alignment", "16, 32, 64 or 128", "24"):
            run(a, b, index, alignment=24)
    bad = index.clone()
    bad[0] = 1000
    with refused(name, arg, ".*", "1000 at (row|group) 0"):
        run(a, b, bad, validate=True)


def test_bad_k_grouped(device: torch.device) -> None:
    name = "bf16_k_grouped_gemm"
    generator = torch.Generator(device).manual_seed(0)
    a, b = matrix(40, 24, generator), matrix(40, 16, generator)
    ks = torch.tensor([10, 20], dtype=torch.int32, device=device)
    with refused(name, "a", "dtype torch.bfloat16", "torch.float32", TypeError):
        bf16_k_grouped_gemm(a.float(), b, ks)
    with refused(name, "a", "2 dimensions", r"\[1, 40, 24\]"):
        bf16_k_grouped_gemm(a[None], b, ks)
    with refused(name, "b", "K=40 as in a", "K=39"):
        bf16_k_grouped_gemm(a, b[:39], ks)
    lines = r"contiguous rows, a multiple of 8 apart \(16 bytes\), without overlap"
    with refused(name, "a", lines, r"strides \[1, 40\]"):
        bf16_k_grouped_gemm(matrix(24, 40, generator).t(), b, ks)
    with refused(name, "b", lines, r"strides \[12, 1\]"):
        bf16_k_grouped_gemm(a, torch.zeros(40, 12, dtype=torch.bfloat16, device=device), ks)
    with refused(name, "ks", "dtype torch.int32", "torch.int64", TypeError):
        bf16_k_grouped_gemm(a, b, ks.long())
    with refused(name, "ks", "1 dimensions", r"\[1, 2\]"):
        bf16_k_grouped_gemm(a, b, ks[None])
    with refused(name, "c", r"shape \[2, 24, 16\]", r"\[2, 16, 24\]"):
        bf16_k_grouped_gemm(a, b, ks, c=torch.zeros(2, 16, 24, device=device))
    with refused(name, "c", "dtype torch.bfloat16", "torch.float32", TypeError):
        c = torch.zeros(2, 24, 16, device=device)
        bf16_k_grouped_gemm(a, b, ks, c=c, out_dtype=torch.bfloat16)
    with refused(name, "out", "a group stride >= 384", "strides"):
        bf16_k_grouped_gemm(a, b, ks, out=torch.zeros(1, 24, 16, device=device).expand(2, -1, -1))
    with refused(name, "out", "memory apart from a", "overlapping memory"):
        bf16_k_grouped_gemm(a, b, ks[:1], out=a[:16].view(1, 24, 16))
    buffer = torch.zeros(3, 24, 16, device=device)
    with refused(name, "out", "memory apart from c", "overlapping memory"):
        bf16_k_grouped_gemm(a, b, ks, c=buffer[1:], out=buffer[:2])
    for sizes, requirement, got in [
        ([10, -1], "sizes that are not negative", "-1 at group 1"),
        ([30, 11], "at most 40 in all", "41 up to group 1"),
    ]:
        wrong = torch.tensor(sizes, dtype=torch.int32, device=device)
        with refused(name, "ks", requirement, got):
            bf16_k_grouped_gemm(a, b, wrong, validate=True)


def test_opcheck(device: torch.device) -> None:
    case = Routing(CONTIGUOUS, 3, 64, 24, 40, alignment=16)
    problem = Problem(case, device)
    args = (problem.a, problem.b, problem.index)
    reference.opcheck(torch.ops.sm120.bf16_grouped_gemm.default, (*args, torch.float32, 16))
    out = torch.zeros(64, 24, dtype=torch.bfloat16, device=device)
    reference.opcheck(torch.ops.sm120.bf16_grouped_gemm.out, (*args, 16), {"out": out})
    assert bf16_grouped_gemm(*args, alignment=16).dtype == torch.bfloat16
