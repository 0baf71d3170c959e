# SPDX-License-Identifier: Apache-2.0
"""What is published: the wheel, the source distribution and their metadata, built here by the project's own backend."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_bytes
from email.message import Message
from pathlib import Path

import pytest

from tests.support.kit import ROOT

REPOSITORY = "https://github.com/model-surgery/surgery"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The wheel and the source distribution."""
    pytest.importorskip("hatchling")
    pytest.importorskip("hatch_fancy_pypi_readme")
    out = tmp_path_factory.mktemp("dist")
    code = f"from hatchling.build import build_sdist, build_wheel; build_wheel({str(out)!r}); build_sdist({str(out)!r})"
    subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, env={**os.environ, "PYTHONPATH": ""}
    )
    (wheel,), (source,) = out.glob("*.whl"), out.glob("*.tar.gz")
    return wheel, source


@pytest.fixture(scope="module")
def metadata(built: tuple[Path, Path]) -> Message:
    with zipfile.ZipFile(built[0]) as wheel:
        (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
        return message_from_bytes(wheel.read(name))


def test_the_wheel_has_the_packages_and_the_manual_and_nothing_else(built: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(built[0]) as wheel:
        names = wheel.namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if "." not in top} == {"surgery", "surgery_formats", "surgery_cli"}
    assert {top.rpartition(".")[2] for top in tops if "." in top} == {"dist-info", "data"}
    for package in ("surgery", "surgery_formats", "surgery_cli"):
        assert f"{package}/py.typed" in names
    manual = {name.rpartition("/")[2] for name in names if "/share/man/man1/" in name}
    assert manual == {page.name for page in (ROOT / "docs" / "man").iterdir()}
    assert not [name for name in names if re.search(r"__pycache__|\.pyc$|(^|/)(tests?|examples|golden)/", name)]


def test_every_module_template_style_and_schema_is_in_the_wheel(built: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(built[0]) as wheel:
        names = set(wheel.namelist())
    for top in (ROOT / "surgery", ROOT / "formats" / "surgery_formats", ROOT / "cli" / "surgery_cli"):
        files = (path for path in top.rglob("*") if path.is_file() and path.suffix != ".pyc")
        assert {path.relative_to(top.parent).as_posix() for path in files} <= names


def test_the_source_distribution_can_be_tested(built: tuple[Path, Path]) -> None:
    with tarfile.open(built[1]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for name in (
        "README.md",
        "CHANGELOG.md",
        "LICENSE",
        "Makefile",
        "constraints.txt",
        "pyproject.toml",
        "docs/cli.md",
        "mkdocs.yml",
    ):
        assert name in names
    assert {
        "tests/test_packaging.py",
        "tests/support/kit.py",
        "examples/demo.py",
        "examples/base/model.safetensors",
    } <= names


def test_the_metadata_is_complete(metadata: Message) -> None:
    assert metadata["Name"] == "model-surgery"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Author"] == "surgery contributors"
    assert metadata["Requires-Python"] == ">=3.11"
    links = dict(link.split(", ") for link in metadata.get_all("Project-URL", []))
    assert {"Homepage", "Documentation", "Changelog", "Issues", "Source"} == set(links)
    assert all(link.startswith(REPOSITORY) for link in links.values())
    needed = [line for line in metadata.get_all("Requires-Dist", []) if "extra ==" not in line]
    assert not [line for line in needed if re.match(r"(torch|onnx|onnxruntime)\b", line)]


def test_the_readme_on_pypi_has_no_link_that_leads_nowhere(metadata: Message) -> None:
    text = str(metadata.get_payload())
    links = re.findall(r"\]\(([^)\s]+)\)", re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S))
    assert len(links) > 30
    for link in links:
        assert link.startswith(("https://", "#")), link
        if link.startswith(f"{REPOSITORY}/blob/main/"):
            assert (ROOT / link.removeprefix(f"{REPOSITORY}/blob/main/").partition("#")[0]).exists(), link
