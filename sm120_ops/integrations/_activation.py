"""Whether a plugin acts: SM120_OPS_DEEP_GEMM, and the GPUs of the machine.

unset, 0    nothing happens
1           act if every GPU is 12.x, and if no deep_gemm is installed that would be shadowed
force       act on any GPU, and shadow
"""

from __future__ import annotations

import os

from .. import device

VARIABLE = "SM120_OPS_DEEP_GEMM"


class RefusalError(Exception):
    """Why a plugin that was asked to act does not; for the log."""


def requested() -> bool:
    return os.environ.get(VARIABLE, "0").strip().lower() not in ("", "0")


def forced() -> bool:
    """RefusalError unless the value is known and the GPUs are right for it."""
    value = os.environ[VARIABLE].strip().lower()
    if value == "force":
        return True
    if value != "1":
        raise RefusalError(f"{VARIABLE}={value}: expected 0, 1 or force")
    found = device.capabilities()
    if not found:
        raise RefusalError(f"{VARIABLE}=1: expected GPUs of compute capability 12.x, found no GPU")
    if any(major != 12 for major, _ in found):
        names = ", ".join(sorted({f"{major}.{minor}" for major, minor in found}))
        raise RefusalError(f"{VARIABLE}=1: expected compute capability 12.x alone, found {names}")
    return False
