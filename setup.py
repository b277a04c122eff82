"""Builds the wheel: CMake and ninja compile csrc/ into sm120_ops/_C.so.

torch's CUDAExtension is not used, for it refuses to run under a CPU-only torch, and the build needs
of torch no more than headers and two libraries. The library uses neither Python.h nor anything of
torch but its stable C interface, so one wheel (py3-none-<platform>) serves every Python and torch.

Environment: CUDA_HOME (toolkit to use), MAX_JOBS (parallel compilers, default: the CPUs),
SM120_OPS_ARCHS ("120f;90a", the default, or one of them), SM120_OPS_CUTLASS_DIR (a CUTLASS tree),
SM120_OPS_CUDA ("13", the default, or "12.9": a wheel "+cu129" for drivers before 580),
SM120_OPS_REVISION (what `info` names as the git revision, where there is no git).
"""

from __future__ import annotations

import fcntl
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple, NoReturn

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.sdist import sdist

ROOT = Path(__file__).resolve().parent
BUILD_INFO = "sm120_ops/_build_info.py"
# Written into the sdist, which has no .git to ask.
REVISION_FILE = ROOT / "REVISION"
CUDA = os.environ.get("SM120_OPS_CUDA", "13")
# Oldest nvcc, the first release that is too new, and the local version of the wheel. 12.9 is the
# first to know family targets (sm_120f).
CUDA_BUILDS = {"13": ((13, 0), (14,), ""), "12.9": ((12, 9), (13,), "+cu129")}
MIN_TORCH = (2, 11)
# The compiler as PyPI wheels. All of one version: unpinned, nvvm and crt come newer than the
# compiler, and ptxas refuses their PTX.
NVCC_WHEELS = [
    "nvidia-cuda-nvcc==13.0.88",
    "nvidia-cuda-runtime==13.0.*",
    "nvidia-cuda-cccl==13.0.*",
    "nvidia-cuda-crt==13.0.*",
    "nvidia-nvvm==13.0.*",
]


class Nvcc(NamedTuple):
    source: str  # where it was found, for messages
    path: Path
    version: tuple[int, ...]

    def __str__(self) -> str:
        number = ".".join(map(str, self.version)) or "no version"
        return f"nvcc {number} at {self.path} ({self.source})"


def fail(what: str, needed: str, got: str, run: str) -> NoReturn:
    sys.exit(f"sm120_ops build: {what}: expected {needed}, got {got}; run: {run}")


def cuda_build() -> tuple[tuple[int, ...], tuple[int, ...], str]:
    """The row of CUDA_BUILDS that SM120_OPS_CUDA names."""
    if CUDA not in CUDA_BUILDS:
        fail("SM120_OPS_CUDA", " or ".join(CUDA_BUILDS), repr(CUDA), "unset SM120_OPS_CUDA")
    return CUDA_BUILDS[CUDA]


def revision() -> str:
    """The git commit that is built, with "-dirty" if files differ from it; "" if unknown."""
    if os.environ.get("SM120_OPS_REVISION"):
        return os.environ["SM120_OPS_REVISION"]
    if REVISION_FILE.is_file():
        return REVISION_FILE.read_text().strip()
    # A checkout of this project, not one that an unpacked sdist happens to lie in.
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        return ""
    command = ["git", "describe", "--always", "--abbrev=12", "--dirty", "--exclude=*"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip()


def package_dir(name: str) -> Path | None:
    """Folder of an installed package, found without running any of its code."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(next(iter(spec.submodule_search_locations)))


def pypi_cuda_dirs() -> list[Path]:
    """nvidia/cu13 folders of the CUDA wheels (`nvidia` is a namespace package, maybe in parts)."""
    spec = importlib.util.find_spec("nvidia")
    parts = spec.submodule_search_locations if spec is not None else None
    return [Path(part) / "cu13" for part in parts or [] if (Path(part) / "cu13").is_dir()]


def found_nvccs() -> list[Nvcc]:
    """Every nvcc there is, in the order of preference: CUDA_HOME, PATH, PyPI wheels."""
    places: list[tuple[str, Path]] = []
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(variable):
            places.append((variable, Path(os.environ[variable]) / "bin" / "nvcc"))
    on_path = shutil.which("nvcc")
    if on_path:
        places.append(("PATH", Path(on_path)))
    places += [("PyPI wheels", folder / "bin" / "nvcc") for folder in pypi_cuda_dirs()]
    found = []
    for source, path in places:
        if path.is_file():
            text = subprocess.run([path, "--version"], capture_output=True, text=True).stdout
            number = re.search(r"V(\d+)\.(\d+)\.(\d+)", text)
            version = tuple(map(int, number.groups())) if number else ()
            found.append(Nvcc(source, path, version))
    return found


def usable_nvcc() -> Nvcc | None:
    oldest, too_new, _ = cuda_build()
    return next((nvcc for nvcc in found_nvccs() if oldest <= nvcc.version < too_new), None)


def require_nvcc() -> Nvcc:
    nvcc = usable_nvcc()
    if nvcc is None:
        found = ", ".join(map(str, found_nvccs())) or "none in CUDA_HOME, on PATH or from PyPI"
        if CUDA == "12.9":
            # PyPI's wheels of CUDA 12 hold ptxas and no nvcc.
            fail("nvcc", "CUDA 12.9", found, "export CUDA_HOME=/path/of/a/cuda-12.9/toolkit")
        quoted = " ".join(f'"{wheel}"' for wheel in NVCC_WHEELS)
        needed = "a CUDA 13 release, 13.0 or newer"
        fail("nvcc", needed, found, f"{sys.executable} -m pip install {quoted}")
    return nvcc


def torch_version(folder: Path) -> str:
    """Version of the torch installed in `folder`, without the seconds that importing it takes."""
    file = folder / "version.py"
    match = re.search(r"__version__ = ['\"]([^'\"]+)", file.read_text() if file.is_file() else "")
    return match[1] if match else "of unknown version"


def require_torch() -> Path:
    folder = package_dir("torch")
    if folder is None:
        got = f"no torch in Python {sys.version.split()[0]} ({sys.executable})"
    else:
        number = re.match(r"(\d+)\.(\d+)", torch_version(folder))
        if number and tuple(map(int, number.groups())) >= MIN_TORCH:
            return folder
        got = f"torch {torch_version(folder)} in {folder}"
    fail("torch", "torch 2.11 or newer", got, f'{sys.executable} -m pip install "torch==2.13.0"')


def require_cutlass() -> Path:
    override = os.environ.get("SM120_OPS_CUTLASS_DIR")
    package = package_dir("cutlass_library")
    roots = [Path(override)] if override else [package / "source"] if package else []
    for root in roots:
        if (root / "include" / "cute" / "tensor.hpp").is_file():
            return root / "include"
    got = f"no headers in {roots[0]}" if roots else "no package cutlass_library"
    run = f"{sys.executable} -m pip install --no-deps nvidia-cutlass==4.2.0.0"
    fail("CUTLASS", "the headers of CUTLASS 4.2", got, run)


def require_program(name: str) -> str:
    path = shutil.which(name, path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if path is None:
        fail(name, f"{name} on PATH", "none", f"{sys.executable} -m pip install {name}")
    return path


class CMakeBuild(build_ext):
    """Runs CMake for the one extension. The build tree is kept, so a second run is incremental."""

    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", "/") + ".so"  # no interpreter suffix: it serves every Python

    def copy_extensions_to_source(self) -> None:
        super().copy_extensions_to_source()
        self.copy_file(Path(self.build_lib) / BUILD_INFO, ROOT / BUILD_INFO)

    def build_extension(self, ext: Extension) -> None:
        torch, cutlass, nvcc = require_torch(), require_cutlass(), require_nvcc()
        cmake, ninja = require_program("cmake"), require_program("ninja")
        print(f"sm120_ops build: {nvcc}; torch headers in {torch}", flush=True)
        archs = os.environ.get("SM120_OPS_ARCHS", "120f;90a")
        output = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        tree = ROOT / "build" / "cmake"
        options = {
            "CMAKE_BUILD_TYPE": "Debug" if self.debug else "Release",
            "CMAKE_MAKE_PROGRAM": ninja,
            "CMAKE_CUDA_COMPILER": nvcc.path,
            "CMAKE_EXPORT_COMPILE_COMMANDS": "ON",
            "SM120_OPS_TORCH_DIR": torch,
            "SM120_OPS_CUTLASS_INCLUDE_DIR": cutlass,
            "SM120_OPS_ARCHS": archs,
            "SM120_OPS_OUTPUT_DIR": output,
        }
        if nvcc.source == "PyPI wheels":
            # Their libraries lie in lib, and this nvcc looks in lib64 alone.
            libraries = nvcc.path.parent.parent / "lib"
            options["CMAKE_CUDA_FLAGS"] = f"-L{libraries}"
            options["SM120_OPS_CUDA_LIB_DIR"] = libraries
        arguments = [f"-D{key}={value}" for key, value in options.items()]
        jobs = os.environ.get("MAX_JOBS") or str(len(os.sched_getaffinity(0)))
        tree.parent.mkdir(exist_ok=True)
        with open(tree.parent / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # a second build in this tree waits for the first
            # CMake cannot change the compiler of a tree that exists: start again then.
            memo, wanted = tree / "configured-with", f"{ROOT}\n{cmake}\n{nvcc}"
            if not memo.is_file() or memo.read_text() != wanted:
                shutil.rmtree(tree, ignore_errors=True)
            tree.mkdir(exist_ok=True)
            self.call([cmake, "-S", str(ROOT), "-B", str(tree), "-G", "Ninja", *arguments])
            memo.write_text(wanted)
            self.call([cmake, "--build", str(tree), "--parallel", jobs])
        (output.parent / BUILD_INFO).write_text(
            '"""How the library beside this file was built. Written by setup.py."""\n\n'
            f'REVISION = "{revision()}"\n'
            f'CUDA = "{".".join(map(str, nvcc.version))}"\n'
            f"TARGETS = {tuple('sm_' + arch for arch in archs.split(';'))}\n"
            f'TORCH_HEADERS = "{torch_version(torch)}"\n'
        )

    @staticmethod
    def call(command: list[str]) -> None:
        code = subprocess.run(command).returncode
        if code != 0:
            sys.exit(f"sm120_ops build: `{' '.join(command[:3])} ...` failed with exit code {code}")


class SdistWithRevision(sdist):
    """Adds the file REVISION, from which a wheel built of the sdist knows its commit."""

    def make_release_tree(self, base_dir: str, files: list[str]) -> None:
        super().make_release_tree(base_dir, files)
        (Path(base_dir) / REVISION_FILE.name).write_text(revision() + "\n")


class AnyPythonWheel(bdist_wheel):
    """Tags the wheel py3-none-<platform>: native code, but the same for every Python."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


def version() -> str:
    """The version of sm120_ops/_version.py, with "+cu129" behind it in the build for that CUDA."""
    text = (ROOT / "sm120_ops" / "_version.py").read_text()
    match = re.search(r'^__version__ = "([^"]+)"$', text, re.MULTILINE)
    if match is None:
        raise RuntimeError("sm120_ops/_version.py has no __version__ line")
    return match[1] + cuda_build()[2]


def missing_tools() -> list[str]:
    """Build requirements that depend on the machine: a compiler where there is none."""
    wanted = [] if usable_nvcc() or CUDA != "13" else list(NVCC_WHEELS)
    return wanted if shutil.which("cmake") else [*wanted, "cmake>=3.24"]


if __name__ == "__main__":
    setup(
        version=version(),
        # pip asks for these through egg_info, and installs them. In any other command setuptools
        # would fetch them itself, as eggs that nvcc does not work from.
        setup_requires=missing_tools() if "egg_info" in sys.argv else [],
        ext_modules=[Extension("sm120_ops._C", sources=[])],
        cmdclass={
            "build_ext": CMakeBuild,
            "bdist_wheel": AnyPythonWheel,
            "sdist": SdistWithRevision,
        },
    )
