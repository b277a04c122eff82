"""Roofline plots from the JSON files of `python -m sm120_ops bench`.

`bench --plot` draws one run in detail; these put one family on a page, ours large and the peers
small. They need matplotlib and the JSON file alone, neither torch nor the compiled library.
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot as plt

OURS = "sm120_ops"
# No two builds of the site differ by random names of SVG elements.
plt.rcParams.update({"svg.hashsalt": "sm120_ops", "font.size": 10, "svg.fonttype": "none"})


def load(path: Path) -> dict[str, Any] | None:
    """A benchmark's results with the lines that can be plotted; None if there are none."""
    data = json.loads(path.read_text())
    if "ceilings" not in data:
        return None
    data["lines"] = [line for line in data["lines"] if line["intensity"] and line["tflops"]]
    return data if data["lines"] else None


def draw(data: dict[str, Any]) -> str:
    """Rate over arithmetic intensity, under the copy bandwidth and MMA loops of the same run."""
    figure, axes = plt.subplots(figsize=(9.5, 5), layout="constrained")
    copy_tbps = data["ceilings"]["copy_gbps"] / 1e3
    intensities = [line["intensity"] for line in data["lines"]]
    low, high = min(intensities) / 2, max(*intensities, 300) * 2
    for index, (atom, tflops) in enumerate(data["ceilings"]["atom_tflops"].items()):
        ridge = tflops / copy_tbps
        axes.plot(
            [min(low, ridge), ridge, max(high, ridge)],
            [min(low, ridge) * copy_tbps, tflops, tflops],
            color="0.35",
            linestyle=["-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1))][index % 5],
            linewidth=1,
            label=f"MMA loop {atom}, {tflops:.0f} TFLOP/s",
        )
    points: dict[tuple[bool, str], list[tuple[float, float]]] = {}
    for line in data["lines"]:
        ours = line["provider"] == OURS
        label = line["name"] if ours else line["provider"]
        points.setdefault((ours, label), []).append((line["intensity"], line["tflops"]))
    markers = "osD^v<>phd8"
    for index, (ours, label) in enumerate(sorted(points, key=lambda key: (not key[0], key[1]))):
        axes.scatter(
            *zip(*points[ours, label], strict=True),
            marker=markers[index % len(markers)] if ours else "x",
            s=42 if ours else 18,
            alpha=0.85,
            color=f"C{index % 10}",
            label=f"here: {label}" if ours else label,
        )
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="FLOP per byte that must be moved",
        ylabel="TFLOP/s",
        title=f"{data['environment']['gpu']}, copy {copy_tbps:.2f} TB/s, {data['date'][:10]}",
    )
    axes.grid(True, which="major", alpha=0.25)
    axes.legend(fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    image = io.StringIO()
    figure.savefig(image, format="svg", metadata={"Date": None})
    plt.close(figure)
    return image.getvalue()
