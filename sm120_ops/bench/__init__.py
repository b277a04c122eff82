"""``python -m sm120_ops bench``: one entry point, one file for each family of ops.

Every line carries time, TFLOP/s, GB/s and its share of a ceiling measured in the same run. To add a
family: a module with ``run(context) -> Iterator[Line]`` and its entry in FAMILIES.
"""

from __future__ import annotations

import dataclasses
import datetime
import importlib
import json
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from sm120_ops._console import UsageError, make_console, require_writable, step
from sm120_ops.bench.ceilings import ATOM_MARKS, Ceilings, measure_ceilings
from sm120_ops.bench.context import MODES, Context
from sm120_ops.bench.record import Line
from sm120_ops.bench.timing import Timer
from sm120_ops.device import SUPPORTED_GPUS, Environment, describe, is_supported

FAMILIES = {
    "gemm": "sm120_ops.bench.gemm",
    "quantize": "sm120_ops.bench.quantize",
    "bf16": "sm120_ops.bench.bf16",
    "hc_prenorm": "sm120_ops.bench.hc_prenorm",
    "overhead": "sm120_ops.bench.overhead",
    "moe": "sm120_ops.bench.moe",
    "moe_steps": "sm120_ops.bench.moe_steps",
    "mqa": "sm120_ops.bench.mqa",
    "grouped": "sm120_ops.bench.grouped",
    "k_grouped": "sm120_ops.bench.k_grouped",
    "einsum": "sm120_ops.bench.einsum",
}


class NoGpuError(Exception):
    """The benchmark times kernels, and there is no GPU that runs them."""


@dataclasses.dataclass(frozen=True)
class Results:
    environment: Environment
    date: str
    command: str
    mode: str
    flush: str
    event_floor_us: float  # what an empty measurement reads: part of every time
    ceilings: Ceilings
    ceiling_lines: list[Line]
    lines: list[Line]

    def to_json(self) -> dict[str, Any]:
        return {
            "environment": self.environment.to_json(),
            "date": self.date,
            "command": self.command,
            "mode": self.mode,
            "flush": self.flush,
            "event_floor_us": self.event_floor_us,
            "ceilings": self.ceilings.to_json(),
            "ceiling_marks": {
                line.name: f"{line.mark}: {line.verdict or 'not for this GPU'}"
                for line in self.ceiling_lines
                if line.mark is not None
            },
            "lines": [line.to_json() for line in self.lines],
        }

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(self.to_json(), indent=1) + "\n")


def command_line() -> str:
    return shlex.join(["python", "-m", "sm120_ops", *sys.argv[1:]])


def require_gpu() -> None:
    if is_supported():
        return
    environment = describe()
    found = environment.gpu or "no usable GPU"
    reasons = "; ".join(map(str, environment.problems)) or environment.reason
    raise NoGpuError(
        f"the benchmark needs a GPU of {SUPPORTED_GPUS}; found {found} ({reasons}). "
        "The CPU reference is made to be right, not fast, and is not timed"
    )


def ceiling_lines(ceilings: Ceilings, gpu_name: str) -> list[Line]:
    """The ceilings as lines of the table: a rate of 1 us of work each, so that columns agree."""
    lines = [
        Line("ceilings", "copy", "", "torch copy_", us=1.0, bytes=round(ceilings.copy_gbps * 1e3))
    ]
    for atom, tflops in ceilings.atom_tflops.items():
        line = Line("ceilings", atom, "", "bare MMA loop", us=1.0, flops=round(tflops * 1e6))
        line.mark = ATOM_MARKS.get(atom)
        line.verdict = line.mark.verdict(line, gpu_name) if line.mark else ""
        lines.append(line)
    return lines


def run(
    families: Sequence[str] | None = None,
    *,
    mode: str = "standard",
    with_peers: bool = True,
    flush: str = "read",
    on_line: Callable[[Line], None] | None = None,
) -> Results:
    """Measures the ceilings, then every line of ``families`` (default: all of them)."""
    chosen = list(families) if families else list(FAMILIES)
    unknown = [name for name in chosen if name not in FAMILIES]
    if unknown:
        raise UsageError(f"bench: --families: expected some of {list(FAMILIES)}, got {unknown}")
    if mode not in MODES:
        raise UsageError(f"bench: mode: expected one of {MODES}, got {mode!r}")
    require_gpu()
    environment = describe()
    device = torch.device(environment.device)
    gpu_name = environment.gpu or ""
    with step("measuring the ceilings: copy bandwidth and the bare MMA loops"):
        ceilings = measure_ceilings(device)
    timer = Timer(device, quick=mode == "quick", flush=flush)
    context = Context(device, gpu_name, timer, ceilings, mode, with_peers)
    lines = []
    with torch.no_grad():
        for name in chosen:
            with step(f"timing {name}"):
                for line in importlib.import_module(FAMILIES[name]).run(context):
                    lines.append(line)
                    if on_line is not None:
                        on_line(line)
    return Results(
        environment=environment,
        date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        command=command_line(),
        mode=mode,
        flush=flush,
        event_floor_us=timer.floor_us,
        ceilings=ceilings,
        ceiling_lines=ceiling_lines(ceilings, gpu_name),
        lines=lines,
    )


def run_bench(
    families: Sequence[str] | None,
    *,
    mode: str,
    with_peers: bool,
    flush: str,
    json_path: Path | None,
    plot_path: Path | None,
) -> int:
    """Entry point of the command line; returns the exit code."""
    from sm120_ops.bench.report import print_results

    if json_path is not None:
        require_writable("bench: --json", json_path)
    if plot_path is not None:
        from sm120_ops.bench.plot import require_matplotlib

        require_writable("bench: --plot", plot_path)
        require_matplotlib()
    try:
        results = run(families, mode=mode, with_peers=with_peers, flush=flush)
    except NoGpuError as error:
        make_console(stderr=True).print(f"sm120_ops bench: {error}", markup=False)
        return 2
    print_results(results)
    if json_path is not None:
        results.write(json_path)
    if plot_path is not None:
        from sm120_ops.bench.plot import roofline

        roofline(results, plot_path)
    return 0
