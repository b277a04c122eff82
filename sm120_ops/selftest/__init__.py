"""``python -m sm120_ops selftest``: every op family here, then the benchmark, as one report.

On a GPU that runs the kernels, each case is compared with the CPU reference and run a second time,
which has to give the same bits. On any machine the CPU reference is checked against FP64 formulas.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from sm120_ops._console import make_console, require_writable, step
from sm120_ops.device import Environment, describe, is_supported
from sm120_ops.selftest import cases, grouped, moe, mqa, products
from sm120_ops.selftest.bounds import Case, same_bits
from sm120_ops.selftest.einsum import einsum_cases

FORMULA = "CPU reference to FP64 formula"
REFERENCE, GPU_FORMULA, RERUN = "GPU to CPU reference", "GPU to FP64 formula", "GPU to second run"


@dataclasses.dataclass(frozen=True)
class Outcome:
    """One comparison of one case."""

    family: str
    case: str
    against: str
    error: float
    allowed: float
    message: str = ""

    @property
    def ok(self) -> bool:
        return not self.message and self.error <= self.allowed  # NaN is not


def case_name(case: Any) -> str:
    """``GemmCase(M=1, ...)`` as ``1x8x128 mxfp8 ...``: the fields' values that tell cases apart."""
    values = dataclasses.asdict(case)
    return " ".join(
        f"{k}={v}" for k, v in values.items() if v not in (None, False, 0) or k in "MNK"
    )


def check_on_cpu(family: str, case: Case) -> Iterator[Outcome]:
    for part, error in case.errors(case.run(torch.device("cpu"))).items():
        yield Outcome(family, f"{case_name(case)} [{part}]", FORMULA, error, case.allowed)


def check_on_gpu(family: str, case: Case, device: torch.device) -> Iterator[Outcome]:
    want = case.run(torch.device("cpu"))
    got, again = case.run(device), case.run(device)
    for part, value in got.items():
        name = f"{case_name(case)} [{part}]"
        yield Outcome(family, name, RERUN, same_bits(again[part], value), 0.0)
    for against, errors in ((REFERENCE, case.errors(got, want)), (GPU_FORMULA, case.errors(got))):
        for part, error in errors.items():
            yield Outcome(family, f"{case_name(case)} [{part}]", against, error, case.allowed)


def all_cases(quick: bool) -> dict[str, list[Case]]:
    return {
        "quantize": list(cases.quantize_cases(quick)),
        "layout": list(cases.layout_cases(quick)),
        "gemm": list(cases.gemm_cases(quick)),
        "einsum": list(einsum_cases(quick)),
        "moe": list(moe.moe_cases(quick)),
        "grouped": list(grouped.grouped_cases(quick)),
        "k_grouped": list(grouped.k_grouped_cases(quick)),
        "mqa": list(mqa.mqa_cases(quick)),
        "bf16": list(products.bf16_cases(quick)),
        "hc_prenorm": list(products.prenorm_cases(quick)),
    }


def run_cases(
    check: Callable[[str, Any], Iterable[Outcome]], families: dict[str, list[Any]], where: str
) -> list[Outcome]:
    """Every case; one that raises is an outcome too, so that the report tells of all of them."""
    outcomes: list[Outcome] = []
    for family, members in families.items():
        with step(f"{family}: {len(members)} cases on {where}"):
            for case in members:
                try:
                    outcomes += check(family, case)
                except Exception as error:  # the report is for bugs of any kind
                    text = f"{type(error).__name__}: {error}"
                    nan = float("nan")
                    outcomes.append(Outcome(family, case_name(case), where, nan, 0.0, text))
    return outcomes


def summary(outcomes: list[Outcome]) -> list[dict[str, Any]]:
    """Counts and the worst error for each family and each thing that it was compared with."""
    groups: dict[tuple[str, str], list[Outcome]] = {}
    for outcome in outcomes:
        groups.setdefault((outcome.family, outcome.against), []).append(outcome)
    return [
        {
            "family": family,
            "against": against,
            "comparisons": len(members),
            "failed": sum(not o.ok for o in members),
            "worst_error_over_allowed": max(
                (o.error / o.allowed if o.allowed else o.error for o in members), default=0.0
            ),
        }
        for (family, against), members in groups.items()
    ]


def default_path(environment: Environment, date: datetime.datetime) -> Path:
    gpu = re.sub(r"[^A-Za-z0-9]+", "-", environment.gpu or "cpu").strip("-").lower()
    return Path(f"sm120_ops-selftest-{gpu}-{date:%Y%m%d}.json")


def print_summary(rows: list[dict[str, Any]], failures: list[Outcome]) -> None:
    from rich.table import Table

    table = Table(title="self-test")
    for heading in ("family", "compared with"):
        table.add_column(heading)
    for heading in ("comparisons", "failed", "worst error / allowed"):
        table.add_column(heading, justify="right")
    for entry in rows:
        worst = entry["worst_error_over_allowed"]
        table.add_row(
            entry["family"],
            entry["against"],
            str(entry["comparisons"]),
            str(entry["failed"]),
            "exact" if worst == 0 else f"{worst:.2g}",
            style="bold red" if entry["failed"] else None,
        )
    console = make_console()
    console.print(table)
    for outcome in failures[:10]:
        detail = outcome.message or f"error {outcome.error:.3g}, allowed {outcome.allowed:.3g}"
        text = f"FAIL {outcome.family} {outcome.case} against {outcome.against}: {detail}"
        console.print(text, markup=False)
    if len(failures) > 10:
        console.print(f"and {len(failures) - 10} more failures, all of them in the report")


def run_selftest(path: Path | None = None, *, quick: bool = False, with_bench: bool = True) -> int:
    """Entry point of the command line; returns the exit code (1 when a comparison failed)."""
    from sm120_ops import bench

    date = datetime.datetime.now(datetime.timezone.utc)
    environment = describe()
    path = path or default_path(environment, date)
    require_writable("selftest: --report", path)
    on_gpu = is_supported()
    console = make_console()
    console.print(f"{environment.gpu or 'no GPU'}: {environment.target}", markup=False)
    console.print(environment.reason, markup=False)
    for problem in environment.problems:
        console.print(f"note: {problem}", markup=False)

    families = all_cases(quick)
    with torch.no_grad():
        outcomes = run_cases(check_on_cpu, families, "CPU")
        if on_gpu:
            device = torch.device(environment.device)
            outcomes += run_cases(
                lambda family, case: check_on_gpu(family, case, device), families, str(device)
            )
    results = bench.run(mode="quick") if on_gpu and with_bench else None

    failures = [outcome for outcome in outcomes if not outcome.ok]
    report = {
        "report": "sm120_ops selftest",
        "date": date.isoformat(timespec="seconds"),
        "command": bench.command_line(),
        "environment": environment.to_json(),
        "gpu_kernels_ran": on_gpu,
        "comparisons": len(outcomes),
        "failed": len(failures),
        "summary": summary(outcomes),
        "failures": [dataclasses.asdict(outcome) for outcome in failures],
        "bench": None if results is None else results.to_json(),
    }
    path.write_text(json.dumps(report, indent=1) + "\n")

    print_summary(summary(outcomes), failures)
    if results is not None:
        from sm120_ops.bench.report import print_results

        print_results(results)
    console.print(f"report: {path}", markup=False)
    if on_gpu:
        console.print(
            "Please attach the report to an issue of the project: runs on cards that the authors "
            "do not have are what its statements about them can rest on."
        )
    else:
        console.print(
            "No GPU kernel ran: only the CPU reference was checked, against FP64 formulas."
        )
    return 1 if failures else 0
