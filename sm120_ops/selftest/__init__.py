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
from sm120_ops.selftest import cases, formulas, moe, products
from sm120_ops.selftest.einsum import EinsumCase, einsum_cases

FORMULA = "CPU reference to FP64 formula"
REFERENCE, GPU_FORMULA, RERUN = "GPU to CPU reference", "GPU to FP64 formula", "GPU to second run"

# One BF16 rounding is 2^-8 of the value at most. FP32 sums of at most 4,096 products, in any order,
# are within 2^-18 of the sum of magnitudes. The kernel and the reference each round once, and where
# their sums lie on two sides of a midpoint they give neighbouring values: two roundings apart.
BF16_ROUNDING = 2.0**-8
SUM_ERROR = 2.0**-18
# Frobenius norm of the difference over that of the reference, where D is FP32.
FP32_NORM_ERROR = 1e-6


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


def same_bits(got: torch.Tensor, want: torch.Tensor) -> float:
    """Share of elements that differ, by their bits (so that NaN equals NaN)."""
    if got.shape != want.shape or got.dtype != want.dtype:
        return float("nan")
    if got.numel() == 0:
        return 0.0
    # clone(), for contiguous() leaves a [1, 1] tensor with any strides as it is.
    a, b = (t.clone(memory_format=torch.contiguous_format).view(torch.uint8) for t in (got, want))
    return (a != b).double().mean().item()


def gemm_magnitude(case: cases.GemmCase | EinsumCase) -> torch.Tensor:
    """|A| |B|^T + |C| in the columns of D: the scale of what rounding can do, for each element."""
    if isinstance(case, EinsumCase):
        return case.magnitude()
    a, sfa, b, sfb = case.operands()
    left = formulas.dequantize(a, sfa, case.grans[0]).abs()
    right = formulas.dequantize(b, sfb, case.grans[1]).abs()
    initial = case.initial_output().double().abs()
    return spread_heads(case, left @ right.T) + (initial if case.accumulate else 0)


def spread_heads(case: cases.GemmCase, product: torch.Tensor) -> torch.Tensor:
    """A product [M, N] in D's whole buffer: head-split middle columns and row gaps are zero."""
    full = product.new_zeros(case.M, case.columns + case.pad)
    column = torch.arange(case.N)
    if case.splits is not None:
        left, mid, right = case.splits
        head, rest = column // (left + right), column % (left + right)
        column = head * (left + mid + right) + torch.where(rest < left, rest, rest + mid)
    full[:, column] = product
    return full


def gemm_formula(case: cases.GemmCase | EinsumCase) -> torch.Tensor:
    """D's whole buffer in FP64, what the op leaves alone included."""
    if isinstance(case, EinsumCase):
        return case.formula()
    a, sfa, b, sfb = case.operands()
    left = formulas.dequantize(a, sfa, case.grans[0])
    right = formulas.dequantize(b, sfb, case.grans[1])
    product = spread_heads(case, left @ right.T)
    written = spread_heads(case, torch.ones(case.M, case.N, dtype=torch.float64)) > 0
    initial = case.initial_output().double()
    return torch.where(written, product + (initial if case.accumulate else 0), initial)


def gemm_error(
    case: cases.GemmCase | EinsumCase, got: torch.Tensor, want: torch.Tensor, roundings: int = 1
) -> float:
    """Worst element, in units of what is allowed for it: at most 1 is right."""
    rounding = BF16_ROUNDING * roundings if case.out_dtype == torch.bfloat16 else 0.0
    allowed = rounding * want.abs() + SUM_ERROR * gemm_magnitude(case)
    difference = (got.double() - want).abs()
    ratio = torch.where(difference == 0, 0.0, difference / allowed)
    worst = ratio.max().item() if ratio.numel() else 0.0
    if case.out_dtype == torch.float32 and want.norm() > 0:
        norm_error = (difference.norm() / want.norm()).item()
        worst = max(worst, norm_error / FP32_NORM_ERROR)
    return worst


def formula_errors(case: Any, got: dict[str, torch.Tensor]) -> dict[str, float]:
    """Errors of a result of the CPU reference against FP64; every value allowed is at most 1."""
    if isinstance(case, cases.GemmCase | EinsumCase):
        return {"out": gemm_error(case, got["out"], gemm_formula(case))}
    if isinstance(case, cases.QuantizeCase):
        values, byte = formulas.quantize(
            case.input(), case.format, case.gran_k, case.gran_mn, case.rule
        )
        data = got["data"] if case.format == "mxfp4" else got["data"].view(torch.float8_e4m3fn)
        codes = formulas.code_values(case.format)[formulas.codes_of(data)]
        packed_byte = formulas.scale_bytes(got["scale"], byte.shape[1])
        restored = formulas.dequantize(data, got["scale"], case.gran_k)
        # `!=` counts differing elements: 0 and -0 are equal, as they should be here.
        return {
            "data": float((codes != values).sum()),
            "scale": float((packed_byte != byte).sum()),
            "dequantized": float((got["dequantized"] != restored.float()).sum()),
        }
    if isinstance(case, products.Case):
        want = case.formula()
        return {part: case.error(part, got[part], want[part]) for part in want}
    if isinstance(case, moe.MoeCase):
        allowed = moe.FORMAT_ERROR[case.format]
        return {"out": moe.relative_error(got["out"], moe.formula(case), allowed)}
    codes = got["unpack_fp4"]
    byte = got["unpack_scales(uint8)"]
    return {
        "pack_scales": float(
            (formulas.scale_bytes(got["pack_scales(uint8)"], byte.shape[1]) != byte).sum()
        ),
        "unpack_scales": same_bits(
            got["unpack_scales(float32)"].nan_to_num(-1),
            formulas.scale_values(byte).float().nan_to_num(-1),
        ),
        "pack_fp4": float((formulas.codes_of(got["pack_fp4"]) != codes).sum()),
        "transpose_fp4": float(
            (formulas.codes_of(got["transpose_fp4"]) != formulas.codes_of(got["pack_fp4"]).T).sum()
        ),
    }


def check_on_cpu(family: str, case: Any) -> Iterator[Outcome]:
    exact = family not in ("gemm", "einsum", "moe", *products.FAMILIES)
    allowed = 0.0 if exact else 1.0
    for part, error in formula_errors(case, case.run(torch.device("cpu"))).items():
        yield Outcome(family, f"{case_name(case)} [{part}]", FORMULA, error, allowed)


def check_on_gpu(family: str, case: Any, device: torch.device) -> Iterator[Outcome]:
    want = case.run(torch.device("cpu"))
    got, again = case.run(device), case.run(device)
    for part, value in got.items():
        name = f"{case_name(case)} [{part}]"
        yield Outcome(family, name, RERUN, same_bits(again[part], value), 0.0)
        if family in ("gemm", "einsum"):
            error = gemm_error(case, value, want[part].double(), roundings=2)
            yield Outcome(family, name, REFERENCE, error, 1.0)
            error = gemm_error(case, value, gemm_formula(case))
            yield Outcome(family, name, GPU_FORMULA, error, 1.0)
        elif family in products.FAMILIES:
            yield Outcome(family, name, REFERENCE, case.error(part, value, want[part]), 1.0)
            yield Outcome(family, name, GPU_FORMULA, formula_errors(case, got)[part], 1.0)
        elif family == "moe":
            error = moe.relative_error(value, want[part], moe.REFERENCE_ERROR)
            yield Outcome(family, name, REFERENCE, error, 1.0)
            yield Outcome(family, name, GPU_FORMULA, formula_errors(case, got)[part], 1.0)
        else:
            yield Outcome(family, name, REFERENCE, same_bits(value, want[part]), 0.0)


def all_cases(quick: bool) -> dict[str, list[Any]]:
    return {
        "quantize": list(cases.quantize_cases(quick)),
        "layout": list(cases.layout_cases(quick)),
        "gemm": list(cases.gemm_cases(quick)),
        "einsum": list(einsum_cases(quick)),
        "moe": list(moe.moe_cases(quick)),
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
