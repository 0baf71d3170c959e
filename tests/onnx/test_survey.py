# SPDX-License-Identifier: Apache-2.0
"""Inspecting graphs of real exporters: operators, inputs, slots, modules of renamed weights, files, and what runs them."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from click.testing import CliRunner
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.capi._pybind_state import get_all_operator_schema

import surgery
from surgery.onnx.survey.modules import module_names
from surgery.onnx.survey.runtime import KERNELS, NOT_ON_CPU
from surgery.reports.graph_report import GraphReport
from surgery_cli.group import surgery as command
from surgery_formats.errors import FitError, MalformedError
from tests.support.kit import ROOT

GRAPHS = ROOT / "tests" / "golden" / "onnx_graphs"
NAMES = sorted(path.parent.name for path in GRAPHS.glob("*/model.onnx"))


UNPLACED = {"fused-bert": 4, "fused-bert-fp16": 4, "dynamo-unet": 2}


def cli(*words: object) -> Any:
    return CliRunner().invoke(command, [str(word) for word in words])


def inspected(path: Path | str) -> GraphReport:
    report = surgery.inspect(path)
    assert isinstance(report, GraphReport)
    return report


@pytest.mark.parametrize("name", NAMES)
def test_a_graph_of_every_exporter_is_told(name: str) -> None:
    report = inspected(GRAPHS / name / "model.onnx")
    model = onnx.load(GRAPHS / name / "model.onnx", load_external_data=False)
    assert report.producer.startswith(model.producer_name)
    assert report.nodes >= len(model.graph.node)
    assert sum(one.count for one in report.operators) == report.nodes
    assert [port.name for port in report.inputs] == list(dict.fromkeys(port.name for port in model.graph.input))
    assert [port.name for port in report.outputs] == [port.name for port in model.graph.output]
    assert report.files[0].name == "model.onnx"
    assert report.nbytes == sum(
        path.stat().st_size for path in (GRAPHS / name).iterdir() if path.name.startswith("model.onnx")
    )
    # All weights are placed by their names or the nodes that read them, but for what is shared or was fused without a name.
    assert report.unplaced == UNPLACED.get(name, 2 if name.startswith(("genai", "olive")) else 0)
    assert not report.warnings
    json.dumps(report.as_json(), allow_nan=False)
    assert report.summary(verbose=True).as_text(100)


@pytest.mark.parametrize("name", [name for name in NAMES if name.endswith("llama") and "q4" not in name])
def test_renamed_weights_of_every_exporter_are_of_the_same_modules(name: str) -> None:
    report = inspected(GRAPHS / name)
    attention, mlp = report.roles["attention"], report.roles["mlp"]
    packed = "genai" in name or "mobius" in name  # q, k and v lie in one tensor
    assert (attention.tensors, mlp.tensors) == (4 if packed else 8, 6)
    assert (attention.parameters, mlp.parameters) == (6144, 12288)
    assert report.roles["head"].parameters == report.roles["embedding"].parameters == 80 * 32


def test_slots_and_an_adapter_that_is_part_of_the_graph_are_told_apart() -> None:
    baked, slots = inspected(GRAPHS / "genai-llama-slots"), inspected(GRAPHS / "olive-llama-slots")
    assert (baked.factors, len(baked.slots)) == (28, 0)
    assert (slots.factors, len(slots.slots)) == (0, 28)
    assert "28 factors of LoRAs are weights of the graph" in str(baked)
    assert "slots" in str(slots)


def test_an_export_of_ours_tells_its_contract_slots_and_files(tmp_path: Path) -> None:
    examples = ROOT / "examples"
    surgery.export_onnx(examples / "base", swap=[examples / "lora"], output=tmp_path / "out")
    report = inspected(tmp_path / "out" / "model.onnx")
    assert report.contract["padding"] == "right"
    assert [(file.name, file.container) for file in report.files] == [
        ("model.onnx", "onnx"),
        ("model.safetensors", "external"),
    ]
    assert report.parameters == surgery.inspect(examples / "base").parameters + 16  # frequencies of positions
    assert len(report.slots) == 84
    assert all(port.default is not None and 0 in port.default for port in report.slots)
    assert report.roles["norm"].tensors == 13
    run = cli("inspect", tmp_path / "out" / "model.onnx", "--depth", "2")
    assert run.exit_code == 0
    assert "84 optional inputs" in run.stdout
    folder = surgery.inspect(tmp_path / "out")
    assert set(folder.graphs) == {"model.onnx", "prefill.onnx"}
    assert not folder.left_behind


def one_node(node: Any, *initializers: Any, **fields: Any) -> onnx.ModelProto:
    ports = {name: helper.make_tensor_value_info(name, 1, ["n", 4]) for name in "xy"}
    graph = helper.make_graph([node], "g", [ports["x"]], [ports["y"]], list(initializers))
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], **fields)


def saved(folder: Path, model: onnx.ModelProto) -> Path:
    path = folder / "model.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def test_lines_of_source_of_the_exporting_machine_are_named(tmp_path: Path) -> None:
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    trace = 'File "/opt/ann/secret/modeling.py", line 12, in forward\n    return self.proj(x)'
    node.metadata_props.add(key="pkg.torch.onnx.stack_trace", value=trace)
    path = saved(tmp_path, one_node(node, numpy_helper.from_array(np.ones((4, 4), np.float32), "w")))
    (warning,) = inspected(path).warnings
    assert warning.startswith("1 nodes tell lines of source")
    assert "'/opt/ann/secret/modeling.py'" in warning
    assert inspected(path).metadata == {"pkg.torch.onnx.stack_trace": 1}


@pytest.mark.parametrize(
    ("node", "what"),
    [
        (helper.make_node("Mine", ["x"], ["y"], domain="my.ops"), "my.ops: Mine; a domain that no runtime is known to have"),
        (helper.make_node("Tokenise", ["x"], ["y"], domain="ai.onnx.contrib"), "needs the library onnxruntime-extensions"),
        (helper.make_node("Gelu", ["x"], ["y"], domain="com.microsoft"), "operators of onnxruntime alone"),
        (helper.make_node("Nothing", ["x"], ["y"]), "not operators of ONNX in opset 21: Nothing"),
        (helper.make_node("SimplifiedLayerNormalization", ["x", "x"], ["y"]), "onnxruntime alone has these"),
        (helper.make_node("GroupQueryAttention", ["x"], ["y"], domain="com.microsoft"), "no kernel on CUDA for F32"),
    ],
)  # fmt: skip
def test_what_stands_against_running_it_is_told(node: Any, what: str, tmp_path: Path) -> None:
    assert any(what in sentence for sentence in inspected(saved(tmp_path, one_node(node))).runs)


def test_functions_of_the_file_need_no_library(tmp_path: Path) -> None:
    function = helper.make_function(
        "mine", "F", ["a"], ["b"], [helper.make_node("Abs", ["a"], ["b"])], [helper.make_opsetid("", 21)]
    )
    model = one_node(helper.make_node("F", ["x"], ["y"], domain="mine"), functions=[function])
    report = inspected(saved(tmp_path, model))
    assert report.runs == ()
    assert {(one.name, one.function) for one in report.operators} == {("F", True), ("Abs", False)}


SCHEMAS = get_all_operator_schema()
SIMPLE = {"tensor(int32)": 6, "tensor(int64)": 7, "tensor(bool)": 9, "tensor(uint8)": 2, "tensor(float)": 1}
VALUES: dict[str, Any] = {"INT": 1, "FLOAT": 1.0, "STRING": "a", "INTS": [1, 1], "FLOATS": [1.0], "STRINGS": ["a"]}


def wanted(element: str) -> str:
    return {"F32": "tensor(float)", "F16": "tensor(float16)"}[element]


ELEMENTS = {"F32": TensorProto.FLOAT, "F16": TensorProto.FLOAT16, "BF16": TensorProto.BFLOAT16}
NODES: dict[tuple[str, str], tuple[list[list[int]], dict[str, Any]]] = {
    ("", "MatMul"): ([[2, 4], [4, 4]], {}),
    ("", "Gemm"): ([[2, 4], [4, 4]], {}),
    ("com.microsoft", "FusedMatMul"): ([[2, 4], [4, 4]], {}),
    ("com.microsoft", "MultiHeadAttention"): ([[1, 2, 16], [1, 2, 16], [1, 2, 16]], {"num_heads": 2}),
    ("com.microsoft", "SkipSimplifiedLayerNormalization"): ([[1, 2, 4], [1, 2, 4], [4]], {}),
    ("", "Attention"): ([[1, 2, 2, 8], [1, 2, 2, 8], [1, 2, 2, 8]], {}),
}


@pytest.mark.parametrize("element", ["F32", "BF16"])  # around F16 onnxruntime puts conversions
@pytest.mark.parametrize("key", NODES, ids=lambda key: key[1])
def test_kernels_on_the_cpu_are_those_of_the_installed_onnxruntime(key: tuple[str, str], element: str) -> None:
    shapes, attributes = NODES[key]
    names = [f"x{number}" for number in range(len(shapes))]
    inputs = [
        helper.make_tensor_value_info(name, ELEMENTS[element], shape) for name, shape in zip(names, shapes, strict=True)
    ]
    out = helper.make_tensor_value_info("y", ELEMENTS[element], None)
    graph = helper.make_graph([helper.make_node(key[1], names, ["y"], domain=key[0], **attributes)], "g", inputs, [out])
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    lacking = pytest.raises(Exception, match=r"NOT_IMPLEMENTED|INVALID_GRAPH|Could not find an implementation")
    with nullcontext() if element in KERNELS[key].cpu else lacking:
        onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def test_weights_are_placed_by_the_nodes_that_read_them() -> None:
    nodes = [
        helper.make_node("Transpose", ["onnx::1"], ["t"]),
        helper.make_node("MatMul", ["x", "t"], ["y"], name="/enc/layer.0/q/MatMul"),
        helper.make_node("Add", ["y", "val_3"], ["z"], name="node_add"),
        helper.make_node(
            "MatMulNBits", ["z", "a", "b"], ["o"], name="/enc/layer.0/k/MatMul_Q4", domain="com.microsoft"
        ),
    ]
    nodes[2].metadata_props.add(
        key="pkg.torch.onnx.name_scopes", value="['', 'enc', 'enc.layer.0', 'enc.layer.0.q', 'add']"
    )
    graph = helper.make_graph(nodes, "g", [], [])
    found = module_names(graph, ["onnx::1", "val_3", "a", "b", "enc.norm.weight", "alone"])
    assert {name: place.name for name, place in found.items()} == {
        "onnx::1": "enc.layer.0.q.weight", "val_3": "enc.layer.0.q.bias", "a": "enc.layer.0.k.weight",
        "b": "enc.layer.0.k.scales", "enc.norm.weight": "enc.norm.weight", "alone": "alone",
    }  # fmt: skip
    assert [name for name, place in found.items() if place.unplaced] == ["alone"]


@pytest.mark.parametrize("text", ["[", "[1]", "{}", "'a'", "[" * 5000, "__import__('os')", "['" + "a" * 5000 + "']"])
def test_a_hostile_list_of_scopes_places_nothing(text: str) -> None:
    node = helper.make_node("MatMul", ["x", "w"], ["y"], name="n")
    node.metadata_props.add(key="pkg.torch.onnx.name_scopes", value=text)
    assert module_names(helper.make_graph([node], "g", [], []), ["w"])["w"].unplaced


def test_a_damaged_graph_is_an_error_of_one_line(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes((GRAPHS / "dynamo-llama" / "model.onnx").read_bytes()[:5000])
    with pytest.raises(MalformedError, match="not an ONNX model"):
        surgery.inspect(path)
    run = cli("inspect", path)
    assert run.exit_code == 3
    assert len(run.stderr.strip().splitlines()) == 1


def test_a_graph_without_its_weights_says_which_file_is_missing(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes((GRAPHS / "dynamo-llama" / "model.onnx").read_bytes())
    run = cli("inspect", tmp_path)
    assert run.exit_code == 3
    assert "'model.onnx.data': No such file" in run.stderr


@pytest.mark.parametrize("operator", sorted(NOT_ON_CPU))
@pytest.mark.parametrize("element", ["F32", "F16"])
def test_operators_of_the_gpu_have_no_kernel_on_the_cpu_of_the_installed_onnxruntime(
    operator: str, element: str
) -> None:
    schema = next(one for one in SCHEMAS if one.domain == "com.microsoft" and one.name == operator)
    allowed = {one.type_param_str: list(one.allowed_type_strs) for one in schema.type_constraints}

    def ports(what: str, formals: Any, count: int) -> list[Any]:
        types = [allowed.get(formals[min(number, len(formals) - 1)].typeStr, [""]) for number in range(count)]
        elements = [ELEMENTS[element] if wanted(element) in own else SIMPLE[own[0]] for own in types]
        return [helper.make_tensor_value_info(f"{what}{number}", one, None) for number, one in enumerate(elements)]

    inputs, outputs = ports("i", schema.inputs, schema.min_input), ports("o", schema.outputs, max(schema.min_output, 1))
    node = helper.make_node(operator, [p.name for p in inputs], [p.name for p in outputs], domain="com.microsoft")
    for name, one in schema.attributes.items():
        if one.required:
            node.attribute.append(helper.make_attribute(name, VALUES[str(one.type).rpartition(".")[2]]))
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(helper.make_graph([node], "g", inputs, outputs), opset_imports=opsets, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    with pytest.raises(Exception, match=r"Could not find an implementation|Failed to find kernel"):
        onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def test_what_a_gpu_alone_runs_is_told(tmp_path: Path) -> None:
    path = saved(tmp_path, one_node(helper.make_node("SkipGroupNorm", ["x"], ["y"], domain="com.microsoft")))
    assert "onnxruntime has no kernel on the CPU for SkipGroupNorm" in inspected(path).runs
    path = saved(tmp_path, one_node(helper.make_node("EPContext", ["x"], ["y"], domain="com.microsoft")))
    assert any("that provider alone runs it" in sentence for sentence in inspected(path).runs)


def test_a_graph_is_no_base_of_a_report() -> None:
    with pytest.raises(FitError, match="an ONNX graph where"):
        surgery.report(GRAPHS / "bases" / "llama" / "lora", base=GRAPHS / "dynamo-llama")
    with pytest.raises(FitError, match="an ONNX graph where"):
        surgery.report([GRAPHS / "dynamo-llama", GRAPHS / "bases" / "llama" / "lora"])
    assert surgery.report(GRAPHS / "dynamo-llama").base.parameters
