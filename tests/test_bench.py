"""The benchmark: its arithmetic, its marks, and every family on stubs in place of a GPU."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sm120_ops import bench, device
from sm120_ops._console import UsageError
from sm120_ops.bench import (
    bf16,
    bf16_grouped,
    gemm,
    grouped,
    hc_prenorm,
    k_grouped,
    moe,
    moe_steps,
    overhead,
    peers,
    quantize,
)
from sm120_ops.bench import report as bench_report
from sm120_ops.bench.ceilings import ATOMS, Ceilings, atom_of
from sm120_ops.bench.context import Context
from sm120_ops.bench.record import (
    Line,
    Mark,
    gemm_bytes,
    gemm_flops,
    quantize_bytes,
    scale_bytes,
)
from sm120_ops.bench.timing import Timer, Timing, measure_host_us

NO_GPU = pytest.mark.skipif(device.is_supported(), reason="there is a GPU that runs the kernels")


@NO_GPU
def test_bench_without_gpu() -> None:
    command = [sys.executable, "-m", "sm120_ops", "bench", "--quick"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "needs a GPU" in done.stderr
    assert "found" in done.stderr
    assert "Traceback" not in done.stderr


def test_bytes_are_counted_once() -> None:
    # A 4x256 FP8 (1024) and B 8x256 FP8 (2048); scales of 2 groups: one word for each row, rows in
    # fours (16 + 32); D 4x8 BF16 (64).
    assert gemm_bytes(4, 8, 256, ("mxfp8", "mxfp8"), (128, 128)) == 1024 + 2048 + 16 + 32 + 64
    assert gemm_bytes(4, 8, 256, ("mxfp4", "mxfp8"), (32, 128)) == 512 + 2048 + 32 + 32 + 64
    assert gemm_bytes(4, 8, 256, ("bf16", "bf16"), (0, 0)) == 2 * 256 * 12 + 64
    assert scale_bytes(1, 2880, 128) == 4 * 6 * 4  # 23 groups in 6 words, 1 row padded to 4
    assert quantize_bytes(4, 256, "mxfp4", 32) == 4 * 256 * 2 + 512 + 32
    assert gemm_flops(2, 3, 5) == 60


def test_derived_figures() -> None:
    line = Line(
        "gemm", "mxfp8", "", "sm120_ops", us=10.0, flops=2 * 10**9, bytes=20 * 10**6,
        weight_bytes=10**7, ceiling_tflops=400.0, copy_gbps=4000.0,
    )  # fmt: skip
    assert line.tflops == pytest.approx(200.0)
    assert line.gbps == pytest.approx(2000.0)
    assert line.tbps == pytest.approx(2.0)
    assert line.weight_tbps == pytest.approx(1.0)
    assert line.ceiling_share == pytest.approx(0.5)
    assert line.copy_share == pytest.approx(0.5)
    assert line.intensity == pytest.approx(100.0)
    failed = Line("gemm", "fp8", "", "torch", us=None, flops=1, bytes=1, note="does not run")
    assert failed.tflops is None
    assert failed.gbps is None
    assert bench_report.row(failed)[-2] == "does not run"


def test_marks() -> None:
    line = Line("gemm", "mxfp8", "", "sm120_ops", us=11.0)
    fast = Mark("us", "<=", 12, "us", gpu="H200")
    assert fast.verdict(line, "NVIDIA H200") == "pass"
    assert fast.verdict(line, "NVIDIA GeForce RTX 5090") == ""
    assert Mark("us", "<=", 10, "us").verdict(line, "") == "short"
    assert Mark("ceiling_share", ">=", 0.8, "% of atom").verdict(line, "") == ""
    assert str(Mark("ceiling_share", ">=", 0.8, "% of atom")) == ">= 80 % of atom"
    assert str(fast) == "<= 12 us"
    with pytest.raises(ValueError, match="expected >= or <="):
        Mark("us", "<", 1, "us")


def test_atoms_of_formats() -> None:
    assert atom_of(("mxfp8", "mxfp8"), (128, 128)) == "mxfp8_gran128"
    assert atom_of(("mxfp8", "mxfp8"), (32, 128)) == "mxfp8_gran32"
    assert atom_of(("mxfp4", "mxfp4"), (32, 32)) == "mxfp4"
    assert atom_of(("mxfp8", "mxfp4"), (128, 32)) == "mxfp8_mxfp4"


@pytest.mark.parametrize("mode", ["quick", "standard", "full"])
def test_gemm_cases(mode: str) -> None:
    listed = list(gemm.cases(mode))
    assert len(listed) == len(set(listed))
    for case in listed:
        assert case.K % (32 if "mxfp4" in case.formats else 16) == 0
    marked = {(c.M, c.N, c.K) for c in listed if c.mark is not None}
    assert {(1, 7168, 16384), (16, 7168, 16384), (1, 2112, 7168), (128, 2112, 7168)} <= marked
    assert {(128, 7168, 2048), (4096, 7168, 16384)} <= marked


class HostTimer:
    """Runs the work once; there are no CUDA events on a CPU."""

    floor_us = 1.0

    def measure(self, launch: Any) -> Timing:
        launch()
        return Timing(us=10.0, best_us=9.0, runs=1)


@pytest.fixture
def context() -> Context:
    ceilings = Ceilings(copy_gbps=4000.0, atom_tflops=dict.fromkeys(ATOMS, 400.0))
    timer: Any = HostTimer()
    return Context(torch.device("cpu"), "NVIDIA H200", timer, ceilings, "standard", True)


def test_gemm_lines(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    table = (
        gemm.Case(4, 16, 256, gemm.FP8_128, gemm.WEIGHTS),
        gemm.Case(32, 48, 256, gemm.FP8_32, gemm._at_most(20)),
        gemm.Case(32, 48, 256, gemm.FP4),
        gemm.Case(32, 48, 256, gemm.W4A8, gemm._share(0.75)),
    )
    monkeypatch.setattr(gemm, "TABLE", table)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    lines = list(gemm.run(context))
    ours = [line for line in lines if line.provider == "sm120_ops"]
    assert len(ours) == 4
    for line in ours:
        assert line.diff is not None
        assert line.diff < (1e-3 if "mxfp4" not in line.name else 2e-2)
    assert [line.verdict for line in ours] == ["short", "pass", "", "short"]
    assert ours[2].weight_bytes == 48 * 128
    matmul = [line for line in lines if line.provider == "torch.matmul"]
    assert [line.shape for line in matmul] == ["4x16x256", "32x48x256"]
    table_text = [bench_report.row(line) for line in lines]
    assert all(len(cells) == 3 + len(bench_report.NUMBERS) for cells in table_text)


def test_bf16_lines(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    table = tuple(bf16.Case(24, 40, 64, layout) for layout in ("nt", "nn", "tn", "tt"))
    monkeypatch.setattr(bf16, "TABLE", (*table, bf16.Case(1, 48, 64, mark=bf16._at_most(14))))
    monkeypatch.setattr(bf16_grouped, "lines", lambda context: iter(()))
    lines = list(bf16.run(context))
    ours = [line for line in lines if line.provider == "sm120_ops"]
    assert len(lines) == 2 * len(ours) == 10
    assert all(line.diff is not None and line.diff < 1e-5 for line in ours)
    assert ours[-1].verdict == "pass"
    assert ours[0].bytes == 2 * 64 * 64 + 2 * 24 * 40


def test_bf16_grouped_lines(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    small = grouped.Model(64, 24, 2, 40, gemm.FP8_128)  # three experts on each GPU
    monkeypatch.setitem(grouped.MODELS, "small", small)
    monkeypatch.setitem(bf16_grouped.MODELS, "standard", ("small",))
    monkeypatch.setitem(bf16_grouped.TOKENS, "standard", (1, 60))
    monkeypatch.setitem(k_grouped.SHAPES, "standard", (k_grouped.Shape(4, 32, 64, 384),))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    lines = list(bf16_grouped.lines(context))
    ours = [line for line in lines if line.provider == "sm120_ops"]
    names = [line.name.rsplit(", ")[-1] for line in ours]
    assert names == ["contiguous", "psum", "masked"] * 4 + ["k-grouped tn"]
    with_rows = [line for line in ours if line.flops]
    assert len(with_rows) > len(ours) // 2
    assert all(line.diff is not None and line.diff < 1e-5 for line in with_rows)
    gate_up = next(line for line in ours if "60 tokens" in line.name)
    assert gate_up.weight_bytes == 3 * 80 * 64 * 2
    assert gate_up.shape.endswith("on 3/3 80x64")
    loops = [line for line in lines if line.provider.startswith("torch.matmul")]
    assert len(loops) == 5
    assert all(line.us for line in loops), [line.note for line in loops]


def test_bf16_grouped_batches() -> None:
    batch = bf16_grouped.Batch((3, 0, 17), 16)
    assert batch.starts == [0, 16, 16, 48]
    assert batch.ends == [3, 16, 33]
    assert batch.m_indices == [0] * 3 + [-1] * 13 + [2] * 17 + [-1] * 15
    for mode in ("quick", "standard", "full"):
        names = [weights.name for _, weights in bf16_grouped.weights_of(mode)]
        assert "DeepSeek-V4-Flash gate_up" in names
        assert len(names) == len(set(names))


def test_hc_prenorm_lines(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    table = (hc_prenorm.Case(5, 128, mark=hc_prenorm._at_most(1)), hc_prenorm.Case(5, 128, 2))
    monkeypatch.setattr(hc_prenorm, "TABLE", table)
    lines = list(hc_prenorm.run(context))
    ours = [line for line in lines if line.provider == "sm120_ops"]
    assert [line.verdict for line in ours] == ["short", ""]
    assert all(line.diff is not None and line.diff < 1e-7 for line in ours)
    assert ours[1].bytes - ours[0].bytes == 5 * 25 * 4
    assert len(lines) == 3


def test_a_peer_that_fails_is_a_line(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)

    def broken() -> None:
        raise RuntimeError("no kernel for this shape\nand more")

    line = context.time_peer(broken, family="gemm", name="x", shape="1x1x1", provider="peer")
    assert line.us is None
    assert line.note == "does not run: no kernel for this shape"


def test_peer_quantises_within_range() -> None:
    x = torch.randn(16, 64) * 100
    for dim in (None, 1):
        data, scale = peers._quantize_fp32_scale(x, dim)
        assert (data.float() * scale - x).abs().max() < 0.07 * x.abs().max()


def test_quantize_lines(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(quantize.SHAPES, "standard", ((64, 256),))
    lines = list(quantize.run(context))
    assert len(lines) == len(quantize.CASES)
    assert all(line.gbps for line in lines)
    assert all(line.mark is None for line in lines)  # marks belong to the big shape


def test_moe_lines(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    small = moe.Model("small", 64, 4, 2, 32, "w4a8", 32, "gpt-oss", bias=True)
    cases = [moe.Case(small, 5), moe.Case(small, 3, "one"), moe.Case(small, 3, "none")]
    monkeypatch.setattr(moe, "cases", lambda mode: iter(cases))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    lines = list(moe.run(context))
    ours = [line for line in lines if line.provider == "sm120_ops"]
    assert [line.shape for line in ours] == [f"small T={c.tokens} {c.routing}" for c in cases]
    assert ours[1].weight_bytes == 64 * 64 // 2 + 32 * 64 // 2  # of the one expert that is hit
    assert ours[2].weight_bytes == ours[2].flops == 0
    assert ours[0].flops == 5 * 2 * 3 * 2 * 64 * 32
    for line in lines:
        if line.provider == "unfused ops":
            assert line.diff is not None
            assert line.diff < 1e-3
    assert any(line.provider == "torch._scaled_mm loop" for line in lines)


def test_moe_step_lines(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moe_steps, "V4_FLASH", moe.Model("small", 64, 4, 2, 32, "w4a8", 32))
    monkeypatch.setitem(moe_steps.TOKENS, "standard", (3,))
    lines = list(moe_steps.run(context))
    assert [line.name.split()[0] for line in lines[:3]] == ["route", "activation", "combine"]
    assert len(lines) == 2 * len(moe_steps.FORMATS) + 1
    assert all(line.gbps for line in lines)


@pytest.mark.parametrize("mode", ["quick", "standard", "full"])
def test_moe_cases(mode: str) -> None:
    listed = list(moe.cases(mode))
    assert len(listed) == len(set(listed))
    models = [case.model for case in listed]
    assert [m for m, n in zip(models, [None, *models], strict=False) if m != n] == list(
        dict.fromkeys(models)
    )  # the cases of a model stand together


def test_routings_of_the_benchmark() -> None:
    for kind in ("uniform", "zipf", "few"):
        counts = grouped.routing(kind, 40, 6, 64)
        assert len(counts) == 64
        assert sum(counts) == 240
    assert max(grouped.routing("zipf", 40, 6, 64)) > max(grouped.routing("uniform", 40, 6, 64))
    assert sum(count > 0 for count in grouped.routing("few", 4000, 6, 64)) == 20
    assert grouped.routing("one", 40, 6, 4) == (40, 0, 0, 0)
    assert sum(grouped.routing("none", 40, 6, 64)) == 0
    assert [sum(c.counts) for c in grouped.TABLE[:3]] == [40, 40, 40]
    assert all(len(c.hit) == 20 for c in grouped.TABLE[:3])
    for mode in ("quick", "standard", "full"):
        listed = list(grouped.model_cases(mode))
        assert len(listed) == len(set(listed))
    names = {case.name for case in grouped.model_cases("full")}
    assert "gpt-oss-120b down, 4096 tokens, zipf" in names


def test_grouped_lines(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = (3, 0, 20, 0, 1)
    small = grouped.Case("small", counts, 24, 128, gemm.FP8_128, 16, True)
    table = (
        dataclasses.replace(small, mark=grouped._at_most(120)),
        dataclasses.replace(small, empty_segments=5, mark=grouped.EMPTY_COST, compare="alone"),
        dataclasses.replace(small, operands=gemm.W4A8, mark=grouped.DENSE_SHARE, compare="dense"),
        dataclasses.replace(small, contiguous=False, mark=grouped.HIT_WEIGHTS),
    )
    monkeypatch.setattr(grouped, "TABLE", table)
    monkeypatch.setattr(grouped, "MODELS", {"tiny": grouped.Model(64, 8, 2, 32, gemm.W4A8)})
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    lines = list(grouped.run(context))
    ours = [line for line in lines if line.provider == "sm120_ops"]
    assert len(ours) == 4 + 2 * 3
    for line in ours:
        assert line.diff is not None
        assert line.diff < (1e-3 if "mxfp4" not in line.name else 2e-2)
    assert [line.verdict for line in ours[:4]] == ["pass", "pass", "pass", "short"]
    assert ours[1].relative == 1.0
    assert ours[0].weight_bytes == 3 * 24 * 128
    assert ours[0].shape == "24 on 3/5 24x128"
    tokens = grouped.make_tokens(table[1], torch.device("cpu"))
    assert len(tokens.index) == 16 * (4 + 5)
    assert {line.provider for line in lines if "torch" in line.provider}


def test_overhead_lines(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    def once(call: Callable[[], object], device: torch.device, *, quick: bool) -> float:
        call()
        return 5.0

    monkeypatch.setattr(overhead, "measure_host_us", once)
    lines = list(overhead.run(context))
    assert lines[0].name == "torch.ops.sm120.gemm.out"
    assert lines[0].verdict == "pass"
    assert {line.provider for line in lines} == {"sm120_ops", "torch.matmul"}


def test_host_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    calls: list[int] = []
    us = measure_host_us(lambda: calls.append(1), torch.device("cpu"), quick=True)
    assert 0 < us < 100
    assert len(calls) == 11 * 100


def test_timer(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(10**6))

    class Event:
        def __init__(self, enable_timing: bool):
            assert enable_timing

        def record(self) -> None:
            self.at = next(clock)

        def elapsed_time(self, end: Event) -> float:
            return float(end.at - self.at)

    props = SimpleNamespace(L2_cache_size=1 << 10, total_memory=1 << 20)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: props)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    rests: list[float] = []
    monkeypatch.setattr(time, "sleep", rests.append)
    timer = Timer(torch.device("cpu"), flush="read")
    assert timer.flush_buffer.nbytes == (1 << 20) // 8  # an eighth of the memory at most
    launches = []
    rests.clear()
    timing = timer.measure(lambda: launches.append(1))
    assert timing.us == 1e3
    assert len(rests) == timing.runs * timing.us / Timer.BURST_US
    assert len(launches) == 2 + 3 + timing.runs + len(rests)
    rests.clear()
    monkeypatch.setattr(Timer, "BURST_US", 1e3 * timing.runs)
    assert timer.measure(lambda: None).runs == timing.runs
    assert not rests
    with pytest.raises(ValueError, match="flush"):
        Timer(torch.device("cpu"), flush="nothing")


def test_whole_bench_on_stubs(
    context: Context,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(gemm, "TABLE", (gemm.Case(4, 16, 256, gemm.FP8_128, gemm.WEIGHTS),))
    monkeypatch.setattr(bench, "is_supported", lambda: True)
    monkeypatch.setattr(bench, "measure_ceilings", lambda device: context.ceilings)
    monkeypatch.setattr(bench, "Timer", lambda *args, **kwargs: HostTimer())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    path = tmp_path / "bench.json"
    code = bench.run_bench(
        ["gemm"], mode="standard", with_peers=False, flush="write", json_path=path, plot_path=None
    )
    assert code == 0
    data = json.loads(path.read_text())
    assert {"environment", "date", "command", "ceilings", "lines"} <= data.keys()
    (line,) = data["lines"]
    assert line["mark"] == ">= 2.8 TB/s weights"
    assert line["shape"] == "4x16x256"
    assert "bare MMA loop" in capsys.readouterr().out


def test_plot_says_what_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UsageError, match="pip install matplotlib"):
        bench.run_bench(
            None,
            mode="quick",
            with_peers=False,
            flush="write",
            json_path=None,
            plot_path=tmp_path / "plot.png",
        )


def test_k_grouped_lines(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = k_grouped.Shape(4, 32, 64, 384)
    assert shape.ks == [256, 384, 512, 384]
    monkeypatch.setitem(k_grouped.SHAPES, "standard", (shape,))
    lines = list(k_grouped.run(context))
    assert len(lines) == 3 * len(k_grouped.FORMATS) + 1
    assert all(line.us == 10.0 for line in lines), [line.note for line in lines]
