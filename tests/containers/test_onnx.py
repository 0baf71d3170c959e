# SPDX-License-Identifier: Apache-2.0
"""ONNX graphs: every tensor is found where it lies, wherever in the graph it is."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from surgery_formats.containers.onnx import open_graph
from surgery_formats.containers.onnx.tensor_proto import KEPT
from surgery_formats.dtypes import DType
from tests.support.kit import ROOT
from tests.support.onnx_files import FLOAT, RNG, WEIGHT, body, elsewhere, model, opened, saved


def test_inline_weights_are_found_by_the_place_of_their_bytes(tmp_path: Path) -> None:
    path = saved(tmp_path, model(numpy_helper.from_array(WEIGHT, "w"), numpy_helper.from_array(WEIGHT[0], "b")))
    graph = open_graph(path)
    assert list(graph.tensors) == ["w", "b"]
    tensor = graph.tensors["w"]
    assert path.read_bytes()[tensor.offset : tensor.offset + tensor.nbytes] == WEIGHT.tobytes()
    assert np.array_equal(tensor.read(), WEIGHT)
    assert np.array_equal(tensor.read(3, 7), WEIGHT[3:7])
    assert (graph.files, graph.external, len(graph.small)) == ((graph.file,), (), 0)
    assert graph.holders == {"w": "initializer", "b": "initializer"}


def test_the_graph_has_small_values_and_no_large_ones(tmp_path: Path) -> None:
    made = model(numpy_helper.from_array(WEIGHT, "w"), numpy_helper.from_array(np.array([2, -1]), "shape"))
    proto = open_graph(saved(tmp_path, made)).proto
    assert proto.graph.initializer[0].name == "w"
    assert list(proto.graph.initializer[0].dims) == [40, 30]
    assert not proto.graph.initializer[0].HasField("raw_data")
    assert numpy_helper.to_array(proto.graph.initializer[1]).tolist() == [2, -1]
    proto.graph.initializer[0].raw_data = WEIGHT.tobytes()
    assert proto == made  # nothing else was left out


ELEMENTS = {
    FLOAT: np.float32, TensorProto.DOUBLE: np.float64, TensorProto.FLOAT16: np.float16, TensorProto.BFLOAT16: ml_dtypes.bfloat16,
    TensorProto.INT8: np.int8, TensorProto.UINT8: np.uint8, TensorProto.INT16: np.int16, TensorProto.UINT16: np.uint16,
    TensorProto.INT32: np.int32, TensorProto.UINT32: np.uint32, TensorProto.INT64: np.int64, TensorProto.UINT64: np.uint64,
    TensorProto.BOOL: np.bool_, TensorProto.COMPLEX64: np.complex64, TensorProto.FLOAT8E4M3FN: ml_dtypes.float8_e4m3fn,
    TensorProto.FLOAT8E5M2: ml_dtypes.float8_e5m2, TensorProto.FLOAT8E4M3FNUZ: ml_dtypes.float8_e4m3fnuz,
    TensorProto.FLOAT8E5M2FNUZ: ml_dtypes.float8_e5m2fnuz, TensorProto.FLOAT8E8M0: ml_dtypes.float8_e8m0fnu,
}  # fmt: skip


@pytest.mark.parametrize("elements", ELEMENTS, ids=TensorProto.DataType.Name)
def test_every_element_type_is_read_raw_and_typed(elements: int, tmp_path: Path) -> None:
    values = (np.arange(12) % 2 + 1).astype(ELEMENTS[elements]).reshape(3, 4)
    raw = TensorProto(name="raw", data_type=elements, dims=(3, 4), raw_data=values.tobytes())
    typed = helper.make_tensor("typed", elements, (3, 4), (np.arange(12) % 2 + 1).astype(np.float32).tolist())
    graph = opened(tmp_path, raw, typed)
    assert graph.tensors["raw"].dtype.numpy == values.dtype
    assert np.array_equal(graph.tensors["raw"].read(), values)
    other = graph.tensors["typed"].read() if "typed" in graph.tensors else graph.small["typed"]
    assert np.array_equal(other, values)
    assert other.dtype == values.dtype


def test_floats_that_are_packed_lie_in_the_file_as_they_are_in_memory(tmp_path: Path) -> None:
    graph = opened(tmp_path, helper.make_tensor("w", FLOAT, WEIGHT.shape, WEIGHT.reshape(-1).tolist()))
    assert np.array_equal(graph.tensors["w"].read(), WEIGHT)
    assert not graph.proto.graph.initializer[0].float_data


def test_large_typed_values_are_decoded_when_they_are_asked_for(tmp_path: Path) -> None:
    half = WEIGHT.astype(np.float16)
    typed = helper.make_tensor("h", TensorProto.FLOAT16, half.shape, half.reshape(-1).tolist())
    graph = opened(tmp_path, typed)
    assert list(graph.small) == ["h"]
    assert (graph.small.shape("h"), graph.small.label("h"), graph.shapes["h"]) == ((40, 30), "F16", (40, 30))
    assert np.array_equal(graph.small["h"], half)
    assert not graph.proto.graph.initializer[0].int32_data


@pytest.mark.parametrize(
    ("elements", "name", "shape", "stored"),
    [
        (TensorProto.UINT4, "UINT4", (6, 8), (6, 4)), (TensorProto.INT4, "INT4", (3, 5), (8,)), (TensorProto.INT2, "INT2", (6, 8), (6, 2)),
        (TensorProto.FLOAT4E2M1, "FLOAT4E2M1", (2, 2), (2, 1)), (TensorProto.COMPLEX128, "COMPLEX128", (2, 2), (2, 32)),
    ],
)  # fmt: skip
def test_types_that_safetensors_lacks_are_bytes_that_say_what_they_are(
    elements: int, name: str, shape: tuple[int, ...], stored: tuple[int, ...], tmp_path: Path
) -> None:
    data = bytes(range(1, 1 + int(np.prod(stored))))
    graph = opened(tmp_path, TensorProto(name="q", data_type=elements, dims=shape, raw_data=data))
    tensor = graph.tensors["q"]
    assert (tensor.dtype, tensor.shape, tensor.packed_as) == (DType.U8, stored, name)
    assert (tensor.read().tobytes(), graph.shapes["q"]) == (data, shape)


def test_external_data_is_found_in_its_files(tmp_path: Path) -> None:
    data = bytes(100) + WEIGHT.tobytes()
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.data").write_bytes(data)
    (tmp_path / "sub" / "b.bin").write_bytes(WEIGHT.tobytes())
    graph = opened(
        tmp_path,
        elsewhere("full", (40, 30), location="a.data", offset=100, length=WEIGHT.nbytes, checksum="0" * 40),
        elsewhere("bare", (40, 30), location="sub/b.bin"),
        elsewhere("shared", (2, 30), location="a.data", offset=100),
    )
    assert [file.path.name for file in graph.external] == ["a.data", "b.bin"]
    assert np.array_equal(graph.tensors["full"].read(), WEIGHT)
    assert np.array_equal(graph.tensors["bare"].read(), WEIGHT)
    assert np.array_equal(graph.tensors["shared"].read(), WEIGHT[:2])
    assert graph.tensors["full"].offset == 100


def test_a_hub_cache_is_opened_through_its_links(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc" / "onnx"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    saved(blobs, model(elsewhere("w", (40, 30), location="model.onnx_data")), "1")
    (blobs / "2").write_bytes(WEIGHT.tobytes())
    (snapshot / "model.onnx").symlink_to("../../../blobs/1")
    (snapshot / "model.onnx_data").symlink_to("../../../blobs/2")
    assert np.array_equal(open_graph(snapshot / "model.onnx").tensors["w"].read(), WEIGHT)


def test_weights_in_bodies_functions_constants_and_sparse_tensors_are_accounted_for(tmp_path: Path) -> None:
    sparse = helper.make_sparse_tensor(
        numpy_helper.from_array(WEIGHT[0], "s"), numpy_helper.from_array(np.arange(30)), [40]
    )
    function = helper.make_function(
        "mine", "F", ["a"], ["b"], [helper.make_node("Constant", [], ["b"], value=numpy_helper.from_array(WEIGHT))],
        [helper.make_opsetid("", 21)],
    )  # fmt: skip
    nodes = (
        helper.make_node("If", ["x"], ["chosen"], then_branch=body(WEIGHT, "t"), else_branch=body(WEIGHT + 1, "e")),
        helper.make_node("Constant", [], ["constant"], value=numpy_helper.from_array(WEIGHT + 2)),
        helper.make_node("Constant", [], ["numbers"], value_floats=[1.0, 2.0]),
        helper.make_node("Constant", [], ["thin"], sparse_value=sparse),
        helper.make_node("ConstantOfShape", ["x"], ["filled"], value=numpy_helper.from_array(WEIGHT[0, :1])),
        helper.make_node("Text", [], ["t"], value=numpy_helper.from_array(np.array(["a", "b"], object))),
    )
    made = model(numpy_helper.from_array(WEIGHT, "w"), nodes=nodes, functions=[function])
    made.graph.sparse_initializer.append(sparse)
    graph = open_graph(saved(tmp_path, made))
    expected = {
        "w": WEIGHT, "chosen/then_branch/w": WEIGHT, "chosen/else_branch/w": WEIGHT + 1, "constant": WEIGHT + 2,
        "chosen/then_branch/c": WEIGHT[:1], "chosen/else_branch/c": WEIGHT[:1] + 1,
        "thin/values": WEIGHT[0], "thin/indices": np.arange(30), "filled/value": WEIGHT[0, :1], "mine.F/b": WEIGHT,
        "s/values": WEIGHT[0], "s/indices": np.arange(30),
    }  # fmt: skip
    assert graph.tensors.keys() == expected.keys()
    assert all(np.array_equal(tensor.read(), expected[name]) for name, tensor in graph.tensors.items())
    assert graph.strings == ("t/value",)
    assert {graph.holders[name] for name in ("constant", "chosen/then_branch/c", "mine.F/b")} == {"Constant"}
    assert graph.holders["s/values"] == graph.holders["thin/indices"] == "SparseTensor"
    assert not graph.proto.functions[0].node[0].attribute[0].t.raw_data


def test_a_graph_of_more_than_a_window_and_many_nodes(tmp_path: Path) -> None:
    nodes = tuple(
        helper.make_node("Add", ["x", f"w{i}"], [f"y{i}"], doc_string="d" * (i % 300), axis=i) for i in range(3000)
    )
    weights = [
        numpy_helper.from_array(RNG.standard_normal(i % 400).astype(np.float32), f"w{i}") for i in range(1, 1000)
    ]
    made = model(*weights, nodes=nodes)
    graph = open_graph(saved(tmp_path, made))
    assert len(graph.tensors) == 999
    for tensor in weights:
        assert np.array_equal(graph.tensors[tensor.name].read(), numpy_helper.to_array(tensor))
    proto = graph.proto
    for tensor, whole in zip(proto.graph.initializer, made.graph.initializer, strict=True):
        assert tensor.HasField("raw_data") == (len(whole.SerializeToString()) <= KEPT)
        tensor.raw_data = whole.raw_data
    assert proto == made


def test_files_larger_than_protocol_buffers_allow(tmp_path: Path) -> None:
    rows = 3 << 20
    with open(tmp_path / "big.data", "wb") as file:
        file.truncate(2 * rows * 1024 * 4)
        file.seek(rows * 1024 * 4)
        file.write(WEIGHT.tobytes())
    half = rows * 1024 * 4
    graph = opened(
        tmp_path,
        elsewhere("a", (rows, 1024), location="big.data", offset=0, length=half),
        elsewhere("b", (rows, 1024), location="big.data", offset=half, length=half),
    )
    assert graph.tensors["b"].read(0, 1).reshape(-1)[:1024].tolist() == WEIGHT.reshape(-1)[:1024].tolist()
    assert sum(tensor.nbytes for tensor in graph.tensors.values()) == 24 << 30


SCRIPT = """
import resource, sys
sys.path[:0] = {paths!r}
from surgery_formats.containers.onnx import open_graph
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
graph = open_graph({path!r})
assert len(graph.tensors) == 100
assert "onnx" not in sys.modules and "numpy" not in sys.modules
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_opening_takes_no_memory_for_weights_and_imports_nothing(tmp_path: Path) -> None:
    block = bytes(1 << 20)
    made = model(*(TensorProto(name=f"w{i}", data_type=FLOAT, dims=(1 << 18,), raw_data=block) for i in range(100)))
    code = SCRIPT.format(paths=[str(ROOT), str(ROOT / "formats")], path=str(saved(tmp_path, made)))
    kilobytes = int(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)
    assert kilobytes < 8 << 10  # of 100 MB


def test_an_empty_tensor_has_no_bytes_anywhere(tmp_path: Path) -> None:
    graph = opened(tmp_path, TensorProto(name="slot", data_type=FLOAT, dims=(40, 0)))
    assert graph.tensors["slot"].read().shape == (40, 0)
