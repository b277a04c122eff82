"""Loads the compiled library `_C.so`, which registers the CUDA kernels of `torch.ops.sm120`.

The library is loaded when the package is imported, and a library that cannot be loaded fails there,
with a message that says what was found, what is needed and what to run. No GPU is touched: the
question whether there is a supported one comes up at the first call of an op on a CUDA tensor.
"""

from __future__ import annotations

import platform
import re
import struct
import sys
from pathlib import Path

MIN_TORCH = (2, 11)
LIBRARY = Path(__file__).resolve().with_name("_C.so")

_loaded = False


_TORCH = f"torch {MIN_TORCH[0]}.{MIN_TORCH[1]} or newer"
_PYTHON = f"Python {sys.version.split()[0]} ({sys.executable})"


def _torch_error(got: str) -> ImportError:
    return ImportError(
        f"sm120_ops: torch: expected {_TORCH}, got {got} in {_PYTHON}; run: pip install "
        f'"torch>={MIN_TORCH[0]}.{MIN_TORCH[1]}" (CUDA 13 build: https://pytorch.org/get-started)'
    )


try:
    import torch
except ModuleNotFoundError as error:
    if error.name != "torch":
        raise
    raise _torch_error("no torch") from error


def check_torch_version(version: str) -> None:
    """Raises ImportError if `version` is older than the stable ABI that the library targets."""
    found = re.match(r"(\d+)\.(\d+)", version)
    if found is None or (int(found[1]), int(found[2])) < MIN_TORCH:
        raise _torch_error(f"torch {version}")


# Before the op modules are imported: they name dtypes that an older torch does not have.
check_torch_version(torch.__version__)


# Machines of the ELF header's e_machine field that a wheel may have been built for.
_MACHINES = {62: "x86_64", 183: "aarch64"}


def _machine(library: Path) -> str | None:
    """The processor that an ELF file is for; None if it is no ELF file."""
    with open(library, "rb") as file:
        header = file.read(20)
    if len(header) < 20 or header[:4] != b"\x7fELF":
        return None
    (number,) = struct.unpack("<H", header[18:20])
    return _MACHINES.get(number, f"ELF machine {number}")


def _cure(library: Path, cause: str) -> str:
    """What to do about a library that the dynamic linker refused with the text `cause`."""
    again = "pip install --force-reinstall --no-deps sm120_ops-VERSION.whl"
    machine = _machine(library)
    if machine is None:
        return f"the file is damaged or no library; run: {again} (in a source tree: make build)"
    if machine != platform.machine():
        return (
            f"the library is for {machine} and this machine is {platform.machine()}; run: {again} "
            "with the wheel for this platform"
        )
    if "GLIBC" in cause or "CXXABI" in cause:
        return (
            "the library was built on a newer system than this one; run: pip install the "
            "manylinux_2_28 wheel (glibc 2.28 or newer), or pip install git+... to build it here"
        )
    if "undefined symbol" in cause or "libtorch" in cause:
        return (
            f"needed: {_TORCH} whose libraries are the ones of `import torch`; run: pip install "
            f'--force-reinstall "torch>={MIN_TORCH[0]}.{MIN_TORCH[1]}"'
        )
    return f"needed: {_TORCH} on 64-bit Linux; run: {again}, or make build in a source tree"


def _ops_without_kernel() -> list[str]:
    """Ops that Python has declared and that the loaded library does not implement."""
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    names = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("sm120::")]
    return sorted(
        name
        for name in names
        if not has(name, "CUDA") and not has(name, "CompositeExplicitAutograd")
    )


def load(library: Path = LIBRARY) -> None:
    """Loads the compiled library once; ImportError with found, needed and what to run otherwise.

    The ops must be declared before: a library that does not implement all of them is refused.
    """
    global _loaded
    if _loaded:
        return
    here = f"torch {torch.__version__} (CUDA {torch.version.cuda or 'none'}), {_PYTHON}"
    if not library.is_file():
        raise ImportError(
            f"sm120_ops: library: expected the compiled library at {library}, got no such file, "
            f"with {here}; run: make build (in a source tree), or import the installed wheel from "
            "outside the source tree"
        )
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        # torch hides the dynamic linker's text behind "Could not load this library".
        cause = error.__cause__ or error
        raise ImportError(
            f"sm120_ops: library: expected {library.name} to load, got: {cause}, with {here}; "
            f"{_cure(library, str(cause))}"
        ) from cause
    missing = _ops_without_kernel()
    if missing:
        named = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise ImportError(
            f"sm120_ops: library: expected {library} to implement every op of this package, got "
            f"none for {len(missing)} of them ({named}): it belongs to another version or another "
            f"package, with {here}; run: pip install --force-reinstall --no-deps with the wheel of "
            "this version, or make build in a source tree"
        )
    _loaded = True
