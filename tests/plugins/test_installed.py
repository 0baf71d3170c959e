# SPDX-License-Identifier: Apache-2.0
"""Packages of a format, a dialect and a container, installed by pip: their authors' suites run, and commands know them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.support.kit import ROOT

PACKAGES = ("toy_format", "toy_dialect", "toy_container")
HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the packages as pip installs them; theirs alone, and without their tests."""
    folder = tmp_path_factory.mktemp("site")
    sources = [shutil.copytree(HERE / name, folder / "sources" / name) for name in PACKAGES]
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--target", folder / "installed", *sources], check=True, capture_output=True)
    return folder / "installed"


def run(site: Path, folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join(map(str, (site, ROOT, ROOT / "formats", ROOT / "cli")))
    command = [sys.executable, "-P", "-m", *words]
    return subprocess.run(
        command, env={**os.environ, "PYTHONPATH": paths}, cwd=folder, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("name", PACKAGES)
def test_its_authors_suite_passes(name: str, site: Path, tmp_path: Path) -> None:
    shutil.copy(HERE / name / "conformance.py", tmp_path)  # away from the sources, so that what is installed is tested
    result = run(site, tmp_path, "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", ".", "conformance.py")
    assert result.returncode == 0, result.stdout


def test_commands_list_read_and_write_them(site: Path, tmp_path: Path) -> None:
    listed = run(site, tmp_path, "surgery_cli", "formats").stdout
    assert all(name in listed for name in ("toy", "toy-file", "toyz"))
    factors = {"toy/layer.q.lora_down.weight": (2, 4), "toy/layer.q.lora_up.weight": (6, 2)}
    save_file({name: np.ones(shape, np.float32) for name, shape in factors.items()}, tmp_path / "mine.safetensors")
    converted = run(site, tmp_path, "surgery_cli", "convert", "mine.safetensors", "--to", "toy", "-o", "folder")
    assert converted.returncode == 0, converted.stderr
    back = run(site, tmp_path, "surgery_cli", "convert", "folder", "--to", "toy-file", "-o", "back.safetensors")
    assert back.returncode == 0, back.stderr
