"""The tile scheduler on a simulated warp: every tile once, in even shares, for random products.

tile_scheduler/tile_scheduler.cpp runs the library's own scheduler on the host. As in
test_lane_maps.py, nvcc only drives the host compiler.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ROOT / "tests" / "tile_scheduler"


def test_every_tile_once(toolchain: tuple[Path, Path], tmp_path: Path) -> None:
    program = tmp_path / "tile_scheduler"
    options = ["-std=c++17", "-O1", "-cudart=none", "-Xcompiler=-w"]
    options += [f"-I{folder}" for folder in (SOURCES / "shim", SOURCES, ROOT / "csrc")]
    command: list[str | Path] = [toolchain[0], *options, SOURCES / "tile_scheduler.cpp"]
    compiled = subprocess.run([*command, "-o", program], capture_output=True, text=True)
    assert compiled.returncode == 0, compiled.stderr
    ran = subprocess.run([program], capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stdout + ran.stderr
