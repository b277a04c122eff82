"""Grouped BF16 GEMMs on the GPU: every configuration, CUDA graphs, full size, sanitizers."""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Iterator

import pytest
import torch
from bf16_cases import LAYOUTS
from bf16_grouped_cases import (
    CONTIGUOUS,
    MASKED,
    OPS,
    PSUM,
    UNTOUCHED,
    KCase,
    Problem,
    Routing,
    bits,
    check_k_case,
    draw_index,
)
from reference import calc_diff

from sm120_ops import bf16_k_grouped_gemm

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda")


def configs(any_k: bool = False) -> Iterator[tuple[int, bool]]:
    """All tiles, in both orientations; the first past the table ends the list. any_k: for K."""
    a = torch.zeros(8, 8, dtype=torch.bfloat16, device=CUDA)
    one = torch.tensor([8], dtype=torch.int32, device=CUDA)
    out = torch.zeros(1, 8, 8, device=CUDA)

    def legal(tile: int) -> bool:
        try:
            if any_k:
                torch.ops.sm120._bf16_k_grouped_forced(a, a, one, None, out, tile, False)
            else:
                masked = "bf16_grouped_gemm_masked"
                torch.ops.sm120._bf16_grouped_forced(
                    masked, a[None], a[None], one, 128, out, tile, False
                )
        except ValueError as error:
            if "a compiled tile" not in str(error):
                raise
            return False
        return True

    tiles = list(itertools.takewhile(legal, range(1 if any_k else 0, 100)))
    assert tiles
    yield from itertools.product(tiles, (False, True))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_configuration(op: str, layout: str) -> None:
    for fp32, n, alignment, routing in [(True, 200, 16, "mixed"), (False, 264, 128, "few")]:
        groups, rows = (5, 170) if op == MASKED else (9, 900)
        case = Routing(op, groups, rows, n, 416, alignment=alignment, fp32=fp32, routing=routing)
        problem = Problem(case, CUDA, layout=layout)
        for tile, swapped in configs():
            try:
                problem.check(problem.run_forced(tile, swapped))
            except AssertionError as error:
                raise AssertionError(f"tile {tile}, swapped {swapped}: {error}") from error


@pytest.mark.parametrize("fp32", [False, True])
def test_every_configuration_of_k_groups(fp32: bool) -> None:
    sizes = (100, 0, 257, 64, 31, 32, 33, 1, 700)
    for config in configs(any_k=True):
        for m, n, c in [(130, 264, "out"), (40, 24, "none")]:
            try:
                check_k_case(KCase(7, m, n, sizes, 50, fp32=fp32, c=c), CUDA, config)
            except AssertionError as error:
                raise AssertionError(f"{config} at {m}x{n}: {error}") from error


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("layout", ["nt", "nn"])
def test_graph_replays_with_fresh_routings(op: str, layout: str) -> None:
    groups, rows = (16, 130) if op == MASKED else (24, 1500)
    problem = Problem(Routing(op, groups, rows, 264, 512, alignment=32, expected_m=16), CUDA,
                      layout=layout)  # fmt: skip
    rng = random.Random(1)
    buffer = problem.new_out()
    problem.run(buffer)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        problem.run(buffer)
    for _ in range(20):
        routing = rng.choice(("mixed", "few", "full", "one", "none"))
        case = dataclasses.replace(problem.case, routing=routing)
        problem.set_index(draw_index(case, rng))
        buffer.fill_(UNTOUCHED)
        graph.replay()
        problem.check(buffer)


def test_graph_replays_with_other_sizes_of_k_groups() -> None:
    a, b = (torch.randn(2000, n, device=CUDA).bfloat16() for n in (136, 200))
    ks = torch.tensor([500, 0, 300], dtype=torch.int32, device=CUDA)
    c = torch.randn(3, 136, 200, device=CUDA)
    out = torch.empty_like(c)
    bf16_k_grouped_gemm(a, b, ks, c=c, out=out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        with pytest.raises(ValueError, match="validate: expected False under graph capture"):
            bf16_k_grouped_gemm(a, b, ks, c=c, out=out, validate=True)
        bf16_k_grouped_gemm(a, b, ks, c=c, out=out)
    for sizes in ([0, 0, 0], [2000, 0, 0], [1, 1500, 33], [7, 64, 1929]):
        ks.copy_(torch.tensor(sizes))
        a.normal_()
        c.normal_()
        graph.replay()
        assert torch.equal(out, bf16_k_grouped_gemm(a, b, ks, c=c))
        begin = 0
        for group, k in enumerate(sizes):
            x, y = (t[begin : begin + k].double() for t in (a, b))
            error = (out[group].double() - (c[group].double() + x.t() @ y)).norm()
            assert error <= 2e-6 * out[group].norm()
            begin += k


def test_one_group_with_nearly_all_of_k() -> None:
    """The tile is chosen for the whole of K, not for what each of 40 groups has on average."""
    sizes = (60_000, *[8] * 39)
    a = torch.randn(sum(sizes), 128, dtype=torch.bfloat16, device=CUDA)
    b = torch.randn(sum(sizes), 256, dtype=torch.bfloat16, device=CUDA)
    ks = torch.tensor(sizes, dtype=torch.int32, device=CUDA)
    out = bf16_k_grouped_gemm(a, b, ks, out_dtype=torch.float32)
    exact = a[: sizes[0]].double().t() @ b[: sizes[0]].double()
    assert calc_diff(out[0], exact) <= 1e-10


# At the sizes of real work, over and over: a race shows there.
FULL_SIZE = [
    Routing(CONTIGUOUS, 64, 65 * 64, 4096, 2048, routing="few", alignment=64),
    Routing(CONTIGUOUS, 8, 8192, 4096, 1024, routing="full", alignment=128),
    Routing(PSUM, 128, 2048, 2048, 2048, routing="few", alignment=16, expected_m=2),
    Routing(MASKED, 32, 256, 2048, 2048, routing="mixed", expected_m=100),
]


@pytest.mark.determinism
@pytest.mark.parametrize("case", FULL_SIZE, ids=lambda case: case.op)
@pytest.mark.parametrize("layout", ["nt", "tn"])
def test_full_size(case: Routing, layout: str) -> None:
    problem = Problem(case, CUDA, layout=layout)
    problem.check(problem.run())
    for tile, swapped in configs():
        reference_bits = bits(problem.run_forced(tile, swapped))
        different = torch.zeros((), dtype=torch.int64, device=CUDA)
        for _ in range(5):
            different += (bits(problem.run_forced(tile, swapped)) != reference_bits).sum()
        assert different.item() == 0, f"tile {tile}, swapped {swapped}: {different.item()} differ"


@pytest.mark.determinism
def test_full_size_of_k_groups() -> None:
    sizes = (1000, 0, 4097, 2048, 33, 9000)
    for config in configs(any_k=True):
        check_k_case(KCase(5, 1024, 2048, sizes, fp32=True), CUDA, config)


# At sizes that compute-sanitizer gets through.
@pytest.mark.sanitizer
@pytest.mark.parametrize("layout", LAYOUTS)
def test_sanitizer_grouped(layout: str) -> None:
    for op, alignment in [(CONTIGUOUS, 16), (PSUM, 32), (MASKED, 128)]:
        groups, rows = (3, 37) if op == MASKED else (5, 150)
        case = Routing(op, groups, rows, 140, 288, alignment=alignment, fp32=True)
        problem = Problem(case, CUDA, layout=layout)
        for tile, swapped in configs():
            problem.check(problem.run_forced(tile, swapped))


@pytest.mark.sanitizer
def test_sanitizer_k_grouped() -> None:
    for config in configs(any_k=True):
        check_k_case(KCase(3, 140, 72, (33, 0, 64, 5), 7, c="separate"), CUDA, config)
