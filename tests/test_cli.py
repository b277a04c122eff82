"""The command line, the device report, the benchmark's arithmetic and the self-test."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sm120_ops import bench, device, selftest
from sm120_ops.__main__ import main
from sm120_ops._console import UsageError
from sm120_ops.bench import gemm, overhead, peers, quantize
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
from sm120_ops.selftest import cases, formulas

NO_GPU = pytest.mark.skipif(device.is_supported(), reason="there is a GPU that runs the kernels")


def run(*args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "sm120_ops", *args]
    return subprocess.run(command, capture_output=True, text=True)


# ---- info and device -----------------------------------------------------------------------------


def test_info_json() -> None:
    done = run("info", "--json")
    assert done.returncode == 0, done.stderr
    data = json.loads(done.stdout)
    wanted = {"package", "build", "kernels_loaded", "python", "platform", "torch", "torch_cuda"}
    wanted |= {"driver", "gpu", "gpu_count", "capability", "sms", "shared_memory_per_block"}
    wanted |= {"l2_bytes", "memory_bytes", "target", "reason", "problems", "device"}
    assert wanted <= data.keys()
    assert data["torch"] == torch.__version__
    assert data["kernels_loaded"]


def test_info_is_plain_text_in_a_pipe() -> None:
    done = run("info")
    assert done.returncode == 0
    assert "\x1b" not in done.stdout
    assert "target" in done.stdout


@pytest.mark.parametrize(
    ("capability", "label"),
    [
        ((12, 0), device.NATIVE),
        ((12, 1), device.NATIVE),
        ((9, 0), device.EMULATED),
        (None, device.CPU_REFERENCE),
        ((10, 0), device.UNSUPPORTED),
        ((10, 3), device.UNSUPPORTED),
        ((11, 0), device.UNSUPPORTED),
        ((8, 9), device.UNSUPPORTED),
        ((13, 0), device.UNSUPPORTED),
    ],
)
def test_target(capability: tuple[int, int] | None, label: str) -> None:
    target = device.target_for(capability)
    assert target.label == label
    assert target.runs_kernels == (label in (device.NATIVE, device.EMULATED))
    if label == device.UNSUPPORTED:
        assert capability is not None
        assert f"{capability[0]}.{capability[1]}" in target.reason
        assert "12.x" in target.reason


def fake_gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], name: str) -> None:
    props = SimpleNamespace(
        name=name,
        major=capability[0],
        minor=capability[1],
        multi_processor_count=188,
        shared_memory_per_block_optin=101376,
        L2_cache_size=128 << 20,
        total_memory=96 << 30,
        uuid="00000000-0000-0000-0000-000000000000",
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: props)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    monkeypatch.setattr(device, "kernels_loaded", lambda: True)


@pytest.mark.parametrize(
    ("capability", "name", "supported"),
    [((12, 1), "NVIDIA GB10", True), ((9, 0), "NVIDIA H200", True), ((10, 0), "B200", False)],
)
def test_describe_a_gpu(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], name: str, supported: bool
) -> None:
    fake_gpu(monkeypatch, capability, name)
    environment = device.describe()
    assert environment.gpu == name
    assert environment.device == "cuda:0"
    assert environment.sms == 188
    assert environment.shared_memory_per_block == 101376
    assert environment.target == device.target_for(capability).label
    assert device.is_supported() == supported
    assert not device.is_supported("cpu")
    assert not device.is_supported("cuda:1")
    assert device.describe("cpu").target == device.CPU_REFERENCE
    json.dumps(environment.to_json())


def test_describe_rejects_other_devices() -> None:
    with pytest.raises(ValueError, match=r"sm120_ops\.describe: device: expected .*, got xpu"):
        device.describe("xpu")


def test_describe_without_cuda() -> None:
    environment = device.describe(init_cuda=False)
    assert environment.device == "cpu"
    assert environment.sms is None


@pytest.mark.parametrize(
    ("driver", "old"), [("570.86.10", True), ("580.65.06", False), (None, False)]
)
def test_driver(driver: str | None, old: bool) -> None:
    problem = device.driver_problem(driver, "13.0")
    assert (problem is not None) == old
    if problem is not None:
        assert "570.86.10" in problem.found
        assert "580" in problem.needed
        assert "nvidia-driver-580" in problem.run


def test_import_leaves_cuda_alone() -> None:
    code = "import sm120_ops, sm120_ops.device, torch; assert not torch.cuda.is_initialized()"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_wrong_arguments(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for args in ([], ["nonsense"], ["bench", "--quick", "--full"]):
        with pytest.raises(SystemExit) as stop:
            main(args)
        assert stop.value.code == 2
    capsys.readouterr()
    assert main(["bench", "--families", "nonsense"]) == 2
    assert "nonsense" in capsys.readouterr().err
    assert main(["selftest", "--report", str(tmp_path / "none" / "report.json")]) == 2
    assert "report.json" in capsys.readouterr().err


# ---- bench ---------------------------------------------------------------------------------------


@NO_GPU
def test_bench_without_gpu() -> None:
    done = run("bench", "--quick")
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
    timer = Timer(torch.device("cpu"), flush="read")
    assert timer.flush_buffer.nbytes == (1 << 20) // 8  # an eighth of the memory at most
    launches = []
    timing = timer.measure(lambda: launches.append(1))
    assert timing.us == 1e3
    assert len(launches) == 2 + 3 + timing.runs
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


# ---- selftest ------------------------------------------------------------------------------------


@pytest.mark.parametrize("fmt", ["mxfp8", "mxfp4"])
def test_formulas_know_the_formats(fmt: str) -> None:
    values = formulas.code_values(fmt)
    if fmt == "mxfp8":
        want = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    else:
        half = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)
        want = torch.cat([half, -half])
    torch.testing.assert_close(values, want, rtol=0, atol=0, equal_nan=True)
    rounded = formulas.round_to_format(values.nan_to_num(0), fmt, "ocp")
    assert torch.equal(rounded, values.nan_to_num(0))


def selftest_report(folder: Path, *args: str) -> dict[str, Any]:
    """Runs the quick self-test in ``folder``, where the report goes by default."""
    assert main(["selftest", "--quick", *args]) == 0
    (path,) = folder.glob("sm120_ops-selftest-*.json")
    report: dict[str, Any] = json.loads(path.read_text())
    assert report["failed"] == 0
    assert report["comparisons"] > 200
    assert {entry["family"] for entry in report["summary"]} == {"quantize", "layout", "gemm"}
    return report


@NO_GPU
def test_selftest_without_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    report = selftest_report(tmp_path)
    assert "No GPU kernel ran" in capsys.readouterr().out
    assert not report["gpu_kernels_ran"]
    assert report["environment"]["target"] == device.CPU_REFERENCE
    assert report["bench"] is None


@pytest.mark.gpu
def test_selftest_on_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert selftest_report(tmp_path, "--no-bench")["gpu_kernels_ran"]


def test_selftest_notices_wrong_results() -> None:
    cpu = torch.device("cpu")
    quantized = cases.QuantizeCase(5, 96, "mxfp8")
    got = quantized.run(cpu)
    assert not any(selftest.formula_errors(quantized, got).values())
    got["data"][2, 3] ^= 1
    assert selftest.formula_errors(quantized, got)["data"] == 1

    product = cases.GemmCase(5, 24, 128, ("mxfp8", "mxfp4"), out_dtype=torch.bfloat16, pad=8)
    want = selftest.gemm_formula(product)
    out = product.run(cpu)["out"]
    assert selftest.gemm_error(product, out, want) <= 1
    for wrong in (out[2, 3] * 1.05, torch.tensor(float("nan"))):
        changed = out.clone()
        changed[2, 3] = wrong
        assert not selftest.gemm_error(product, changed, want) <= 1
    outside = out.clone()
    outside[0, -1] = 0  # the gap between rows belongs to nobody
    assert not selftest.gemm_error(product, outside, want) <= 1


def test_selftest_reports_a_case_that_raises() -> None:
    def check(family: str, case: object) -> list[selftest.Outcome]:
        raise RuntimeError("launch failed")

    (outcome,) = selftest.run_cases(check, {"layout": [cases.LayoutCase(1, 1)]}, "cuda:0")
    assert not outcome.ok
    assert "launch failed" in outcome.message


def test_gpu_check_compares_and_repeats() -> None:
    """The GPU's procedure with the CPU in its place: all equal, in every family."""
    for family, members in selftest.all_cases(quick=True).items():
        outcomes = list(selftest.check_on_gpu(family, members[0], torch.device("cpu")))
        assert outcomes
        assert all(outcome.ok for outcome in outcomes)
        kinds = {outcome.against for outcome in outcomes}
        assert {selftest.REFERENCE, selftest.RERUN} <= kinds
