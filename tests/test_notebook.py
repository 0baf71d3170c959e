# SPDX-License-Identifier: Apache-2.0
"""The notebook of the demo: it is what its program writes, it runs, and its results show themselves."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tools.notebook import NOTEBOOK, render

nbformat = pytest.importorskip("nbformat", reason="the extra docs is not installed")
nbclient = pytest.importorskip("nbclient", reason="the extra docs is not installed")
pytest.importorskip("ipykernel", reason="the extra docs is not installed")

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 60  # of processor time, which a busy machine does not stretch


def test_the_notebook_is_what_its_program_writes():
    assert nbformat.read(NOTEBOOK, as_version=4) == render(), "run: python tools/notebook.py"


def test_the_notebook_runs_and_shows_its_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(str(ROOT / folder) for folder in (".", "formats", "cli")))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    before = os.times()
    run = nbclient.NotebookClient(
        render(), timeout=10 * SECONDS, resources={"metadata": {"path": str(ROOT / "examples")}}
    ).execute()
    after = os.times()
    spent = after.children_user + after.children_system - before.children_user - before.children_system
    assert 0 < spent < SECONDS

    shown = [
        output.get("data", {}).get("text/html", "").startswith('<div class="surgery">')
        for cell in run.cells
        if cell.cell_type == "code"
        for output in cell.outputs
    ]
    assert shown.count(True) == 6  # inspect, report, merge, extract, check, convert
    text = "".join(output.text for cell in run.cells for output in cell.get("outputs", ()) if "text" in output)
    assert "no weight can hold them" in text
