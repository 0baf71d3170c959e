# SPDX-License-Identifier: Apache-2.0
"""The weights of a graph as safetensors: under its own names, and, told by their values, as its base's checkpoint again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnx import helper, numpy_helper
from safetensors.numpy import load_file

import surgery
from surgery.onnx.recover.result import RecoveryResult
from surgery_cli.group import surgery as command
from surgery_formats.dtypes import DType
from surgery_formats.errors import FitError, OutputExistsError, UsageError
from surgery_formats.models.checkpoint import open_checkpoint
from surgery_formats.storage.base import read_values
from tests.support.kit import ROOT
from tests.support.quantised_folders import quantise_folder

GRAPHS = ROOT / "tests" / "golden" / "onnx_graphs"


def base_of(name: str) -> Path:
    return GRAPHS / "bases" / json.loads((GRAPHS / name / "pair.json").read_text())["base"] / "base"


def converted(graph: Path, output: Path | None, **options: Any) -> RecoveryResult:
    result = surgery.convert(graph, "safetensors", output=output, dry_run=output is None, **options)
    assert isinstance(result, RecoveryResult)
    json.dumps(result.as_json(), allow_nan=False)
    assert str(result)
    return result


@pytest.mark.parametrize(
    "name",
    ["script-llama", "dynamo-llama", "optimum-llama", "genai-llama", "mobius-llama", "dynamo-unet", "optimum-vit", "script-bert",
     "dynamo-gpt2", "optimum-gpt2"],
)  # fmt: skip
def test_a_checkpoint_comes_back_bit_for_bit(name: str, tmp_path: Path) -> None:
    base = base_of(name)
    result = converted(GRAPHS / name / "model.onnx", tmp_path / "out", base=base)
    assert result.names == "base"
    diff = surgery.diff(tmp_path / "out", base)
    assert diff.equal
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == json.loads((base / "config.json").read_text())
    assert {file.name for file in (tmp_path / "out").iterdir()} >= {"model.safetensors", "surgery_manifest.json"}


def test_names_and_layouts_of_the_graph_are_kept_without_a_base(tmp_path: Path) -> None:
    converted(GRAPHS / "genai-llama", tmp_path / "out")
    written = load_file(tmp_path / "out" / "model.safetensors")
    model = onnx.load(GRAPHS / "genai-llama" / "model.onnx")
    initializers = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    assert written.keys() == initializers.keys()
    assert all(np.array_equal(written[name], initializers[name]) for name in written)


def test_codes_are_kept_as_bytes_and_refused_as_weights_of_a_base(tmp_path: Path) -> None:
    graph = GRAPHS / "q4-llama" / "model.onnx"
    with pytest.raises(FitError, match=r"15 weights of the base are not in the graph as they are \(.*MatMulNBits int4"):
        converted(graph, tmp_path / "out", base=base_of("q4-llama"))
    assert not (tmp_path / "out").exists()
    converted(graph, tmp_path / "codes")
    codes = load_file(tmp_path / "codes" / "model.safetensors")
    assert {codes[name].dtype for name in codes if name.endswith("_Q4")} == {np.dtype(np.uint8)}
    some = converted(graph, tmp_path / "some", base=base_of("q4-llama"), allow_loss=True)
    assert any("15 weights of the base are left out" in warning for warning in some.warnings)


@pytest.mark.parametrize("format_name", ["int8", "fp8 tensor"])
def test_numbers_of_a_quantised_base_are_not_said_to_be_codes(format_name: str, tmp_path: Path) -> None:
    """The graph is of what the base's codes stand for."""
    plain = base_of("script-llama")
    base = quantise_folder(plain, tmp_path / "base", format_name)
    before = load_file(plain / "model.safetensors")
    values = {
        name: read_values(parameter.storage, 0, parameter.sizes[0], DType.F32).reshape(before[name].shape)
        for name, parameter in open_checkpoint(base).main.parameters.items()
    }
    model = onnx.load(GRAPHS / "script-llama" / "model.onnx")
    for tensor in model.graph.initializer:
        own = numpy_helper.to_array(tensor)
        for name, old in before.items():
            for one, other in ((old, values[name]), (old.T, values[name].T)):
                if own.shape == one.shape and np.array_equal(own, one):
                    tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(other), tensor.name))
    (tmp_path / "g").mkdir()
    onnx.save(model, tmp_path / "g" / "model.onnx")
    converted(tmp_path / "g" / "model.onnx", tmp_path / "out", base=base)
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written.keys() == before.keys()
    assert all(np.array_equal(written[name], values[name]) for name in written)
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == json.loads((plain / "config.json").read_text())


def test_types_that_safetensors_lacks_are_told(tmp_path: Path) -> None:
    tensor = onnx.TensorProto(name="w", data_type=onnx.TensorProto.INT4, dims=[3, 3], raw_data=bytes(5))
    graph = helper.make_graph([helper.make_node("Neg", ["x"], ["y"])], "g", [], [], [tensor])
    onnx.save(helper.make_model(graph), tmp_path / "model.onnx")
    told = converted(tmp_path / "model.onnx", tmp_path / "out").warnings
    assert told == ("1 tensors are the bytes of types that safetensors lacks (INT4): w",)
    assert load_file(tmp_path / "out" / "model.safetensors")["w"].shape == (5,)


def test_types_are_changed_where_asked(tmp_path: Path) -> None:
    converted(GRAPHS / "optimum-llama", tmp_path / "out", base=base_of("optimum-llama"), dtype="fp16")
    written = load_file(tmp_path / "out" / "model.safetensors")
    base = load_file(base_of("optimum-llama") / "model.safetensors")
    assert all(np.array_equal(written[name], base[name].astype(np.float16)) for name in base)


def test_every_tensor_is_accounted_for(tmp_path: Path) -> None:
    result = converted(GRAPHS / "genai-llama", tmp_path / "out", base=base_of("genai-llama"))
    plan = result.ledger.plan
    dropped = {account.tensor.name for account in plan.accounts if account.outcome == "dropped"}
    assert {"cos_cache", "sin_cache"} <= dropped
    assert " 2 tensors that the exporter computed or added, such as tables of positions:" in str(result)
    manifest = json.loads((tmp_path / "out" / "surgery_manifest.json").read_text())
    assert manifest["ledger"]
    assert "/tmp" not in json.dumps(manifest)


def test_what_is_dropped_is_told_by_kinds(tmp_path: Path) -> None:
    surgery.export_onnx(ROOT / "examples" / "base", output=tmp_path / "graph")
    graph = tmp_path / "graph" / "model.onnx"
    said = str(surgery.convert(graph, to="safetensors", base=ROOT / "examples" / "base", dry_run=True))
    told = "11 shapes, indices and scalars of the graph's nodes; 1 tensor that the exporter computed or added"
    assert told in said
    assert "57 moved (of another name or layout in the graph)" in said


def test_a_dry_run_writes_nothing_and_an_output_is_not_overwritten(tmp_path: Path) -> None:
    assert converted(GRAPHS / "optimum-llama", None).output is None
    converted(GRAPHS / "genai-llama", tmp_path / "out")
    with pytest.raises(OutputExistsError):
        converted(GRAPHS / "optimum-llama", tmp_path / "out")
    converted(GRAPHS / "optimum-llama", tmp_path / "out", overwrite=True)


def test_two_runs_write_the_same_bytes(tmp_path: Path) -> None:
    for name in "ab":
        converted(GRAPHS / "genai-llama", tmp_path / name, base=base_of("genai-llama"))
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()


def test_another_base_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FitError, match="weights of the base are not in the graph"):
        converted(GRAPHS / "optimum-llama", tmp_path / "out", base=base_of("genai-qwen2"))


def test_options_of_adapters_and_folders_of_weights_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="projections is for adapters"):
        surgery.convert(GRAPHS / "optimum-llama", "safetensors", projections="split", output=tmp_path / "out")
    with pytest.raises(FitError, match="a checkpoint's already"):
        surgery.convert(ROOT / "examples" / "base", "safetensors", output=tmp_path / "out")


def test_the_command_says_what_was_written(tmp_path: Path) -> None:
    words = ["convert", GRAPHS / "optimum-llama", "--to", "safetensors", "-o", tmp_path / "out"]
    run = CliRunner().invoke(command, [str(word) for word in words])
    assert run.exit_code == 0
    assert "names and layouts" not in run.stderr
    assert "layouts of the graph" in run.stdout


def test_a_convolution_that_lies_as_it_is_keeps_its_axes(tmp_path: Path) -> None:
    values = np.random.default_rng(0).standard_normal((4, 3, 2, 2)).astype(np.float32)
    graph = helper.make_graph(
        [helper.make_node("Identity", ["w"], ["y"])], "g", [], [], [numpy_helper.from_array(values, "w")]
    )
    onnx.save(helper.make_model(graph), tmp_path / "model.onnx")
    converted(tmp_path / "model.onnx", tmp_path / "out")
    assert np.array_equal(load_file(tmp_path / "out" / "model.safetensors")["w"], values)


def test_an_adapter_is_no_graph_and_a_graph_no_adapter() -> None:
    with pytest.raises(FitError, match="an adapter, and safetensors are made of an ONNX graph"):
        surgery.convert("examples/lora", "safetensors", dry_run=True)
    with pytest.raises(surgery.InputError, match="an ONNX graph where an adapter was expected"):
        surgery.convert(ROOT / "tests" / "golden" / "onnx_graphs" / "script-llama" / "model.onnx", "peft", dry_run=True)
