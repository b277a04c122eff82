"""The built library and wheel: symbols, dependencies, tag, size, and the loader's messages."""

from __future__ import annotations

import email
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
import torch

import sm120_ops
from sm120_ops import _load
from sm120_ops.device import build_info

ROOT = Path(__file__).resolve().parent.parent
MAX_WHEEL_BYTES = 30 * 2**20
# What torch's stable interface is made of: C functions. Anything mangled of these would tie the
# library to one torch version.
TORCH_NAMESPACES = ("N2at", "NK2at", "N3c10", "NK3c10", "N5torch", "NK5torch", "N6caffe2")


def symbols(option: str) -> list[str]:
    command = ["nm", "-D", option, str(_load.LIBRARY)]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    return [line.split()[-1] for line in lines]


def test_exports_nothing() -> None:
    assert symbols("--defined-only") == []


def test_needs_no_mangled_torch_symbol() -> None:
    undefined = symbols("--undefined-only")
    assert any(name.startswith("aoti_torch_") for name in undefined)
    mangled = [name for name in undefined if name.startswith("_Z")]
    assert [n for n in mangled if any(space in n for space in TORCH_NAMESPACES)] == []


def test_cuda_torch_shims_are_weak() -> None:
    """A strong reference to libtorch_cuda.so would make the library unloadable on a CPU torch."""
    command = ["nm", "-D", "--undefined-only", str(_load.LIBRARY)]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    kinds = {line.split()[-1]: line.split()[-2] for line in lines}
    in_libtorch_cuda = re.compile(r"cuda_(stream|guard|check|caching)")
    found = {name: kind for name, kind in kinds.items() if in_libtorch_cuda.search(name)}
    assert found == {"aoti_torch_get_current_cuda_stream": "w"}


def test_dynamic_dependencies() -> None:
    command = ["readelf", "-d", str(_load.LIBRARY)]
    dynamic = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    needed = {line.split("[")[1].rstrip("]") for line in dynamic.splitlines() if "(NEEDED)" in line}
    assert {"libtorch.so", "libtorch_cpu.so"} <= needed
    system = {"libstdc++.so.6", "libgcc_s.so.1", "libc.so.6", "libm.so.6", "libdl.so.2"}
    system |= {"libpthread.so.0", "librt.so.1", "ld-linux-x86-64.so.2", "ld-linux-aarch64.so.1"}
    assert needed - system == {"libtorch.so", "libtorch_cpu.so"}  # no libcuda, no libcudart
    assert "RPATH" not in dynamic
    assert "RUNPATH" not in dynamic


def test_build_machine_is_not_named() -> None:
    assert str(ROOT).encode() + b"/" not in _load.LIBRARY.read_bytes()


def test_every_op_has_its_kernels() -> None:
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    names = [n for n in torch._C._dispatch_get_all_op_names() if n.startswith("sm120::")]
    assert names
    for name in names:
        everywhere = has(name, "CompositeExplicitAutograd")
        assert everywhere or has(name, "CUDA"), f"{name} has no CUDA kernel"
        if not name.startswith("sm120::_"):  # the others measure or test the kernels
            assert everywhere or has(name, "CPU"), f"{name} has no CPU kernel"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel in dist/ if it is not older than the library, or one packed of what is built."""
    found = sorted((ROOT / "dist").glob("*.whl"), key=lambda path: path.stat().st_mtime)
    installed = not _load.LIBRARY.is_relative_to(ROOT)
    if found and (installed or found[-1].stat().st_mtime >= _load.LIBRARY.stat().st_mtime):
        return found[-1]
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "setup.py", "-q", "build_py", "bdist_wheel", "--skip-build"]
    subprocess.run([*command, "-d", str(folder)], check=True, cwd=ROOT)
    (path,) = folder.glob("*.whl")
    return path


def test_wheel_name_and_size(wheel: Path) -> None:
    name, version, python, abi, platform = wheel.stem.split("-")
    assert (name, version, python, abi) == ("sm120_ops", sm120_ops.__version__, "py3", "none")
    machine = sysconfig.get_platform().removeprefix("linux-")
    assert platform == f"linux_{machine}" or re.fullmatch(rf"manylinux_\d+_\d+_{machine}", platform)
    assert wheel.stat().st_size <= MAX_WHEEL_BYTES


def test_wheel_contents(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        files = archive.namelist()
        info = f"sm120_ops-{sm120_ops.__version__}.dist-info"
        metadata = email.message_from_bytes(archive.read(f"{info}/METADATA"))
        tags = email.message_from_bytes(archive.read(f"{info}/WHEEL"))
    assert {file.split("/")[0] for file in files} == {"sm120_ops", info}
    assert [file for file in files if file.endswith(".so")] == ["sm120_ops/_C.so"]
    assert {f"{info}/licenses/LICENSE", f"{info}/licenses/NOTICE"} <= set(files)
    assert "sm120_ops/__main__.py" in files
    assert metadata["Version"] == sm120_ops.__version__
    assert tags["Root-Is-Purelib"] == "false"
    # An install must never exchange the user's torch.
    assert not [r for r in metadata.get_all("Requires-Dist", []) if r.startswith("torch")]


def test_notice_names_what_the_library_contains(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (file for file in archive.namelist() if file.endswith("/NOTICE"))
        notice = archive.read(name).decode()
    for work in ("CUTLASS", "CUDA runtime", "PyTorch", "CCCL"):
        assert work in notice


@pytest.fixture
def unloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_load, "_loaded", False)


@pytest.mark.usefixtures("unloaded")
def test_missing_library(tmp_path: Path) -> None:
    with pytest.raises(ImportError) as raised:
        _load.load(tmp_path / "_C.so")
    text = str(raised.value)
    assert f"expected the compiled library at {tmp_path / '_C.so'}, got no such file" in text
    assert f"torch {torch.__version__}" in text
    assert "run: make build" in text


ELF_AARCH64 = b"\x7fELF" + bytes(14) + (183).to_bytes(2, "little")


@pytest.mark.usefixtures("unloaded")
@pytest.mark.parametrize(
    ("content", "linker_says", "cure"),
    [
        (b"not a library", ("invalid ELF header", "file too short"), "damaged or no library"),
        (ELF_AARCH64, ("file too short",), "the library is for aarch64 and this machine is"),
    ],
)
def test_unloadable_library(
    content: bytes, linker_says: tuple[str, ...], cure: str, tmp_path: Path
) -> None:
    library = tmp_path / "_C.so"
    library.write_bytes(content)
    with pytest.raises(ImportError) as raised:
        _load.load(library)
    text = str(raised.value)
    assert any(words in text for words in linker_says)
    assert isinstance(raised.value.__cause__, OSError)
    for part in (f"torch {torch.__version__}", sys.version.split()[0], cure, "run:"):
        assert part in text


@pytest.mark.parametrize(
    ("linker_says", "cure"),
    [
        ("/lib/libstdc++.so.6: version `GLIBCXX_3.4.32' not found", "manylinux_2_28 wheel"),
        ("undefined symbol: aoti_torch_empty_strided", "torch 2.11 or newer whose libraries"),
        ("libtorch_cpu.so: cannot open shared object file", "torch 2.11 or newer whose libraries"),
        ("cannot allocate memory in static TLS block", "make build in a source tree"),
    ],
)
def test_cure_for_what_the_linker_says(linker_says: str, cure: str) -> None:
    text = _load._cure(_load.LIBRARY, linker_says)
    assert cure in text
    assert "run:" in text or "or make build" in text


def test_foreign_library(tmp_path: Path) -> None:
    """A library that loads and is not this package's: here one of torch's own."""
    source = Path(sm120_ops.__file__).parent
    skip = shutil.ignore_patterns("_C.so", "__pycache__")
    shutil.copytree(source, tmp_path / "sm120_ops", ignore=skip)
    assert torch.__file__ is not None
    other = Path(torch.__file__).parent / "lib" / "libtorch_global_deps.so"
    shutil.copy(other, tmp_path / "sm120_ops" / "_C.so")
    done = fresh_python("import sm120_ops", root=tmp_path)
    assert done.returncode != 0
    assert "to implement every op of this package, got none for" in done.stderr
    assert "(sm120::" in done.stderr
    assert "run: pip install" in done.stderr


@pytest.mark.parametrize("version", ["2.10.0", "2.9.1+cu128", "1.13.1", "nightly"])
def test_old_torch(version: str) -> None:
    with pytest.raises(ImportError) as raised:
        _load.check_torch_version(version)
    assert f"expected torch 2.11 or newer, got torch {version}" in str(raised.value)
    assert 'run: pip install "torch>=2.11"' in str(raised.value)


@pytest.mark.parametrize("version", ["2.11.0", "2.11.0a0+git", "2.13.0+cpu", "3.0.0"])
def test_new_enough_torch(version: str) -> None:
    _load.check_torch_version(version)


PACKAGE_ROOT = Path(sm120_ops.__file__).resolve().parent.parent


def fresh_python(*lines: str, root: Path = PACKAGE_ROOT) -> subprocess.CompletedProcess[str]:
    """Runs the lines in a new interpreter that finds the same package as this one."""
    script = "\n".join([f"import sys; sys.path.insert(0, {str(root)!r})", *lines])
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)


def test_old_torch_fails_at_import() -> None:
    done = fresh_python(
        "import torch; torch.__version__ = '2.10.0'",
        "del torch.float4_e2m1fn_x2  # as in that version: the message must come before its lack",
        "import sm120_ops",
    )
    assert done.returncode != 0
    assert "ImportError: sm120_ops: torch: expected torch 2.11 or newer" in done.stderr


def test_no_torch_fails_at_import() -> None:
    done = fresh_python("sys.modules['torch'] = None", "import sm120_ops")
    assert done.returncode != 0
    assert "expected torch 2.11 or newer, got no torch" in done.stderr


def test_import_touches_no_gpu() -> None:
    """No context, and no driver library that torch itself has not loaded."""
    done = fresh_python(
        "import torch",
        "before = open('/proc/self/maps').read().count('libcuda.so')",
        "import sm120_ops",
        "assert not torch.cuda.is_initialized()",
        "assert open('/proc/self/maps').read().count('libcuda.so') == before",
    )
    assert done.returncode == 0, done.stderr


def test_import_is_fast() -> None:
    """What the package adds to torch's own import, in CPU time: others may use the machine too."""
    done = fresh_python(
        "import time, torch",
        "start = time.process_time()",
        "import sm120_ops",
        "print(time.process_time() - start)",
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 0.3


def test_works_after_fork() -> None:
    done = fresh_python(
        "import os, torch, sm120_ops",
        "child = os.fork()",
        "if child == 0:",
        "    data, scale = sm120_ops.quantize(torch.randn(4, 256), 'mxfp8')",
        "    out = sm120_ops.gemm((data, scale), (data, scale))",
        "    os._exit(0 if out.shape == (4, 4) else 3)",
        "assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0",
    )
    assert done.returncode == 0, done.stderr


def test_info_names_the_build() -> None:
    """What `info --json` needs to name for a bug report about a wheel."""
    build = build_info()
    assert re.fullmatch(r"[0-9a-f]{12}(-dirty)?|", build["revision"])
    assert re.fullmatch(r"\d+\.\d+\.\d+", build["cuda"])
    assert {"sm_120f"} <= set(build["targets"]) <= {"sm_120f", "sm_90a"}


def test_text_for_errors_of_the_machine(toolchain: tuple[Path, Path], tmp_path: Path) -> None:
    """An old driver cannot be had here: the text that C++ adds to CUDA's is printed by itself."""
    source = tmp_path / "cure.cpp"
    source.write_text(
        '#include "host/driver.h"\n'
        "#include <cstdio>\n"
        "int main() {\n"
        '  std::printf("%s\\n%s\\n[%s]\\n", sm120::cure(cudaErrorInsufficientDriver),\n'
        "              sm120::cure(cudaErrorNoKernelImageForDevice), sm120::cure(cudaSuccess));\n"
        "}\n"
    )
    program = tmp_path / "cure"
    command = [str(toolchain[0]), f"-I{ROOT / 'csrc'}", str(source), "-o", str(program)]
    subprocess.run(command, check=True)
    driver, image, nothing = subprocess.run(
        [str(program)], check=True, capture_output=True, text=True
    ).stdout.splitlines()
    assert "needed: NVIDIA driver 580 or newer" in driver
    assert "+cu129" in driver
    assert "compute capability 12.x" in image
    assert nothing == "[]"
