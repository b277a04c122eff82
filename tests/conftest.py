"""Devices for the tests: every test that takes `device` runs on the CPU and, where there is a GPU
that the kernels support, on the GPU too. Tests marked `gpu` need that GPU and are skipped without.
"""

from __future__ import annotations

import functools
import importlib.util
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


@functools.cache
def missing_gpu() -> str:
    """Why the GPU tests cannot run on this machine; empty if they can."""
    if not torch.cuda.is_available():
        return "no CUDA GPU on this machine"
    major, minor = torch.cuda.get_device_capability()
    if (major, minor) == (9, 0) or major == 12:
        return ""
    return f"the GPU has compute capability {major}.{minor}; the kernels run on 9.0 and 12.x"


def pytest_report_header() -> str:
    return f"GPU tests: {'skipped, ' + missing_gpu() if missing_gpu() else 'on'}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if {"toolchain", "wheel"} & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.source)
        if item.get_closest_marker("source") and not (ROOT / "setup.py").is_file():
            item.add_marker(pytest.mark.skip(reason="no source tree beside the tests"))
        if item.get_closest_marker("sanitizer") or item.get_closest_marker("determinism"):
            item.add_marker(pytest.mark.gpu)
        if item.get_closest_marker("gpu") and missing_gpu():
            item.add_marker(pytest.mark.skip(reason=missing_gpu()))


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def no_cuda_error_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """A test that ends with the GPU in an error state fails itself, not the one after it."""
    yield
    if request.node.get_closest_marker("gpu") and torch.cuda.is_initialized():
        torch.cuda.synchronize()


@pytest.fixture
def filled_allocations() -> Iterator[None]:
    """torch fills whatever it allocates.

    The flags of a split product (device/flag.cuh) are read before anyone has written them, and may
    hold anything until then. Initcheck cannot know: here they hold torch's filling.
    """
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def toolchain() -> tuple[Path, Path]:
    """nvcc and the CuTe headers, found as the build finds them."""
    spec = importlib.util.spec_from_file_location("sm120_ops_setup", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    setup_py = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(setup_py)
    if shutil.which("g++") is None:
        pytest.skip("no g++ on PATH")
    try:
        return setup_py.require_nvcc().path, setup_py.require_cutlass()
    except SystemExit as missing:
        pytest.skip(str(missing))
