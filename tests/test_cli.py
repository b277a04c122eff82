"""The command line, the device report and the self-test."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from op_samples import registered
from torch.utils._python_dispatch import TorchDispatchMode

from sm120_ops import bench, device, selftest
from sm120_ops.__main__ import main
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
    ("driver", "cuda", "needed"),
    [
        ("570.86.10", "13.0.88", 580),
        ("580.65.06", "13.0.88", None),
        (None, "13.0.88", None),
        ("570.86.10", "12.9.86", None),
        ("550.54.14", "12.9.86", 570),
    ],
)
def test_driver(driver: str | None, cuda: str, needed: int | None) -> None:
    problem = device.driver_problem(driver, cuda)
    assert (problem is not None) == (needed is not None)
    if problem is not None:
        assert f"NVIDIA driver {driver}" in problem.found
        assert f"driver {needed}" in problem.needed
        assert f"nvidia-driver-{needed}" in problem.run
        assert ("+cu129" in problem.run) == (needed == 580)


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


def test_bench_help_names_every_family(capsys: pytest.CaptureFixture[str]) -> None:
    """And every file of the benchmark that has lines is a family."""
    with pytest.raises(SystemExit):
        main(["bench", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert f"some of {', '.join(bench.FAMILIES)}; default: all" in text
    folder = Path(bench.__file__).parent
    with_lines = {
        path.stem for path in folder.glob("*.py") if "def run(context: Context)" in path.read_text()
    }
    assert with_lines == set(bench.FAMILIES)


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
    assert {entry["family"] for entry in report["summary"]} == set(selftest.all_cases(quick=True))
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
    assert not any(quantized.errors(got).values())
    got["data"][2, 3] ^= 1
    assert quantized.errors(got)["data"] == 1

    product = cases.GemmCase(5, 24, 128, ("mxfp8", "mxfp4"), out_dtype=torch.bfloat16, pad=8)
    out = product.run(cpu)["out"]
    assert product.error(out) <= 1
    for wrong in (out[2, 3] * 1.05, torch.tensor(float("nan"))):
        changed = out.clone()
        changed[2, 3] = wrong
        assert not product.error(changed) <= 1
    outside = out.clone()
    outside[0, -1] = 0  # the gap between rows belongs to nobody
    assert not product.error(outside) <= 1


class Seen(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "sm120":
            self.names.add(func._schema.name.removeprefix("sm120::"))
        return func(*args, **(kwargs or {}))


def test_selftest_runs_every_op() -> None:
    with torch.no_grad(), Seen() as seen:
        for members in selftest.all_cases(quick=True).values():
            for case in members:
                case.run(torch.device("cpu"))
    inside = {"moe_route", "moe_activation", "moe_combine"}  # of moe, whose kernel calls them
    assert seen.names | inside == {name.partition(".")[0] for name in registered()}


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
