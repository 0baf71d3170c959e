# SPDX-License-Identifier: Apache-2.0
"""A killed command goes on with what is its own, and with nothing of one whose adapters have the same bytes and another scale."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import surgery
from tests.support.killed import contents, killed
from tests.support.kit import ROOT

BASE, OTHER = str(ROOT / "examples" / "base"), str(ROOT / "examples" / "dora")

COMMANDS: dict[str, tuple[str, list[str], dict[str, Any]]] = {
    "merge": ("merge", [BASE, "LORA"], {}),
    "merge of other types": ("merge", [BASE, "LORA"], {"dtype": "fp32", "reversible": True}),
    "merge in the place of others": ("merge", ["MERGED", OTHER], {"replace": ["LORA"]}),
    "unmerge": ("unmerge", ["MERGED", "LORA"], {}),
    "export": ("export_onnx", [BASE, "LORA"], {"merge_to": "full"}),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_scale_that_was_changed_since_counts(command: str, tmp_path: Path) -> None:
    lora, merged = tmp_path / "lora", tmp_path / "merged"
    shutil.copytree(ROOT / "examples" / "lora", lora)
    surgery.merge(BASE, lora, output=merged)
    text = json.dumps(COMMANDS[command]).replace("LORA", str(lora)).replace("MERGED", str(merged))
    verb, given, options = json.loads(text)
    killed(verb, *given, output=tmp_path / "out", **options)
    config = json.loads((lora / "adapter_config.json").read_text())
    (lora / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 2 * config["lora_alpha"]}))
    for name in ("out", "single"):
        getattr(surgery, verb)(*given, output=tmp_path / name, **options)
    assert contents(tmp_path / "out") == contents(tmp_path / "single")
