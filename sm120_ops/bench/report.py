"""The benchmark's tables."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sm120_ops._console import make_console
from sm120_ops.bench.record import Line

if TYPE_CHECKING:
    from rich.table import Table

    from sm120_ops.bench import Results

NUMBERS = ("time us", "TFLOP/s", "GB/s", "% of atom", "% of copy", "diff", "mark", "")


def _number(value: float | None, digits: int = 1, scale: float = 1.0) -> str:
    return "-" if value is None else f"{value * scale:,.{digits}f}"


def row(line: Line) -> tuple[str, ...]:
    """Cells of one line, in the order of the table's columns."""
    ceiling = line.family == "ceilings"
    return (
        line.name,
        line.shape,
        line.provider,
        "-" if ceiling else _number(line.us),
        _number(line.tflops),
        _number(line.gbps, 0),
        _number(line.ceiling_share, 1, 100),
        _number(line.copy_share, 1, 100),
        "-" if line.diff is None else f"{line.diff:.1e}",
        line.note if line.us is None else str(line.mark or ""),
        line.verdict,
    )


def family_table(title: str, lines: list[Line]) -> Table:
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for heading in ("what", "shape", "by"):
        table.add_column(heading, no_wrap=True)
    for heading in NUMBERS:
        table.add_column(heading, justify="left" if heading == "mark" else "right")
    for line in lines:
        style = {"short": "bold red", "pass": "green"}.get(line.verdict)
        if line.provider not in ("sm120_ops", "bare MMA loop", "torch copy_"):
            style = "dim"
        table.add_row(*row(line), style=style)
    return table


def print_results(results: Results) -> None:
    console = make_console()
    environment = results.environment
    console.print(
        f"{environment.gpu}, {environment.target}, torch {environment.torch}, driver "
        f"{environment.driver}, power limit {environment.power_limit_w} W, {results.date}",
        markup=False,
    )
    console.print(
        f"median of runs with a cold L2 (flush: {results.flush}); an empty measurement reads "
        f"{results.event_floor_us:.1f} us, which is part of every time",
        markup=False,
    )
    families: dict[str, list[Line]] = {}
    for line in (*results.ceiling_lines, *results.lines):
        families.setdefault(line.family, []).append(line)
    for name, lines in families.items():
        console.print(family_table(name, lines))
    judged = [line for line in (*results.ceiling_lines, *results.lines) if line.verdict]
    short = [line for line in judged if line.verdict == "short"]
    console.print(f"marks: {len(judged) - len(short)} of {len(judged)} passed")
    for line in short:
        console.print(f"  short: {line.name} {line.shape}: {line.mark}", markup=False)
