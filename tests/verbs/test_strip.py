# SPDX-License-Identifier: Apache-2.0
"""Strip: a graph without what it tells of the machine it was exported on; nodes, weights and results stay."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from click.testing import CliRunner

import surgery
from surgery.onnx.edit.strip import STACK_TRACE
from surgery_cli.group import surgery as command
from surgery_formats.errors import FitError, NothingChangedError
from tests.support.kit import ROOT

GRAPHS = ROOT / "tests" / "golden" / "onnx_graphs"
TRACE = 'File "/opt/ann/secret/modeling.py", line 12, in forward\n    return self.proj(x)'


@pytest.fixture
def traced(tmp_path: Path) -> Path:
    """What torch's exporter writes, with its traces, which the golden graph no longer has."""
    shutil.copytree(GRAPHS / "dynamo-bert", tmp_path / "traced")
    path = tmp_path / "traced" / "model.onnx"
    model = onnx.load(path, load_external_data=False)
    for node in model.graph.node:
        node.metadata_props.add(key=STACK_TRACE, value=TRACE)
    model.graph.node[0].doc_string = "/opt/ann/secret/old.py(7): forward"
    model.graph.node[1].doc_string = "adds the mask"
    model.metadata_props.add(key="mine", value="kept")
    onnx.save(model, path)
    return path


def outputs(path: Path) -> Any:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    ids = np.array([[1, 2, 3]])
    return session.run(None, {"input_ids": ids, "attention_mask": np.ones_like(ids)})[0]


def test_traces_go_and_all_else_stays(traced: Path, tmp_path: Path) -> None:
    nodes = len(onnx.load(traced, load_external_data=False).graph.node)
    result = surgery.strip(traced, output=tmp_path / "out")
    assert result.removed == {STACK_TRACE: (nodes, nodes * len(TRACE)), "doc_string": (1, 34)}
    written = tmp_path / "out" / "model.onnx"
    assert b"/opt/ann" not in written.read_bytes()
    assert result.after == written.stat().st_size < result.before
    model = onnx.load(written, load_external_data=False)
    assert model.metadata_props[0].value == "kept"
    assert model.graph.node[1].doc_string == "adds the mask"
    assert any(entry.key.endswith("name_scopes") for entry in model.graph.node[0].metadata_props)
    assert surgery.diff(traced, written).equal
    assert np.array_equal(outputs(traced), outputs(written))
    assert not surgery.inspect(written).warnings
    json.dumps(result.as_json())
    assert result.nbytes == sum(path.stat().st_size for path in written.parent.iterdir() if "model.onnx" in path.name)


def test_an_output_may_lie_beside_the_graph_and_on_no_file_of_it(traced: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(traced.parent)
    surgery.strip(Path("model.onnx"), output="clean")
    assert surgery.diff(traced, "clean/model.onnx").equal
    with pytest.raises(FitError, match="holds the input"):
        surgery.strip(Path("model.onnx"), output=".", overwrite=True)


def test_all_metadata_goes_where_asked_but_for_the_models_own(traced: Path, tmp_path: Path) -> None:
    surgery.strip(traced, output=tmp_path / "out", all_metadata=True)
    model = onnx.load(tmp_path / "out" / "model.onnx", load_external_data=False)
    assert not any(node.metadata_props or node.doc_string for node in model.graph.node)
    assert [entry.key for entry in model.metadata_props] == ["mine"]
    assert np.array_equal(outputs(traced), outputs(tmp_path / "out" / "model.onnx"))


def test_a_graph_without_traces_is_said_to_have_none(tmp_path: Path) -> None:
    with pytest.raises(NothingChangedError, match="no lines of source"):
        surgery.strip(GRAPHS / "genai-llama", output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command_says_what_it_takes_out(traced: Path, tmp_path: Path) -> None:
    inspected = CliRunner().invoke(command, ["inspect", str(traced)])
    assert "'surgery strip' takes them out" in inspected.stderr
    dry = CliRunner().invoke(command, ["strip", str(traced), "--dry-run"])
    assert (dry.exit_code, list(tmp_path.iterdir())) == (0, [traced.parent])
    assert STACK_TRACE in dry.stdout
    done = CliRunner().invoke(command, ["strip", str(traced), "-o", str(tmp_path / "out")])
    assert done.exit_code == 0
