"""Counts calls that came in by DeepGEMM's names and by the engine integrations.

The raw ops and `sm120_ops.gemm()` and its like are not counted. Python counts: a replayed CUDA
graph runs no Python, so its calls count once, at capture; calls inside torch.compile are not seen.
"""

from __future__ import annotations

from typing import Any

import torch

_calls: dict[str, int] = {}
_active: dict[str, str] = {}


def count(name: str) -> None:
    # A compiled graph would have to guard on the counter, and compile anew at each call.
    if not torch.compiler.is_compiling():
        _calls[name] = _calls.get(name, 0) + 1


def set_active(part: str, how: str | None) -> None:
    """Notes that a part of an engine is served from here; None takes the note back."""
    if how is None:
        _active.pop(part, None)
    else:
        _active[part] = how


def stats(reset: bool = False) -> dict[str, Any]:
    """What runs through this package in this process.

    Args:
        reset: start counting from zero afterwards.

    Returns:
        {"calls": {name: calls so far}, "active": {part: how it is served}}. Names are those of
        `sm120_ops.compat.deep_gemm` (`deep_gemm.fp8_fp4_gemm_nt` counts its alias `fp8_gemm_nt`
        too) and `vllm.*` for the linear kernels of integrations/vllm.py. A call under
        torch.compile or in a replayed CUDA graph is not counted. Two threads that count at the
        same moment may count one call.
    """
    report = {"calls": dict(_calls), "active": dict(_active)}
    if reset:
        _calls.clear()
    return report
