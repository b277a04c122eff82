"""The lane maps of the warp tiles against CuTe's MMA_Traits for SM120, on a simulated warp.

lane_map/lane_map.cpp runs the library's own fragment loaders, warp MMA and epilogue on the host for
every compiled tile, and lays out by CuTe's A, B, C, SFA and SFB layouts what they hand to each MMA.
It takes the toolchain of the build: nvcc only drives the host compiler here, no GPU code is built.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ROOT / "tests" / "lane_map"


@pytest.mark.parametrize("target", ["native", "emulated"])
def test_lane_maps_equal_cute(target: str, toolchain: tuple[Path, Path], tmp_path: Path) -> None:
    nvcc, cute = toolchain
    program = tmp_path / "lane_map"
    # The folders before csrc replace its PTX. Warnings are CuTe's, and about unused PTX wrappers.
    options = ["-std=c++17", "-cudart=none", "-Xcompiler=-w"]
    options += [f"-I{folder}" for folder in (SOURCES / "shim", SOURCES, ROOT / "csrc", cute)]
    options.append(f"-DSIMULATE_NATIVE={int(target == 'native')}")
    command: list[str | Path] = [nvcc, *options, SOURCES / "lane_map.cpp", "-o", program]
    compiled = subprocess.run(command, capture_output=True, text=True)
    assert compiled.returncode == 0, compiled.stderr
    ran = subprocess.run([program], capture_output=True, text=True, timeout=120)
    print(ran.stdout)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert ran.stdout.endswith("lane maps equal CuTe's\n")
