"""Full-size GPU runs: bitwise equal over many repetitions, CUDA graphs, streams, large outputs.

A race in the pipeline shows as a few wrong elements in some runs at full size only, so each
configuration of the GEMM runs again and again and every element is compared each time.
"""

from __future__ import annotations

import functools
import itertools
import threading
from collections.abc import Callable

import gemm_configs
import pytest
import reference
import torch
from reference import FP4, FP8, Operand, random_operand

import sm120_ops

pytestmark = [pytest.mark.gpu, pytest.mark.determinism]

PAIRS = list(itertools.product((FP8, FP4), (FP8, FP4)))
REPEATS = 20


def operands(
    m: int, n: int, k: int, fmt_a: str, fmt_b: str, gran_k_a: int = 32, gran_k_b: int = 32
) -> tuple[Operand, Operand]:
    generator = torch.Generator("cuda").manual_seed(m + n + k)
    return (
        random_operand(m, k, fmt_a, gran_k_a, generator),
        random_operand(n, k, fmt_b, gran_k_b, generator),
    )


def assert_same_each_time(run: Callable[[torch.Tensor], object], first: torch.Tensor) -> None:
    """`run` writes its argument; counts on the device, and reads the count once."""
    bits = torch.int32 if first.dtype == torch.float32 else torch.int16
    different = torch.zeros((), dtype=torch.int64, device=first.device)
    for _ in range(REPEATS):
        out = torch.full_like(first, torch.nan)
        run(out)
        different += (out.view(bits) != first.view(bits)).sum()
    assert different.item() == 0, f"{different.item()} elements in {REPEATS} runs differ"


@pytest.mark.parametrize(("fmt_a", "fmt_b"), PAIRS)
@pytest.mark.parametrize("gran_k", [32, 128])
@pytest.mark.parametrize("m", [1, 16, 64, 128, 1000, 4096])
def test_full_size_gemm(fmt_a: str, fmt_b: str, gran_k: int, m: int) -> None:
    for n, k in [(7168, 2048), (2112, 7168)]:
        a, b = operands(m, n, k, fmt_a, fmt_b, gran_k, gran_k)
        for dtype in (torch.bfloat16, torch.float32):
            args = (a.data, a.scale, b.data, b.scale, gran_k, gran_k)
            first = torch.ops.sm120.gemm(*args, dtype)
            reference.assert_gemm_close(first, a.values, b.values)

            def run(out: torch.Tensor, args: tuple[object, ...] = args) -> None:
                torch.ops.sm120.gemm.out(*args, out=out)

            assert_same_each_time(run, first)


@pytest.mark.parametrize(("fmt_a", "fmt_b"), PAIRS)
@pytest.mark.parametrize(("gran_k_a", "gran_k_b"), [(32, 32), (128, 128), (128, 32)])
def test_every_configuration(fmt_a: str, fmt_b: str, gran_k_a: int, gran_k_b: int) -> None:
    """Each tile, orientation and schedule, chosen or not; full and ragged tiles."""
    for m, n, k in [(1024, 2048, 2048), (300, 1000, 2880), (40, 4000, 4096)]:
        a, b = operands(m, n, k, fmt_a, fmt_b, gran_k_a, gran_k_b)
        for config in gemm_configs.legal_configs(fmt_a, fmt_b, k):
            out = torch.full((m, n), torch.nan, device="cuda")
            first = gemm_configs.run_forced(a, b, out, config)
            reference.assert_gemm_close(first, a.values, b.values)
            assert_same_each_time(functools.partial(run_config, a=a, b=b, config=config), first)


FULL_SIZE = [
    (4096, 7168, 2048),
    (4096, 2112, 7168),
    (4096, 4096, 4096),
    (2048, 7168, 2048),
    (1024, 7168, 7168),
    (4096, 576, 7168),
    (512, 24576, 1536),
    (300, 7168, 16384),
    (64, 7168, 16384),
    (16, 7168, 16384),
]


@pytest.mark.parametrize(("fmt_a", "fmt_b"), PAIRS)
def test_every_configuration_at_full_size(fmt_a: str, fmt_b: str) -> None:
    """Ten GEMMs a configuration, every element of every repeat: a stage given back too early shows
    only so."""
    for m, n, k in FULL_SIZE:
        a, b = operands(m, n, k, fmt_a, fmt_b, 128, 128 if fmt_b == FP8 else 32)
        for config in gemm_configs.legal_configs(fmt_a, fmt_b, k):
            out = torch.full((m, n), torch.nan, device="cuda", dtype=torch.bfloat16)
            first = gemm_configs.run_forced(a, b, out, config)
            assert not first.isnan().any()
            assert_same_each_time(functools.partial(run_config, a=a, b=b, config=config), first)


def run_config(out: torch.Tensor, a: Operand, b: Operand, config: tuple[int, bool, bool]) -> None:
    gemm_configs.run_forced(a, b, out, config)


@pytest.mark.parametrize(("fmt_a", "fmt_b"), PAIRS)
def test_every_configuration_with_c_and_head_splits(fmt_a: str, fmt_b: str) -> None:
    m, n, k = 70, 384, 1056
    splits = (32, 5, 16)
    a, b = operands(m, n, k, fmt_a, fmt_b)
    columns = torch.arange(n, device="cuda")
    columns = columns + (columns + 16) // 48 * 5
    for config in gemm_configs.legal_configs(fmt_a, fmt_b, k):
        for dtype in (torch.bfloat16, torch.float32):
            c = (torch.randn(m, n // 48 * 53, device="cuda") * 1e3).to(dtype)
            out = torch.full_like(c, 77.0)
            gemm_configs.run_forced(a, b, out, config, c, splits)
            reference.assert_gemm_close(out[:, columns], a.values, b.values, c[:, columns])
            assert (out == 77.0).sum().item() >= m * 5 * n // 48
            in_place = c.clone()
            gemm_configs.run_forced(a, b, in_place, config, in_place, splits)
            assert torch.equal(in_place[:, columns], out[:, columns])


def test_quantize_is_deterministic() -> None:
    x = torch.randn(8192, 7168, device="cuda").bfloat16()
    for fmt, gran_mn in itertools.product((FP8, FP4), (1, 128)):
        data, scale = sm120_ops.quantize(x, fmt, 128, gran_mn)
        for _ in range(5):
            again, scale_again = sm120_ops.quantize(x, fmt, 128, gran_mn)
            assert torch.equal(again.view(torch.uint8), data.view(torch.uint8))
            assert torch.equal(scale_again, scale)


# ---- CUDA graphs, streams, threads ---------------------------------------------------------------


def everything(x: torch.Tensor, w: torch.Tensor) -> list[torch.Tensor]:
    """Every op once, on inputs that a graph can replay with new contents."""
    data, scale = sm120_ops.quantize(x, FP8)
    w_data, w_scale = sm120_ops.quantize(w, FP4)
    floats = sm120_ops.unpack_scales(scale, x.shape[1] // 32, torch.float32)
    packed = sm120_ops.pack_scales(floats)  # no check of the values during capture: it would sync
    columns = sm120_ops.transpose_fp4(w_data)
    codes = sm120_ops.unpack_fp4(columns)
    d = sm120_ops.gemm((data, packed), (w_data, w_scale), gran_k_a=32, gran_k_b=32)
    nn = sm120_ops.gemm_nn(
        (data, scale), (sm120_ops.pack_fp4(codes), w_scale), gran_k_a=32, gran_k_b=32, c=d
    )
    splits = sm120_ops.gemm(
        (data, floats), (w_data, w_scale), gran_k_b=32, head_splits=[8, 4, 8], out_dtype=x.dtype
    )
    values = sm120_ops.dequantize(data, scale, 32, torch.bfloat16)
    return [data.view(torch.uint8), scale, floats, packed, columns, codes, d, nn, splits, values]


@pytest.mark.parametrize("m", [1, 37, 300])
def test_graph_replay_with_new_inputs(m: int) -> None:
    torch.manual_seed(0)
    x, w = torch.randn(m, 2048, device="cuda"), torch.randn(480, 2048, device="cuda")
    everything(x, w)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = everything(x, w)
    for _ in range(5):
        x.normal_()
        w.normal_()
        graph.replay()
        for got, expected in zip(captured, everything(x, w), strict=True):
            assert torch.equal(got, expected)


def test_other_stream() -> None:
    """Work queued behind a long kernel of the same stream waits for it; no sync in between."""
    x, w = torch.randn(64, 2048, device="cuda"), torch.randn(480, 2048, device="cuda")
    expected = everything(x, w)
    late = torch.zeros_like(x)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        late.copy_(x)
        data, scale = torch.ops.sm120.quantize(late, FP8)
        w_data, w_scale = torch.ops.sm120.quantize(w, FP4)
        d = torch.ops.sm120.gemm(data, scale, w_data, w_scale, 32, 32, torch.bfloat16)
        assert not stream.query(), "the ops waited for the GPU"
    stream.synchronize()
    assert torch.equal(data.view(torch.uint8), expected[0])
    assert torch.equal(d, expected[6])


def test_threads_with_streams_of_their_own() -> None:
    x, w = torch.randn(64, 2048, device="cuda"), torch.randn(480, 2048, device="cuda")
    expected = everything(x, w)
    torch.cuda.synchronize()
    failures: list[str] = []

    def work() -> None:
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                for _ in range(20):
                    for got, want in zip(everything(x, w), expected, strict=True):
                        assert torch.equal(got, want)
        except Exception as error:
            failures.append(repr(error))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_second_device() -> None:
    x, w = torch.randn(64, 2048, device="cuda:1"), torch.randn(480, 2048, device="cuda:1")
    results = everything(x, w)
    assert all(result.device == x.device for result in results)
    for got, expected in zip(results, everything(x.to("cuda:0"), w.to("cuda:0")), strict=True):
        assert torch.equal(got.cpu(), expected.cpu())


# ---- Offsets beyond 32 bits ----------------------------------------------------------------------


def test_more_than_2_31_outputs() -> None:
    m, n, k = 70_000, 32_776, 64
    if torch.cuda.mem_get_info()[0] < 12 << 30:
        pytest.skip("needs 12 GiB of GPU memory")
    a, b = operands(m, n, k, FP8, FP8)
    d = sm120_ops.gemm(a.pair, b.pair, gran_k_a=32, gran_k_b=32)
    assert d.numel() > 1 << 31
    for row in (0, 1, 32_767, 65_535, 65_536, m - 130, m - 1):
        rows = slice(row, row + 1)
        reference.assert_gemm_close(d[rows], a.values[rows], b.values)
    columns = slice(n - 40, n)
    reference.assert_gemm_close(d[:, columns], a.values, b.values[columns])


def test_more_than_2_31_inputs() -> None:
    rows, k = 270_000, 8192
    if torch.cuda.mem_get_info()[0] < 16 << 30:
        pytest.skip("needs 16 GiB of GPU memory")
    x = torch.empty(rows, k, dtype=torch.bfloat16, device="cuda").normal_()
    data, scale = sm120_ops.quantize(x)
    assert data.numel() > 1 << 31
    for row in (0, 262_143, 262_144, rows - 3):
        one = sm120_ops.quantize(x[row : row + 3].cpu())
        assert torch.equal(data[row : row + 3].cpu().view(torch.uint8), one[0].view(torch.uint8))
        assert torch.equal(scale[row : row + 3].cpu(), one[1])
    w = sm120_ops.quantize(torch.randn(16, k, device="cuda"))
    d = sm120_ops.gemm((data, scale), w, gran_k_a=32, gran_k_b=32, out_dtype=torch.float32)
    tail = sm120_ops.gemm(
        sm120_ops.quantize(x[-64:]), w, gran_k_a=32, gran_k_b=32, out_dtype=torch.float32
    )
    torch.testing.assert_close(d[-64:], tail, rtol=1e-4, atol=1e-2)
