# SPDX-License-Identifier: Apache-2.0
"""An export that was killed goes on with what is its own, and with nothing of one whose graphs are alike and whose codes are not."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import surgery
from tests.support.kit import ROOT, environment

BASE, LORA = str(ROOT / "examples" / "base"), str(ROOT / "examples" / "lora")
KILLED = """
import json, os, sys
import surgery
from surgery_formats.files.output.folder import OutputFolder
base, lora, output, options = sys.argv[1:]
OutputFolder.commit = lambda *args, **options: os._exit(9)
surgery.export_onnx(base, merge=[(lora, 1.0)], output=output, **json.loads(options))
"""
CODES = {"weights_type": "int4"}


def killed(output: Path, options: dict[str, Any]) -> Path:
    """The folder that an export leaves when it is killed at the last moment."""
    words = [BASE, LORA, str(output), json.dumps(options)]
    done = subprocess.run([sys.executable, "-c", KILLED, *words], env=environment(), capture_output=True, check=False)
    assert done.returncode == 9, done.stderr.decode()
    (stage,) = output.parent.glob(f".{output.name}.surgery-*")
    return stage


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize(
    ("before", "options"),
    [({}, {"scales": "search"}), ({"rounding": "nearest"}, {"rounding": "feedback"}), ({"scales": "search"}, {})],
    ids=str,
)
def test_codes_of_other_options_are_not_taken_over(
    before: dict[str, Any], options: dict[str, Any], tmp_path: Path
) -> None:
    killed(tmp_path / "out", CODES | before)
    for name in ("out", "single"):
        surgery.export_onnx(BASE, merge=[(LORA, 1.0)], output=tmp_path / name, **CODES, **options)
    assert contents(tmp_path / "out") == contents(tmp_path / "single")


def test_codes_of_the_same_options_are(tmp_path: Path) -> None:
    inode = (killed(tmp_path / "out", CODES) / "quantised.safetensors").stat().st_ino
    surgery.export_onnx(BASE, merge=[(LORA, 1.0)], output=tmp_path / "out", **CODES)
    assert (tmp_path / "out" / "quantised.safetensors").stat().st_ino == inode
