# SPDX-License-Identifier: Apache-2.0
"""A killed command on graphs goes on with what is its own, and with nothing of one whose graphs are alike and whose weights are not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import surgery
from tests.support.killed import contents, killed
from tests.support.kit import ROOT

BASE, LORA = str(ROOT / "examples" / "base"), str(ROOT / "examples" / "lora")
CODES = {"weights_type": "int4"}


@pytest.mark.parametrize(
    ("before", "options"),
    [({}, {"scales": "search"}), ({"rounding": "nearest"}, {"rounding": "feedback"}), ({"scales": "search"}, {})],
    ids=str,
)
def test_codes_of_other_options_are_not_taken_over(
    before: dict[str, Any], options: dict[str, Any], tmp_path: Path
) -> None:
    killed("export_onnx", BASE, merge=[LORA], output=tmp_path / "out", **CODES, **before)
    for name in ("out", "single"):
        surgery.export_onnx(BASE, merge=[LORA], output=tmp_path / name, **CODES, **options)
    assert contents(tmp_path / "out") == contents(tmp_path / "single")


def test_codes_of_the_same_options_are(tmp_path: Path) -> None:
    stage = killed("export_onnx", BASE, merge=[LORA], output=tmp_path / "out", **CODES)
    inode = (stage / "quantised.safetensors").stat().st_ino
    surgery.export_onnx(BASE, merge=[LORA], output=tmp_path / "out", **CODES)
    assert (tmp_path / "out" / "quantised.safetensors").stat().st_ino == inode


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("graph") / "graph"
    surgery.export_onnx(BASE, swap=[LORA], output=folder)
    return folder / "model.onnx"


def test_a_merge_takes_nothing_over_that_it_leaves_out(tmp_path: Path) -> None:
    surgery.export_onnx(BASE, output=tmp_path / "graph")
    graph = str(tmp_path / "graph" / "model.onnx")
    killed("merge", graph, LORA, graph_of=BASE, output=tmp_path / "out")
    for name in ("out", "single"):
        done = surgery.merge(graph, LORA, graph_of=BASE, without="*q_proj", output=tmp_path / name)
        assert any(warning.startswith("left out, as --without says: ") for warning in done.warnings)
    assert contents(tmp_path / "out") == contents(tmp_path / "single")
    inputs = json.loads((tmp_path / "out" / "surgery_manifest.json").read_text())["inputs"]
    assert all("q_proj" in name for name in inputs["left_out"])


def test_an_adapter_is_folded_at_its_own_strength(graph: Path, tmp_path: Path) -> None:
    adapter = str(graph.parent / "adapters" / "lora.onnx_adapter")
    killed("fold", str(graph), adapter, output=tmp_path / "out")
    for name in ("out", "single"):
        surgery.fold(graph, [(adapter, 0.5)], output=tmp_path / name)
    assert contents(tmp_path / "out") == contents(tmp_path / "single")


def test_a_folder_tells_nothing_of_where_its_graph_lay(graph: Path, tmp_path: Path) -> None:
    shutil.copytree(graph.parent, tmp_path / "elsewhere")
    for name, folder in (("here", graph.parent), ("there", tmp_path / "elsewhere")):
        surgery.fold(folder / "model.onnx", [folder / "adapters" / "lora.onnx_adapter"], output=tmp_path / name)
    assert contents(tmp_path / "here") == contents(tmp_path / "there")
