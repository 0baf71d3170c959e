# SPDX-License-Identifier: Apache-2.0
"""The folder in which recipes are applied."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.support.kit import ROOT


@pytest.fixture
def kitchen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the example, which is the current one."""
    shutil.copytree(ROOT / "examples", tmp_path / "examples", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.chdir(tmp_path)
    return tmp_path
