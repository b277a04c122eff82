"""What a release needs beside the library: workflows, pages, one version, comparing wheels."""

from __future__ import annotations

import importlib.util
import re
import zipfile
from pathlib import Path
from types import ModuleType

import pytest
import wheels

import sm120_ops
from sm120_ops import _load

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.source


def text(*path: str) -> str:
    return ROOT.joinpath(*path).read_text()


# ---- workflows -----------------------------------------------------------------------------------

WORKFLOWS = sorted(path.name for path in (ROOT / ".github" / "workflows").glob("*.yml"))


@pytest.mark.parametrize("name", WORKFLOWS)
def test_actions_are_pinned_by_commit(name: str) -> None:
    used = re.findall(r"uses: (.*)", text(".github", "workflows", name))
    assert used
    pinned = re.compile(r"[\w-]+/[\w-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+")
    assert [line for line in used if not pinned.fullmatch(line)] == []


def test_one_commit_for_each_action() -> None:
    used = {
        line
        for name in WORKFLOWS
        for line in re.findall(r"uses: (.*)", text(".github", "workflows", name))
    }
    actions = [line.split("@")[0] for line in used]
    assert len(actions) == len(set(actions))


@pytest.mark.parametrize("name", WORKFLOWS)
def test_workflows_ask_for_little(name: str) -> None:
    content = text(".github", "workflows", name)
    assert "\nconcurrency:\n" in content
    assert "\npermissions:\n  contents: read\n" in content
    assert content.count("runs-on:") == content.count("timeout-minutes:")
    assert content.count("actions/checkout@") == content.count("persist-credentials: false")
    assert "pull_request_target" not in content
    assert "secrets." not in content  # trusted publishing needs none


# ---- one version, one set of tools ---------------------------------------------------------------


def test_version_is_everywhere() -> None:
    assert f"\nversion: {sm120_ops.__version__}\n" in text("CITATION.cff")
    assert f"\n## {sm120_ops.__version__}" in text("CHANGELOG.md")


def test_pre_commit_has_the_tools_of_lint() -> None:
    lint = re.search(r"^lint = \[(.*)\]$", text("pyproject.toml"), re.MULTILINE)
    assert lint is not None
    asked = re.findall(r'additional_dependencies: \["(.*)"\]', text(".pre-commit-config.yaml"))
    assert set(asked) <= set(re.findall(r'"([^"]+)"', lint[1]))


# ---- pages ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dataflow() -> ModuleType:
    spec = importlib.util.spec_from_file_location("dataflow", ROOT / "docs/_make/dataflow.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


REFERENCE = {path.stem: path.read_text() for path in (ROOT / "docs" / "reference").glob("*.md")}


def test_every_function_is_on_a_reference_page() -> None:
    documented = set(
        re.findall(r"^::: sm120_ops\.(.*)$", "\n".join(REFERENCE.values()), re.MULTILINE)
    )
    public = {name for name in sm120_ops.__all__ if callable(getattr(sm120_ops, name))}
    public |= {f"nn.{name}" for name in sm120_ops.nn.__all__}
    assert public - documented == set()


def test_every_page_is_in_the_navigation() -> None:
    pages = {
        str(path.relative_to(ROOT / "docs"))
        for path in (ROOT / "docs").rglob("*.md")
        if "_make" not in path.parts
    }
    named = set(re.findall(r"^ +- (?:[^:\n]+: )?(\S+\.md)$", text("mkdocs.yml"), re.MULTILINE))
    assert named == pages


def test_every_family_has_a_picture(dataflow: ModuleType) -> None:
    shown = set(re.findall(r"\.\./images/(\w+)\.svg", "\n".join(REFERENCE.values())))
    assert shown == set(dataflow.PICTURES)
    for picture in dataflow.PICTURES.values():
        boxes = {name for row in picture.rows for name in row}
        assert {name for arrow in picture.arrows for name in arrow} == boxes
        drawn = dataflow.svg(picture)
        assert drawn.count("<rect") == len(boxes) + 1
        assert len(drawn) < 16_000


@pytest.mark.parametrize("page", ["docs/index.md", "docs/quickstart.md"])
def test_code_of_the_pages_runs(page: str) -> None:
    """All Python blocks of a page, one after the other; those that need a GPU are left out."""
    namespace: dict[str, object] = {}
    blocks = re.findall(r"```python\n(.*?)```", text(page), re.DOTALL)
    assert blocks
    for block in blocks:
        if "CUDAGraph" not in block:
            exec(compile(block, page, "exec"), namespace)


# ---- comparison of wheels ------------------------------------------------------------------------


def wheel_of(path: Path, library: bytes, *others: str) -> str:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(wheels.LIBRARY, library)
        for name in others:
            archive.writestr(name, "")
    return str(path)


def test_wheels_are_told_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    library = _load.LIBRARY.read_bytes()
    assert {".text", ".nv_fatbin", ".rodata"} <= wheels.sections(library).keys()
    a = wheel_of(tmp_path / "a.whl", library, "x")
    assert wheels.main([a, wheel_of(tmp_path / "b.whl", library, "x"), "--code"]) == 0
    assert "equal: 2 files" in capsys.readouterr().out

    assert wheels.main([a, wheel_of(tmp_path / "c.whl", library, "y")]) == 1
    assert "only in" in capsys.readouterr().out

    changed = bytearray(library)
    changed[library.index(b"sm120_ops.")] ^= 1  # an error message's beginning, in .rodata
    other = wheel_of(tmp_path / "d.whl", bytes(changed), "x")
    assert wheels.main([a, other]) == 0
    assert wheels.main([a, other, "--code"]) == 1
    assert "differs in section .rodata" in capsys.readouterr().out
