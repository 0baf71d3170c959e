# SPDX-License-Identifier: Apache-2.0
"""`tools/install.py` says of pip what a person waits for, and its errors as they are."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tools.install import Told

ROOT = Path(__file__).resolve().parents[1]


def test_a_download_is_one_line_with_its_size():
    told = Told()
    said = [
        "Collecting torch==2.13.0\n",
        "  Downloading torch-2.13.0-cp311-cp311-manylinux_2_28_x86_64.whl.metadata (31 kB)\n",
        "  Downloading torch-2.13.0-cp311-cp311-manylinux_2_28_x86_64.whl (532.2 MB)\n",
        "Requirement already satisfied: pip\n",
        "Using cached numpy-2.4.6-cp311-cp311-manylinux_2_27_x86_64.whl (16.9 MB)\n",
        "Processing /somewhere/jinja2-3.1.6-py3-none-any.whl (from torch==2.13.0)\n",
        "Installing collected packages: numpy, jinja2, torch\n",
    ]
    lines = [line.split() for line in map(told.line, said) if line]
    assert lines == [
        ["torch", "2.13.0", "532.2", "MB"],
        ["numpy", "2.4.6", "16.9", "MB", "from", "here"],
        ["jinja2", "3.1.6", "from", "here"],
        ["unpacking", "3", "packages"],
    ]
    assert round(told.fetched) == 532_200_000


def test_an_error_of_pip_is_shown_and_is_the_exit_code(tmp_path: Path):
    words = [sys.executable, ROOT / "tools" / "install.py", sys.executable, "--no-index", str(tmp_path / "nothing")]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "ERROR" in done.stdout
    assert "downloaded" not in done.stdout
