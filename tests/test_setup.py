"""setup.py: which toolchain it takes, and what it says when something is missing or too old."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.source


@pytest.fixture
def setup_py(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """setup.py as a module, on a machine without any CUDA."""
    spec = importlib.util.spec_from_file_location("sm120_ops_setup", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.setattr(module, "pypi_cuda_dirs", list)
    return module


def fake_nvcc(root: Path, release: str) -> Path:
    """A toolkit folder whose nvcc says only its version."""
    nvcc = root / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {release}, V{release}.88'\n")
    nvcc.chmod(0o755)
    return nvcc


def message(raised: pytest.ExceptionInfo[SystemExit]) -> str:
    return str(raised.value.code)


def test_no_nvcc(setup_py: ModuleType) -> None:
    with pytest.raises(SystemExit) as raised:
        setup_py.require_nvcc()
    text = message(raised)
    assert "nvcc: expected a CUDA 13 release, 13.0 or newer, got none" in text
    assert "run: " in text
    assert '"nvidia-cuda-nvcc==13.0.88"' in text


def test_old_nvcc(setup_py: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nvcc = fake_nvcc(tmp_path, "12.8")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    with pytest.raises(SystemExit) as raised:
        setup_py.require_nvcc()
    assert f"got nvcc 12.8.88 at {nvcc} (CUDA_HOME)" in message(raised)


def test_cuda_12_9_build(
    setup_py: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SM120_OPS_CUDA=12.9: that toolkit and no other, and a version that says so."""
    monkeypatch.setattr(setup_py, "CUDA", "12.9")
    assert setup_py.version().endswith("+cu129")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "new"))
    fake_nvcc(tmp_path / "new", "13.0")
    with pytest.raises(SystemExit) as raised:
        setup_py.require_nvcc()
    assert "nvcc: expected CUDA 12.9, got nvcc 13.0.88" in message(raised)
    assert not [wheel for wheel in setup_py.missing_tools() if wheel.startswith("nvidia")]
    nvcc = fake_nvcc(tmp_path / "old", "12.9")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "old"))
    assert setup_py.require_nvcc().path == nvcc


def test_unknown_cuda_build(setup_py: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setup_py, "CUDA", "11")
    with pytest.raises(SystemExit) as raised:
        setup_py.version()
    assert "SM120_OPS_CUDA: expected 13 or 12.9, got '11'" in message(raised)


def test_revision(setup_py: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the variable, else from the file that an sdist holds, else from git, else unknown."""
    file = tmp_path / "REVISION"
    monkeypatch.setattr(setup_py, "REVISION_FILE", file)
    monkeypatch.setattr(setup_py, "ROOT", tmp_path)
    assert setup_py.revision() == ""
    file.write_text("0123456789ab\n")
    assert setup_py.revision() == "0123456789ab"
    monkeypatch.setenv("SM120_OPS_REVISION", "ba9876543210")
    assert setup_py.revision() == "ba9876543210"


def test_missing_nvcc_is_a_build_requirement(setup_py: ModuleType, tmp_path: Path) -> None:
    wanted = setup_py.missing_tools()
    assert set(setup_py.NVCC_WHEELS) < set(wanted)
    assert any(requirement.startswith("cmake") for requirement in wanted)


def test_preference(setup_py: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheels = fake_nvcc(tmp_path / "wheels", "13.0")
    monkeypatch.setattr(setup_py, "pypi_cuda_dirs", lambda: [tmp_path / "wheels"])
    assert setup_py.require_nvcc().path == wheels
    on_path = fake_nvcc(tmp_path / "path", "13.1")
    monkeypatch.setenv("PATH", str(on_path.parent))
    assert setup_py.require_nvcc().path == on_path
    home = fake_nvcc(tmp_path / "home", "13.0")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    assert setup_py.require_nvcc().path == home
    assert not [r for r in setup_py.missing_tools() if r.startswith("nvidia")]


def test_too_old_is_passed_over(
    setup_py: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_nvcc(tmp_path / "home", "12.4")
    wheels = fake_nvcc(tmp_path / "wheels", "13.0")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(setup_py, "pypi_cuda_dirs", lambda: [tmp_path / "wheels"])
    assert setup_py.require_nvcc().path == wheels


def test_no_torch(setup_py: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setup_py, "package_dir", lambda name: None)
    with pytest.raises(SystemExit) as raised:
        setup_py.require_torch()
    assert "torch: expected torch 2.11 or newer, got no torch in Python" in message(raised)
    assert "pip install" in message(raised)


def test_old_torch(setup_py: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "version.py").write_text("__version__ = '2.10.0+cu130'\n")
    monkeypatch.setattr(setup_py, "package_dir", lambda name: tmp_path)
    with pytest.raises(SystemExit) as raised:
        setup_py.require_torch()
    assert f"got torch 2.10.0+cu130 in {tmp_path}" in message(raised)


def test_no_cutlass(setup_py: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setup_py, "package_dir", lambda name: None)
    with pytest.raises(SystemExit) as raised:
        setup_py.require_cutlass()
    assert "run: " in message(raised)
    assert "nvidia-cutlass==4.2.0.0" in message(raised)
    monkeypatch.setenv("SM120_OPS_CUTLASS_DIR", str(tmp_path))
    with pytest.raises(SystemExit) as raised:
        setup_py.require_cutlass()
    assert f"got no headers in {tmp_path}" in message(raised)


def test_no_ninja(setup_py: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setup_py.sys, "executable", "/nonexistent/python")
    with pytest.raises(SystemExit) as raised:
        setup_py.require_program("ninja")
    assert "ninja: expected ninja on PATH, got none; run: " in message(raised)


def test_version_is_the_packages(setup_py: ModuleType) -> None:
    namespace: dict[str, str] = {}
    exec((ROOT / "sm120_ops" / "_version.py").read_text(), namespace)
    assert setup_py.version() == namespace["__version__"]
