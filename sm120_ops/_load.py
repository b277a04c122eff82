"""Loads the compiled library `_C.so`, which registers the CUDA kernels of `torch.ops.sm120`.

The library is loaded when the package is imported, and a library that cannot be loaded fails there,
with a message that says what was found, what is needed and what to run. No GPU is touched: the
question whether there is a supported one comes up at the first call of an op on a CUDA tensor.
"""

from __future__ import annotations

import re
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


def load(library: Path = LIBRARY) -> None:
    """Loads the compiled library once; ImportError with found, needed and what to run otherwise."""
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
            f"needed: {_TORCH} on x86-64 Linux, glibc no older than the wheel's platform tag; run: "
            "pip install --force-reinstall --no-deps with a wheel for this platform, or make build "
            "in a source tree"
        ) from cause
    _loaded = True
