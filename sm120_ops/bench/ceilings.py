"""The ceilings of this GPU, measured in the same run as everything that is compared to them."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from sm120_ops.bench.record import Mark

# Bare MMA loops: register operands, fresh at each step, scales reused as a real kernel does.
ATOMS = ("mxfp8_gran128", "mxfp8_gran32", "mxfp4", "mxfp8_mxfp4", "bf16")
ATOM_MARKS = {
    "mxfp8_gran128": Mark("tflops", ">=", 430, "TFLOP/s", gpu="H200"),
    "mxfp8_gran32": Mark("tflops", ">=", 300, "TFLOP/s", gpu="H200"),
}


@dataclasses.dataclass(frozen=True)
class Ceilings:
    copy_gbps: float
    atom_tflops: dict[str, float]

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def atom_of(formats: tuple[str, str], grans: tuple[int, int]) -> str:
    """The atom whose bare loop bounds a GEMM of these operands."""
    if formats == ("mxfp4", "mxfp4"):
        return "mxfp4"
    if "mxfp4" in formats:
        return "mxfp8_mxfp4"
    return "mxfp8_gran128" if grans == (128, 128) else "mxfp8_gran32"


def _elapsed_us(launch: Any, repeats: int) -> float:
    """Best time of one launch; a ceiling is the best that was seen, not the median."""
    best = float("inf")
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        launch()
        end.record()
        end.synchronize()
        best = min(best, start.elapsed_time(end) * 1e3)
    return best


def copy_bandwidth(device: torch.device) -> float:
    """GB/s, read plus written, of the best large device-to-device copy."""
    size = min(1 << 30, torch.cuda.get_device_properties(device).total_memory // 16)
    source = torch.zeros(size // 4, dtype=torch.int32, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    return 2 * source.nbytes / _elapsed_us(lambda: target.copy_(source), 20) / 1e3


def atom_rate(device: torch.device, atom: str) -> float:
    """TFLOP/s of the bare loop of one atom, over launches of about a millisecond or more."""
    sink = torch.zeros(1 << 20, dtype=torch.float32, device=device)

    iterations = 256

    def launch() -> int:
        flops: int = torch.ops.sm120._atom_rate(sink, atom, iterations)
        return flops

    launch()
    # Long enough that launch and tail weigh under a percent.
    while _elapsed_us(launch, 2) < 1500 and iterations < 1 << 22:
        iterations *= 2
    return launch() / _elapsed_us(launch, 7) / 1e6


def measure_ceilings(device: torch.device) -> Ceilings:
    return Ceilings(
        copy_gbps=copy_bandwidth(device),
        atom_tflops={atom: atom_rate(device, atom) for atom in ATOMS},
    )
