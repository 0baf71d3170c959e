# SPDX-License-Identifier: Apache-2.0
"""Diff of graphs: tensors by name and by value, nodes by module, inputs; a graph and the checkpoint it was made from."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import load_file, save_file

import surgery
from surgery.comparison.graph_diff import GraphDiff, NodeChange
from surgery_cli.group import surgery as command
from surgery_formats.errors import FitError
from tests.support.kit import ROOT

GRAPHS = ROOT / "tests" / "golden" / "onnx_graphs"
BASE = GRAPHS / "bases" / "llama" / "base"


def cli(*words: object) -> Any:
    return CliRunner().invoke(command, [str(word) for word in words])


def compared(a: Path, b: Path, **options: Any) -> GraphDiff:
    diff = surgery.diff(a, b, **options)
    assert isinstance(diff, GraphDiff)
    json.dumps(diff.as_json(), allow_nan=False)
    assert str(diff)
    return diff


def copied(name: str, folder: Path) -> Path:
    shutil.copytree(GRAPHS / name, folder)
    return folder / "model.onnx"


@pytest.mark.parametrize("name", ["genai-llama", "optimum-bert", "dynamo-vit", "q4-llama"])
def test_a_graph_equals_itself(name: str, tmp_path: Path) -> None:
    diff = compared(GRAPHS / name, copied(name, tmp_path / "copy"))
    assert diff.equal
    assert diff.difference == 0.0
    assert not diff.nodes
    assert not diff.ports


def test_names_do_not_matter_where_values_tell(tmp_path: Path) -> None:
    path = copied("optimum-llama", tmp_path / "copy")
    model = onnx.load(path)
    number = 0
    for tensor in model.graph.initializer:
        if tensor.name.startswith("onnx::MatMul"):
            number += 1
            for node in model.graph.node:
                node.input[:] = [f"w.{number}" if name == tensor.name else name for name in node.input]
            tensor.name = f"w.{number}"
    onnx.save(model, path)
    diff = compared(GRAPHS / "optimum-llama", path)
    assert (diff.renamed, {entry.status for entry in diff.tensors}) == (number, {"equal"})
    assert {(node.change, node.operator) for node in diff.nodes} == {("changed", "MatMul")}  # they read other names


def test_a_changed_weight_and_a_changed_attribute_are_found(tmp_path: Path) -> None:
    path = copied("optimum-llama", tmp_path / "copy")
    model = onnx.load(path)
    weight = next(tensor for tensor in model.graph.initializer if tensor.name == "onnx::MatMul_733")
    values = numpy_helper.to_array(weight) * np.float32(1.5)
    weight.CopyFrom(numpy_helper.from_array(values, weight.name))
    softmax = next(node for node in model.graph.node if node.op_type == "Softmax")
    softmax.attribute[0].i = 1
    onnx.save(model, path)
    diff = compared(GRAPHS / "optimum-llama", path)
    (changed,) = (entry for entry in diff.tensors if entry.status != "equal")
    assert (changed.name, changed.status) == ("onnx::MatMul_733", "values")
    assert changed.values is not None
    assert changed.values.relative == pytest.approx(0.5)
    assert diff.nodes == (NodeChange("changed", "model.layers.0.self_attn", "Softmax", 1),)
    assert not diff.same_structure
    header = compared(GRAPHS / "optimum-llama", path, header=True)
    assert all(entry.status == "equal" for entry in header.tensors)
    assert header.difference is None


def test_what_an_adapter_adds_to_a_graph_is_told_by_module() -> None:
    diff = compared(GRAPHS / "genai-llama", GRAPHS / "genai-llama-slots")
    added = {(node.module, node.operator) for node in diff.nodes if node.change == "only in B"}
    assert ("model.layers.0.attn.q_proj.lora_A", "MatMul") in added
    assert sum(entry.status == "only in B" for entry in diff.tensors) == 28 + 6  # factors, and q, k and v apart
    assert sum(entry.status == "only in A" for entry in diff.tensors) == 2
    assert not diff.ports
    text = str(diff)
    assert "model.layers.0-1.attn.q_proj.lora_A" in text  # both layers in one row


def test_weights_of_two_exporters_are_found_by_value() -> None:
    diff = compared(GRAPHS / "script-llama", GRAPHS / "optimum-llama")
    weights = [entry for entry in diff.tensors if entry.a and len(entry.a.shape) == 2]
    assert len(weights) == 16
    assert all(entry.status == "equal" for entry in weights)


@pytest.mark.parametrize("name", ["script-llama", "optimum-llama", "dynamo-llama"])
def test_a_graph_has_the_weights_of_its_checkpoint_whatever_they_are_called(name: str) -> None:
    base = load_file(BASE / "model.safetensors")
    diff = compared(GRAPHS / name, BASE)
    assert sum(entry.status == "equal" for entry in diff.tensors) == len(base)
    assert not any(entry.status == "only in B" for entry in diff.tensors)
    assert sum("transposed" in entry.note for entry in diff.tensors) >= 14
    assert compared(BASE, GRAPHS / name).renamed == diff.renamed


def test_weights_that_were_trained_on_are_paired_by_the_nodes_that_read_them(tmp_path: Path) -> None:
    tuned = {name: values * np.float32(1.1) for name, values in load_file(BASE / "model.safetensors").items()}
    save_file(tuned, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((BASE / "config.json").read_text())
    diff = compared(GRAPHS / "optimum-llama", tmp_path)
    trained = [entry for entry in diff.tensors if entry.status == "values"]
    assert len(trained) == len(tuned)
    assert diff.difference == pytest.approx(0.1, rel=1e-3)


def test_packed_weights_are_left_to_locate() -> None:
    diff = compared(GRAPHS / "genai-llama", BASE)
    assert any("'surgery locate' finds those" in note for note in diff.warnings)


def test_inputs_and_outputs_that_differ_are_listed(tmp_path: Path) -> None:
    path = copied("dynamo-bert", tmp_path / "copy")
    model = onnx.load(path, load_external_data=False)
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 7
    model.graph.output[0].name = "other"
    onnx.save(model, path)
    diff = compared(GRAPHS / "dynamo-bert", path)
    assert [(one.port, one.name) for one in diff.ports] == [
        ("input", "input_ids"),
        ("output", "out"),
        ("output", "other"),
    ]
    assert diff.ports[0].b.endswith(", 7]")


def test_values_written_one_by_one_are_compared(tmp_path: Path) -> None:
    paths = []
    for number in (1, 1, 2):
        typed = helper.make_tensor("h", TensorProto.FLOAT16, (600,), [number] * 600)
        x = helper.make_tensor_value_info("x", 10, [600])
        graph = helper.make_graph([helper.make_node("Add", ["x", "h"], ["x2"])], "g", [x], [], [typed])
        paths.append(tmp_path / f"{len(paths)}.onnx")
        onnx.save(helper.make_model(graph), paths[-1])
    assert compared(paths[0], paths[1]).equal
    assert [entry.status for entry in compared(paths[0], paths[2]).tensors] == ["values"]


def test_exit_codes_tell_findings(tmp_path: Path) -> None:
    path = copied("genai-llama", tmp_path / "copy")
    assert cli("diff", GRAPHS / "genai-llama", path, "--fail-on", "any").exit_code == 0
    assert cli("diff", path, GRAPHS / "genai-llama-slots", "--fail-on", "structure").exit_code == 6


def test_a_graph_is_no_adapter_and_has_no_base() -> None:
    with pytest.raises(FitError, match="one is an adapter, the other a full model"):
        surgery.diff(GRAPHS / "genai-llama", ROOT / "examples" / "lora")
    with pytest.raises(FitError, match="a base brings names of adapters together"):
        surgery.diff(GRAPHS / "genai-llama", GRAPHS / "genai-llama", base=BASE)
