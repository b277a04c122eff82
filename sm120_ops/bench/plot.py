"""The roofline plot of ``bench --plot``; the only user of matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from sm120_ops._console import UsageError

if TYPE_CHECKING:
    from sm120_ops.bench import Results


def require_matplotlib() -> None:
    try:
        import matplotlib
    except ImportError as error:
        raise UsageError(
            "bench: --plot: expected the package matplotlib, got none; run: pip install matplotlib"
        ) from error
    matplotlib.use("Agg")  # a file is written, no display is needed


def roofline(results: Results, path: Path) -> None:
    """Rate over arithmetic intensity, under the measured copy bandwidth and atom rates."""
    require_matplotlib()
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 6))
    low, high = 0.5, 10_000.0  # FLOP per byte
    copy_tbps = results.ceilings.copy_gbps / 1e3
    for index, (atom, tflops) in enumerate(results.ceilings.atom_tflops.items()):
        ridge = tflops / copy_tbps
        axes.plot(
            [low, ridge, high],
            [low * copy_tbps, tflops, tflops],
            color=f"C{index}",
            linewidth=1,
            label=f"{atom} loop, {tflops:.0f} TFLOP/s",
        )
    points: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for line in results.lines:
        if line.intensity is not None and line.tflops is not None:
            point = (line.intensity, line.tflops)
            points.setdefault((line.provider, line.name), []).append(point)
    for (provider, name), values in points.items():
        ours = provider == "sm120_ops"
        intensities, rates = zip(*values, strict=True)
        axes.scatter(
            intensities,
            rates,
            marker="o" if ours else "x",
            s=36 if ours else 20,
            label=f"{provider} {name}",
        )
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="FLOP per byte",
        ylabel="TFLOP/s",
        title=f"{results.environment.gpu}: copy {copy_tbps:.2f} TB/s, {results.date}",
    )
    axes.legend(fontsize=7)
    axes.grid(True, which="both", alpha=0.2)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)
