# SPDX-License-Identifier: Apache-2.0
"""A DoRA is called one wherever an adapter's kind is told, though its file says LORA."""

from __future__ import annotations

from pathlib import Path

import pytest

import surgery
from tests.support.kit import ROOT

BASE, LORA, DORA = (ROOT / "examples" / name for name in ("base", "lora", "dora"))


@pytest.mark.parametrize(("adapter", "kind"), [(LORA, "LORA"), (DORA, "DORA")])
def test_every_command_calls_it_by_its_name(adapter: Path, kind: str, tmp_path: Path) -> None:
    assert surgery.inspect(adapter).kind == kind
    assert surgery.report(adapter, base=BASE).adapters[0].kind == kind
    merged = surgery.merge(BASE, adapter, output=tmp_path / "merged", reversible=True)
    assert f"(peft {kind}, weight 1)" in str(merged)
    assert f"| peft {kind} |" in (tmp_path / "merged" / "README.md").read_text()
    exported = surgery.export_onnx(BASE, merge=[adapter], output=tmp_path / "graph")
    assert [entry["kind"] for entry in exported.contract.adapters] == [kind]
    surgery.unmerge(tmp_path / "merged", adapter, output=tmp_path / "back")
