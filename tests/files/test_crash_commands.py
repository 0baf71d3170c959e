# SPDX-License-Identifier: Apache-2.0
"""Every command that writes, killed, interrupted or failed at a call on its output: a few points of some; SURGERY_CRASH_ALL=1 takes all."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.crash_table import CASES
from tests.support.kit import ROOT, environment

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="fork and /proc are Linux's")
ALL = bool(os.environ.get("SURGERY_CRASH_ALL"))
# One of each way to write: a folder, a file, files added to a folder, graphs, several outputs, folders between steps.
FEW = [
    "combine-overwrite",
    "convert-gguf",
    "export-beside-swap",
    "insert-new-residual",
    "extract-graphs",
    "apply",
    "apply-two",
]


def _ran(folder: Path, names: list[str], limit: int | None) -> list[dict[str, Any]]:
    program = [sys.executable, str(ROOT / "tests/support/crash_commands.py"), str(folder / "home"), *names]
    if limit is not None:
        program += ["--limit", str(limit)]
    ran = subprocess.run(program, capture_output=True, text=True, env=environment(), check=False)
    assert ran.returncode == 0, ran.stderr
    return [json.loads(line) for line in ran.stdout.splitlines()]


@pytest.mark.parametrize("name", [case.name for case in CASES] if ALL else [",".join(FEW)])
def test_a_command_leaves_all_or_nothing_wherever_it_ends(name: str, tmp_path: Path) -> None:
    names = name.split(",")
    reports = _ran(tmp_path, names, None if ALL else 2)
    assert [report["case"] for report in reports] == sorted(names, key=[case.name for case in CASES].index)
    for report in reports:
        assert report["failures"] == []
        assert min(report[kind] for kind in ("kills", "faults", "short", "signals")) > 0
