# SPDX-License-Identifier: Apache-2.0
"""On the CPU a merge never imports torch, which takes longer than most merges."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.kit import ROOT

SCRIPT = """
import os, sys
leave = os._exit
os._exit = lambda code: leave(code or 10 * ("torch" in sys.modules) or 20 * ("numpy" not in sys.modules))
from surgery_cli.__main__ import main
main()
"""


@pytest.mark.parametrize("adapter", ["lora", "dora"])
def test_the_merge_of_the_examples_runs_on_numpy_alone(adapter: str, tmp_path: Path) -> None:
    words = ["merge", str(ROOT / "examples" / "base"), str(ROOT / "examples" / adapter), "-o", str(tmp_path / "out")]
    done = subprocess.run([sys.executable, "-c", SCRIPT, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "surgery_manifest.json").exists()
