"""The m-grouped GEMM on the GPU: every configuration, CUDA graphs, full size, large offsets."""

from __future__ import annotations

import dataclasses
import itertools
import random

import gemm_configs
import pytest
import torch
from grouped_cases import CONTIGUOUS, MASKED, OPS, PSUM, UNTOUCHED, Case, Problem, bits, draw_index
from reference import FP4, FP8

import sm120_ops

pytestmark = pytest.mark.gpu

PAIRS = list(itertools.product((FP8, FP4), (FP8, FP4)))
CUDA = torch.device("cuda")


def run_forced(problem: Problem, tile: int, swapped: bool) -> torch.Tensor:
    case, buffer = problem.case, problem.new_out()
    grans = (case.gran_k_a, case.gran_k_b, case.alignment)
    out = buffer[..., : case.n]
    torch.ops.sm120._grouped_forced(case.op, *problem.inputs, *grans, out, tile, swapped)
    return buffer


def configs(case: Case) -> list[tuple[int, bool]]:
    legal = gemm_configs.legal_configs(case.fmt_a, case.fmt_b, 128)  # K = 128: none is split
    return [(tile, swapped) for tile, swapped, _ in legal]


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(("fmt_a", "fmt_b"), PAIRS)
@pytest.mark.parametrize("alignment", [16, 128])
def test_every_configuration(op: str, fmt_a: str, fmt_b: str, alignment: int) -> None:
    for gran_k, fp32, n, routing in [(32, True, 200, "mixed"), (128, False, 264, "few")]:
        groups, rows = (5, 170) if op == MASKED else (9, 900)
        case = Case(op, groups, rows, n, 416, fmt_a, fmt_b, gran_k, gran_k, alignment, fp32,
                    routing=routing)  # fmt: skip
        problem = Problem(case, CUDA)
        for tile, swapped in configs(case):
            try:
                problem.check(run_forced(problem, tile, swapped))
            except AssertionError as error:
                raise AssertionError(f"tile {tile}, swapped {swapped}: {error}") from error


def random_replays(problem: Problem, count: int) -> None:
    """Captures the op once and replays it with `count` fresh routings."""
    rng = random.Random(1)
    buffer = problem.new_out()
    problem.run(buffer)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        problem.run(buffer)
    for _ in range(count):
        routing = rng.choice(("mixed", "few", "full", "one", "none"))
        case = dataclasses.replace(problem.case, routing=routing)
        problem.set_index(draw_index(case, rng))
        buffer.fill_(UNTOUCHED)
        graph.replay()
        problem.check(buffer)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(("fmt_a", "fmt_b"), PAIRS)
def test_graph_replays_with_fresh_routings(op: str, fmt_a: str, fmt_b: str) -> None:
    groups, rows = (16, 130) if op == MASKED else (24, 1500)
    case = Case(op, groups, rows, 264, 512, fmt_a, fmt_b, alignment=32, expected_m=16)
    random_replays(Problem(case, CUDA), 50)


def test_no_validation_while_capturing() -> None:
    problem = Problem(Case(CONTIGUOUS, 3, 128, 64, 128), CUDA)
    buffer = problem.new_out()
    problem.run(buffer)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        with pytest.raises(ValueError, match="validate: expected False under graph capture"):
            problem.run(buffer, validate=True)
        problem.run(buffer)
    graph.replay()
    problem.check(buffer)


# The configurations that the speed tables run, at their size, over and over: a race shows there.
FULL_SIZE = [
    Case(CONTIGUOUS, 64, 65 * 64, 4096, 4096, routing="few", alignment=64),
    Case(CONTIGUOUS, 8, 8192, 4096, 1024, routing="full", alignment=128),
    Case(PSUM, 128, 2048, 2048, 2048, routing="few", alignment=16, expected_m=2),
    Case(MASKED, 32, 256, 2048, 2048, routing="mixed", expected_m=100),
]


@pytest.mark.determinism
@pytest.mark.parametrize("case", FULL_SIZE, ids=lambda case: case.op)
@pytest.mark.parametrize(("fmt_a", "fmt_b"), PAIRS)
@pytest.mark.parametrize("gran_k", [32, 128])
def test_full_size(case: Case, fmt_a: str, fmt_b: str, gran_k: int) -> None:
    case = dataclasses.replace(case, fmt_a=fmt_a, fmt_b=fmt_b, gran_k_a=gran_k, gran_k_b=gran_k)
    problem = Problem(case, CUDA)
    first = problem.run()
    problem.check(first)
    for tile, swapped in configs(case):
        reference_bits = bits(run_forced(problem, tile, swapped))
        different = torch.zeros((), dtype=torch.int64, device=CUDA)
        for _ in range(5):
            different += (bits(run_forced(problem, tile, swapped)) != reference_bits).sum()
        assert different.item() == 0, f"tile {tile}, swapped {swapped}: {different.item()} differ"


def test_weights_of_more_than_2_31_bytes() -> None:
    if torch.cuda.mem_get_info()[0] < 12 << 30:
        pytest.skip("needs 12 GiB of GPU memory")
    groups, n, k = 70, 8192, 4096
    weights = torch.empty(groups * n, k, device=CUDA, dtype=torch.bfloat16).normal_()
    data, scale = sm120_ops.quantize(weights)
    b = (data.view(groups, n, k), scale.t().unflatten(1, (groups, n)).permute(1, 2, 0))
    assert data.numel() > 1 << 31
    a = sm120_ops.quantize(torch.randn(64, k, device=CUDA))
    index = torch.full((64,), -1, dtype=torch.int32, device=CUDA)
    for segment, expert in enumerate((0, 63, 64, 69)):
        index[16 * segment : 16 * segment + 3] = expert
    d = sm120_ops.grouped_gemm(a, b, index, alignment=16, gran_k_a=32, gran_k_b=32)
    for segment, expert in enumerate((0, 63, 64, 69)):
        rows = slice(16 * segment, 16 * segment + 3)
        x = sm120_ops.dequantize(*a)[rows].double()
        one = data[expert * n : (expert + 1) * n]
        w = sm120_ops.dequantize(one, scale[expert * n : (expert + 1) * n]).double()
        torch.testing.assert_close(d[rows].double(), x @ w.t(), rtol=2.0**-8, atol=0.05)
        assert (d[16 * segment + 3 : 16 * segment + 16] == 0).all()


# At sizes that compute-sanitizer gets through.
@pytest.mark.sanitizer
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(("fmt_a", "fmt_b"), PAIRS)
def test_sanitizer_grouped(op: str, fmt_a: str, fmt_b: str) -> None:
    for gran_k, n, k, alignment in [(32, 140, 288, 32), (128, 24, 544, 16)]:
        groups, rows = (3, 37) if op == MASKED else (5, 150)
        case = Case(op, groups, rows, n, k, fmt_a, fmt_b, gran_k, gran_k, alignment, True)
        problem = Problem(case, torch.device("cpu"))
        on_gpu = problem.to("cuda")
        for tile, swapped in configs(case):
            problem.check(run_forced(on_gpu, tile, swapped).cpu())
