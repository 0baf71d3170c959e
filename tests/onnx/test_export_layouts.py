# SPDX-License-Identifier: Apache-2.0
"""Folders laid out for other programs: their names, what those read beside the graph, and the same model in all."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

import surgery
from surgery.onnx.export.layouts import LAYOUTS
from surgery.reports.graph_report import GraphReport
from surgery_formats.errors import FitError, NotFoundError, ProofError, SurgeryError
from surgery_formats.models.checkpoint import open_checkpoint
from tests.oracles import recipes

BASE, LORA, PROMPT = "examples/base", "examples/lora", "examples/prompt"
IDS = [5, 17, 3, 29]

FILES = {
    "plain": {"model.onnx", "prefill.onnx", "genai_config.json", "base.safetensors", "delta.safetensors"},
    "transformers.js": {"onnx/model.onnx", "onnx/model.onnx_data", "onnx/model.onnx_data_1"},
    "optimum": {"model.onnx", "base.safetensors", "delta.safetensors"},
    "genai": {"model.onnx", "prefill.onnx", "genai_config.json", "base.safetensors", "delta.safetensors"},
    "triton": {"1/model.onnx", "config.pbtxt", "1/base.safetensors", "1/delta.safetensors"},
}
ALWAYS = {"config.json", "surgery_manifest.json", "tokenizer.json"}


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("layout", FILES)
def test_every_layout_holds_the_same_merged_model(tmp_path: Path, layout: str) -> None:
    surgery.export_onnx(BASE, LORA, output=tmp_path / "own", merge_to="full")
    wanted = surgery.run(tmp_path / "own", [IDS], max_new=6).texts[0].tokens
    result = surgery.export_onnx(BASE, LORA, output=tmp_path / "out", layout=layout)
    assert files(tmp_path / "out") >= FILES[layout] | ALWAYS
    graphs = {name for name in files(tmp_path / "out") if name.endswith(".onnx")}
    assert graphs == {name for name in FILES[layout] if name.endswith(".onnx")}
    assert surgery.run(tmp_path / "out", [IDS], max_new=6).texts[0].tokens == wanted
    assert surgery.verify(tmp_path / "out").kind == "graph"
    assert surgery.verify(tmp_path / "out", against=BASE, adapters=[LORA]).kind == "graph"
    assert {file.name for file in result.contract.weights} == {
        name.rpartition("/")[2] for name in FILES[layout] if "safetensors" in name or "onnx_data" in name
    }


def test_nobody_loads_the_base_of_a_merged_export_as_the_merged_model(tmp_path: Path) -> None:
    surgery.export_onnx(BASE, LORA, output=tmp_path / "out")
    with pytest.raises(SurgeryError, match="2 files of weights"):
        open_checkpoint(tmp_path / "out")
    graph = surgery.inspect(tmp_path / "out")
    assert isinstance(graph, GraphReport)
    assert graph.path == tmp_path / "out" / "model.onnx"
    shutil.copy(tmp_path / "out" / "base.safetensors", tmp_path / "out" / "another.safetensors")
    with pytest.raises(SurgeryError, match="3 files of weights"):  # not all are the graph's
        surgery.inspect(tmp_path / "out")
    surgery.export_onnx(BASE, output=tmp_path / "plain")
    assert open_checkpoint(tmp_path / "plain").main.tensors.keys() == open_checkpoint(BASE).main.tensors.keys()


def test_weights_that_changed_under_another_name_are_told(tmp_path: Path) -> None:
    surgery.export_onnx(BASE, output=tmp_path / "out", layout="transformers.js")
    assert "weight bytes" in {check.name for check in surgery.verify(tmp_path / "out", against=BASE).checks}
    weights = tmp_path / "out" / "onnx" / "model.onnx_data"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(ProofError, match="its bytes have changed since it was written"):
        surgery.verify(tmp_path / "out", against=BASE)


def test_transformers_js_is_told_of_the_weight_files_and_the_type(tmp_path: Path) -> None:
    surgery.export_onnx(BASE, LORA, output=tmp_path / "out", layout="transformers.js")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["transformers.js_config"] == {"dtype": "fp32", "use_external_data_format": {"model.onnx": 2}}
    kept = {key: value for key, value in config.items() if key != "transformers.js_config"}
    assert kept == json.loads(Path(BASE, "config.json").read_text())

    surgery.export_onnx(BASE, output=tmp_path / "half", layout="transformers.js", target="portable", dtype="fp16")
    assert files(tmp_path / "half") >= {"onnx/model_fp16.onnx", "onnx/model_fp16.onnx_data"}
    surgery.export_onnx(BASE, output=tmp_path / "one", layout="transformers.js", weights="embed")
    config = json.loads((tmp_path / "one" / "config.json").read_text())
    assert config["transformers.js_config"] == {"dtype": "fp32"}


def test_tritons_configuration_names_the_graphs_inputs(tmp_path: Path) -> None:
    result = surgery.export_onnx(BASE, output=tmp_path / "llama", swap=[LORA], layout="triton")
    session = onnxruntime.InferenceSession(tmp_path / "llama" / "1" / "model.onnx")
    text = (tmp_path / "llama" / "config.pbtxt").read_text()
    assert text.startswith('name: "llama"\nbackend: "onnxruntime"\n')
    for port in (*session.get_inputs(), *session.get_outputs()):
        dims = ", ".join(str(size) if isinstance(size, int) else "-1" for size in port.shape)
        kind = {"tensor(int64)": "INT64", "tensor(float)": "FP32"}[port.type]
        assert f'{{ name: "{port.name}" data_type: TYPE_{kind} dims: [ {dims} ] }}' in text
    assert {slot.A for slot in result.contract.slots} <= {port.name for port in session.get_inputs()}  # required


def test_sentence_transformers_finds_the_graph_below(tmp_path: Path) -> None:
    base = recipes.build("bert_sentence", tmp_path / "base")
    surgery.export_onnx(base, output=tmp_path / "out", layout="sentence-transformers")
    assert files(tmp_path / "out") >= {"onnx/model.onnx", "onnx/model.safetensors", "config.json"}
    assert surgery.run(tmp_path / "out", [IDS]).arrays["last_hidden_state"].shape[:2] == (1, 4)
    surgery.verify(tmp_path / "out")
    surgery.verify(tmp_path / "out" / "onnx" / "model.onnx")


@pytest.mark.parametrize(
    ("suffix", "options"),
    [("", {}), ("_fp16", {"target": "portable", "dtype": "fp16"}), ("_q4", {"weights_type": "int4"})],
)
def test_transformers_js_finds_both_graphs_of_a_pair(tmp_path: Path, suffix: str, options: dict[str, Any]) -> None:
    base = recipes.build("t5", tmp_path / "base")
    surgery.export_onnx(base, output=tmp_path / "own", **options)
    result = surgery.export_onnx(base, output=tmp_path / "out", layout="transformers.js", **options)
    graphs = {name for name in files(tmp_path / "out") if "onnx" in name}
    assert graphs == {f"onnx/encoder_model{suffix}.onnx", f"onnx/decoder_model_merged{suffix}.onnx"}
    assert result.weights == "embed"
    assert result.contract.encoder == f"encoder_model{suffix}.onnx"
    wanted = surgery.run(tmp_path / "own", [IDS], max_new=4).texts[0].tokens
    assert surgery.run(tmp_path / "out", [IDS], max_new=4).texts[0].tokens == wanted
    surgery.verify(tmp_path / "out", against=base)
    with pytest.raises(FitError, match="needs a folder of its own"):
        surgery.export_onnx(base, output=base, layout="transformers.js", **options)


def test_what_a_program_would_pass_over_is_refused(tmp_path: Path) -> None:
    def refused(match: str, **options: object) -> None:
        with pytest.raises(FitError, match=match):
            surgery.export_onnx(BASE, output=tmp_path / "out", **options)  # type: ignore[arg-type]
        assert not (tmp_path / "out").exists()

    for layout in ("transformers.js", "optimum"):
        refused("gives no factors to slots", swap=[LORA], layout=layout)
        refused("a past of its own", prefix=[PROMPT], layout=layout)
    refused("runs no graph that generates", layout="sentence-transformers")
    refused("'gguf' is not a layout", layout="gguf")
    shutil.copytree(BASE, tmp_path / "base")
    with pytest.raises(FitError, match="needs a folder of its own"):
        surgery.export_onnx(tmp_path / "base", output=tmp_path / "base", layout="triton")
    assert set(LAYOUTS) == {*FILES, "sentence-transformers"}


def test_a_folder_without_a_graph_is_told(tmp_path: Path) -> None:
    (tmp_path / "onnx").mkdir()
    with pytest.raises(NotFoundError, match=r"no model\.onnx in this folder"):
        surgery.run(tmp_path, [IDS])


def test_left_padded_programs_are_warned_of(tmp_path: Path) -> None:
    for target, warned in (("cpu", True), ("portable", False)):
        result = surgery.export_onnx(BASE, output=tmp_path / target, layout="optimum", target=target)
        assert any("pads the rows of a batch on the left" in text for text in result.warnings) == warned
    assert np.isfinite(result.nbytes)
