# SPDX-License-Identifier: Apache-2.0
"""An export reads a base and adapters, and writes into none of them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import surgery

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_an_export_into_the_folder_of_an_adapter_is_refused(tmp_path: Path) -> None:
    lora = shutil.copytree(EXAMPLES / "lora", tmp_path / "lora")
    before = sorted(path.name for path in lora.iterdir())
    with pytest.raises(surgery.FitError, match="input"):
        surgery.export_onnx(EXAMPLES / "base", lora, output=lora / "onnx")
    assert sorted(path.name for path in lora.iterdir()) == before
