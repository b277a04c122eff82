"""What `mkdocs build` adds to the pages: data-flow pictures, and roofline plots of the evidence.

Both are made at each build, so that they cannot fall behind what they show.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import dataflow  # noqa: E402
import roofline  # noqa: E402

EVIDENCE = HERE.parent / "evidence"
PLOTS_PAGE = "rooflines.md"
PLOTS_MARK = "<!-- one plot for each benchmark of docs/evidence -->"


def benchmarks() -> dict[Path, dict[str, Any]]:
    """Results that can be plotted, by their path below docs/, the newest folder first."""
    folders = sorted((path for path in EVIDENCE.iterdir() if path.is_dir()), reverse=True)
    paths = [path for folder in folders for path in sorted(folder.glob("*.json"))]
    loaded = {path.relative_to(HERE.parent): roofline.load(path) for path in paths}
    return {path: data for path, data in loaded.items() if data is not None}


def image_of(path: Path) -> str:
    return f"images/roofline-{path.parent.name}-{path.stem}.svg"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for name, picture in dataflow.PICTURES.items():
        image = f"images/{name}.svg"
        files.append(File.generated(config, image, content=dataflow.svg(picture)))
    for path, data in benchmarks().items():
        files.append(File.generated(config, image_of(path), content=roofline.draw(data)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    if page.file.src_uri != PLOTS_PAGE:
        return markdown
    sections = []
    for path, data in benchmarks().items():
        environment = data["environment"]
        sections.append(
            f"## {path.stem}, {path.parent.name}\n\n"
            f"![Roofline of {path.stem}]({image_of(path)})\n\n"
            f"{environment['gpu']}, target {environment['target']}, torch {environment['torch']}, "
            f"driver {environment['driver']}: `{data['command']}` on {data['date'][:10]}, "
            f"[{path}]({path}).\n"
        )
    return markdown.replace(PLOTS_MARK, "\n".join(sections))
