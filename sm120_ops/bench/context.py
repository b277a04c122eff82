"""What every family needs to make its lines: device, timer, ceilings, and how much to run."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from sm120_ops.bench.ceilings import Ceilings
from sm120_ops.bench.record import Line
from sm120_ops.bench.timing import Timer

MODES = ("quick", "standard", "full")


@dataclasses.dataclass
class Context:
    device: torch.device
    gpu_name: str
    timer: Timer
    ceilings: Ceilings
    mode: str
    with_peers: bool

    def time(self, call: Callable[[], object], *, atom: str | None = None, **fields: Any) -> Line:
        """Times ``call`` and makes its line; ``atom`` names the ceiling of its FLOPs."""
        line = Line(us=self.timer.measure(call).us, **fields)
        line.copy_gbps = self.ceilings.copy_gbps
        if atom is not None:
            line.ceiling_tflops = self.ceilings.atom_tflops[atom]
        return self.judge(line)

    def time_peer(self, call: Callable[[], object], **fields: Any) -> Line:
        """The same for another library's op: where it does not run, the line says why instead."""
        try:
            return self.time(call, **fields)
        except Exception as error:  # whatever the peer raises for a shape or GPU it does not take
            torch.cuda.synchronize(self.device)
            text = str(error).strip().splitlines()
            reason = text[0][:70] if text else type(error).__name__
            return Line(us=None, note=f"does not run: {reason}", **fields)

    def judge(self, line: Line) -> Line:
        if line.mark is not None:
            line.verdict = line.mark.verdict(line, self.gpu_name)
        return line
