"""bf16_gemm on the GPU: every configuration, long sums, CUDA graphs, full size, sanitizers."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator

import pytest
import torch
from bf16_cases import LAYOUTS, OUT_DTYPES, check, operands
from reference import calc_diff

from sm120_ops import bf16_gemm


def run_forced(
    a: torch.Tensor,
    b: torch.Tensor,
    out: torch.Tensor,
    config: tuple[int, bool, bool],
    c: torch.Tensor | None = None,
) -> torch.Tensor:
    """`config` is (tile, swapped, split)."""
    torch.ops.sm120._bf16_gemm_forced(a, b, c, out, *config)
    return out


def legal_configs(a: torch.Tensor, b: torch.Tensor) -> Iterator[tuple[int, bool, bool]]:
    """The op itself refuses what is not compiled; the first tile past the table ends the list."""
    out = torch.empty(a.shape[0], b.shape[0], device=a.device)
    for tile in itertools.count():
        legal = []
        for swapped, split in itertools.product((False, True), (False, True)):
            try:
                run_forced(a, b, out, (tile, swapped, split))
            except ValueError as error:
                if "a compiled tile" not in str(error):
                    raise
                continue
            legal.append((tile, swapped, split))
        if not legal:
            assert tile > 0
            return
        yield from legal


def assert_same_each_time(
    a: torch.Tensor,
    b: torch.Tensor,
    config: tuple[int, bool, bool],
    first: torch.Tensor,
    times: int,
) -> None:
    different = torch.zeros((), dtype=torch.int64, device=a.device)
    for _ in range(times):
        out = torch.full_like(first, torch.nan)
        run_forced(a, b, out, config)
        different += (out.view(torch.uint8) != first.view(torch.uint8)).sum()
    assert different.item() == 0, f"{config}: {different.item()} bytes in {times} runs differ"


@pytest.mark.determinism
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_configuration(layout: str) -> None:
    for m, n, k in [(1024, 2048, 2048), (300, 1000, 2880), (40, 4000, 4096), (130, 70, 40)]:
        a, b = operands(torch.device("cuda"), m, n, k, layout)
        for config in legal_configs(a, b):
            for dtype in OUT_DTYPES:
                first = torch.full((m, n), torch.nan, device="cuda", dtype=dtype)
                run_forced(a, b, first, config)
                try:
                    check(first, a, b)
                except AssertionError as error:
                    raise AssertionError(f"{config} at {m}x{n}x{k} {layout}: {error}") from error
                assert_same_each_time(a, b, config, first, 10)


@pytest.mark.determinism
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_configuration_with_c(layout: str) -> None:
    m, n, k = 70, 384, 1056
    a, b = operands(torch.device("cuda"), m, n, k, layout)
    for config in legal_configs(a, b):
        for dtype in OUT_DTYPES:
            c = (torch.randn(m, n, device="cuda") * 1e2).to(dtype)
            out = torch.full_like(c, torch.nan)
            run_forced(a, b, out, config, c)
            check(out, a, b, c)
            run_forced(a, b, c, config, c)
            assert torch.equal(c, out)


@pytest.mark.determinism
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_configuration_at_full_size(layout: str) -> None:
    """Every element of every repeat: a stage given back too early shows only so."""
    for m, n, k in [(4096, 7168, 2048), (4096, 2112, 7168), (128, 7168, 16384), (16, 7168, 16384)]:
        a, b = operands(torch.device("cuda"), m, n, k, layout)
        for config in legal_configs(a, b):
            out = torch.full((m, n), torch.nan, device="cuda", dtype=torch.bfloat16)
            first = run_forced(a, b, out, config)
            assert not first.isnan().any()
            assert_same_each_time(a, b, config, first, 10)


@pytest.mark.gpu
@pytest.mark.parametrize("m", [1, 37, 300])
def test_graph_replay(m: int) -> None:
    a, b = operands(torch.device("cuda"), m, 480, 2048)
    run = functools.partial(bf16_gemm, a, b, out_dtype=torch.float32)
    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for _ in range(3):
        a.normal_()
        b.normal_()
        graph.replay()
        assert torch.equal(captured, run())


@pytest.mark.sanitizer
@pytest.mark.usefixtures("filled_allocations")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_sanitizer(layout: str) -> None:
    for m, n, k in [(133, 140, 544), (5, 24, 96)]:
        a, b = operands(torch.device("cuda"), m, n, k, layout)
        for config in legal_configs(a, b):
            out = torch.zeros(m, n, device="cuda")
            run_forced(a, b, out, config, c=out)
            check(out.cpu(), a.cpu(), b.cpu())


@pytest.mark.determinism
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("k", [8200, 16384, 24600, 65536])
def test_long_sums(layout: str, k: int) -> None:
    """Chains of MMAs put together: every configuration keeps the error bound, for any K."""
    m, n = 150, 300
    a, b = operands(torch.device("cuda"), m, n, k, layout)
    exact = a.double() @ b.double().t()
    for config in legal_configs(a, b):
        out = torch.full((m, n), torch.nan, device="cuda")
        first = run_forced(a, b, out, config)
        error = calc_diff(first, exact)
        assert error <= 1e-10, f"{config}: {error:.3g}"
        assert_same_each_time(a, b, config, first, 3)
