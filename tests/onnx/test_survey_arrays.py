# SPDX-License-Identifier: Apache-2.0
"""Inspecting ``.onnx_adapter`` files that are no LoRA of modules: what the arrays are, and whether the graph beside takes them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from click.testing import CliRunner

import surgery
from surgery.reports.adapter_report import AdapterReport
from surgery.reports.array_report import ArrayFileReport
from surgery_cli.group import surgery as command
from surgery_formats.errors import MalformedError
from tests.support.kit import ROOT

OLIVE = ROOT / "tests" / "golden" / "onnx_graphs" / "olive-llama-slots"


def inspected(path: Path) -> ArrayFileReport:
    report = surgery.inspect(path)
    assert isinstance(report, ArrayFileReport)
    json.dumps(report.as_json(), allow_nan=False)
    assert report.summary(verbose=True).as_text(100)
    return report


def saved(path: Path, arrays: dict[str, np.ndarray]) -> Path:
    values = {name: onnxruntime.OrtValue.ortvalue_from_numpy(array) for name, array in arrays.items()}
    made = onnxruntime.AdapterFormat()
    made.set_adapter_version(1)
    made.set_model_version(1)
    made.set_parameters(values)
    made.export_adapter(str(path))
    return path


def test_keys_and_values_of_a_prefix_are_told_with_the_graph_that_takes_them(tmp_path: Path) -> None:
    surgery.export_onnx(ROOT / "examples" / "base", prefix=ROOT / "examples" / "prompt", output=tmp_path / "out")
    (path,) = (tmp_path / "out" / "prompts").glob("*.onnx_adapter")
    report = inspected(path)
    assert report.holds == "keys and values of 16 virtual tokens in 6 layers"
    assert report.graph == tmp_path / "out" / "model.onnx"
    assert not report.unmet
    assert report.parameters == 2 * 6 * 2 * 16 * 32


def test_factors_under_names_of_olives_are_told(tmp_path: Path) -> None:
    report = surgery.inspect(OLIVE / "adapter_weights.onnx_adapter")
    assert isinstance(report, AdapterReport)  # names and orientation of its factors are known, so that it is a LoRA
    assert (report.format, report.kind) == ("onnx-adapter", "LORA")
    assert "LoRA of 14 weights" in str(report)


def test_names_that_the_graph_lacks_are_listed(tmp_path: Path) -> None:
    shutil.copytree(OLIVE, tmp_path / "m")
    name = "model.layers.0.attn.q_proj.lora_A.MatMul.weight"
    arrays = {
        name: np.zeros((33, 4), np.float32),
        name.replace("lora_A", "lora_B"): np.zeros((4, 32), np.float16),
        "model.layers.9.attn.q_proj.lora_A.MatMul.weight": np.zeros((32, 4), np.float32),
        "input_ids": np.zeros((1, 4), np.int64),
    }
    report = inspected(saved(tmp_path / "m" / "a.onnx_adapter", arrays))
    assert dict(report.unmet) == {
        name: "an input of other sizes",
        name.replace("lora_A", "lora_B"): "an input of F32",
        "model.layers.9.attn.q_proj.lora_A.MatMul.weight": "no input",
    }
    assert report.warnings == ("3 of 4 arrays do not fit the graph: onnxruntime refuses the file",)
    run = CliRunner().invoke(command, ["inspect", str(tmp_path / "m" / "a.onnx_adapter")])
    assert run.exit_code == 0
    assert "model.layers.9.attn.q_proj" in run.stdout


def test_a_broken_graph_beside_does_not_hide_the_file(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"nothing")
    report = inspected(saved(tmp_path / "a.onnx_adapter", {"x": np.zeros(3, np.float32)}))
    assert (report.graph, report.holds) == (None, "1 other arrays")


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.onnx_adapter"
    path.write_bytes((OLIVE / "adapter_weights.onnx_adapter").read_bytes()[:2000])
    with pytest.raises(MalformedError):
        surgery.inspect(path)
