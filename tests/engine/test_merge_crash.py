# SPDX-License-Identifier: Apache-2.0
"""The real command, killed at its output system calls: no output or a complete one, and the same command again finishes."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest

from tests.support.crash import matrix
from tests.support.kit import environment, make_base, make_lora

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux") or shutil.which("strace") is None, reason="needs strace"
)
# Each point is a whole run of the command, twice; all of them with SURGERY_CRASH_ALL=1.
LIMIT = None if os.environ.get("SURGERY_CRASH_ALL") else 6


def test_merge_survives_every_kill(tmp_path: Path) -> None:
    base, lora = make_base(tmp_path / "base"), make_lora(tmp_path / "lora")
    (tmp_path / "work").mkdir()
    out = tmp_path / "work" / "out"
    command = [
        sys.executable,
        "-m",
        "surgery_cli",
        "-q",
        "merge",
        str(base),
        str(lora),
        "-o",
        str(out),
        "--workers",
        "1",
    ]
    environ = environment(PYTHONDONTWRITEBYTECODE="1")
    report = matrix(command, out, environ, limit=LIMIT, faults=LIMIT is None)
    assert report.points >= (LIMIT or 30)
    assert report.failures == []
    assert report.lint == []
    assert report.absent > 0
