# SPDX-License-Identifier: Apache-2.0
"""Killed or full anywhere: the output is absent or complete, no litter, and the same command finishes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.crash import Event, lint, matrix

_ROOT = Path(__file__).parents[2]
_SUPPORT = _ROOT / "tests" / "support"
_ENV = {
    **os.environ,
    "PYTHONPATH": os.pathsep.join([str(_ROOT), str(_ROOT / "formats")]),
    "PYTHONDONTWRITEBYTECODE": "1",
}
# Every point takes half a second under strace; all of them with SURGERY_CRASH_ALL=1.
_LIMIT = None if os.environ.get("SURGERY_CRASH_ALL") else 12
_NAIVE = """
import os, sys
os.makedirs(sys.argv[1], exist_ok=True)
for name in ("a", "b"):
    with open(f"{sys.argv[1]}/{name}", "w") as file:
        file.write(name)
"""

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="fork, /proc and strace are Linux's")
needs_strace = pytest.mark.skipif(
    shutil.which("strace") is None, reason="strace is not installed (the in-process matrix runs)"
)


def _inside(scenario: str, folder: Path) -> dict[str, Any]:
    ran = subprocess.run(
        [sys.executable, str(_SUPPORT / "crash_inside.py"), scenario, str(folder)],
        capture_output=True,
        text=True,
        env=_ENV,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    found: dict[str, Any] = json.loads(ran.stdout)
    return found


@pytest.mark.parametrize("scenario", ["fresh", "resumed", "overwrite", "two-step"])
def test_a_kill_or_failure_at_any_call_leaves_all_or_nothing(scenario: str, tmp_path: Path) -> None:
    report = _inside(scenario, tmp_path)
    assert report["failures"] == []
    assert report["lint"] == []
    assert report["calls"] >= 30
    assert report["faults"] == 4 * report["calls"]
    assert sum(report["kills"].values()) > report["calls"]  # torn writes come on top
    if scenario in ("fresh", "overwrite", "two-step"):
        # killed early, between, late: nothing, one, both files are used again
        assert set(report["rerun_reused"]) == {0, 1, 2}
    else:
        assert report["reused"] == "1"
        assert set(report["rerun_reused"]) >= {1, 2}


@needs_strace
def test_a_kill_or_failure_at_any_system_call_leaves_all_or_nothing(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(os.urandom(50_000))
    work = tmp_path / "work"
    work.mkdir()
    out = work / "out"
    report = matrix([sys.executable, str(_SUPPORT / "crash_job.py"), str(source), str(out)], out, _ENV, limit=_LIMIT)
    assert report.failures == []
    assert report.lint == []
    assert report.points == report.absent + report.complete
    # the matrix saw the calls it is about
    assert report.calls["fsync"] >= 8
    assert report.calls["copy_file_range"] >= 2


@needs_strace
def test_the_matrix_catches_an_unsafe_writer(tmp_path: Path) -> None:
    def check(folder: Path) -> None:
        assert sorted(os.listdir(folder)) == ["a", "b"]

    work = tmp_path / "work"
    work.mkdir()
    out = work / "out"
    report = matrix([sys.executable, "-c", _NAIVE, str(out)], out, _ENV, check=check, limit=_LIMIT)
    assert any("output" in failure for failure in report.failures)
    assert any("never synced" in issue for issue in report.lint)


@pytest.mark.parametrize(
    ("events", "issue"),
    [
        ([Event("create", "/p/a"), Event("fsync", "/p")], "/p/a was never synced"),
        ([Event("create", "/p/a"), Event("fsync", "/p/a")], "/p was never synced"),
        (
            [Event("mkdir", "/p/d"), Event("rename", "/p/d", "/p/e"), Event("fsync", "/p")],
            "/p/d was renamed before it was synced",
        ),
        (
            [
                Event("mkdir", "/p/d"),
                Event("create", "/p/d/a"),
                Event("fsync", "/p/d"),
                Event("rename", "/p/d", "/p/e"),
                Event("fsync", "/p"),
            ],
            "/p/d/a was renamed before it was synced",
        ),
    ],
)
def test_the_lint_finds_unsafe_calls(events: list[Event], issue: str) -> None:
    assert lint(events) == [issue]
