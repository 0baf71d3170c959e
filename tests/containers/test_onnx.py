# SPDX-License-Identifier: Apache-2.0
"""ONNX graphs: every tensor is found where it lies, wherever in the graph it is, and no file means two things."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import save_file

import surgery
from surgery_formats.containers.onnx import OnnxGraph, open_graph
from surgery_formats.containers.onnx.tensor_proto import KEPT
from surgery_formats.containers.onnx.wire import WireReader, varint, varints
from surgery_formats.dtypes import DType
from surgery_formats.errors import FitError, MalformedError, NotFoundError, ProofError, SurgeryError, UsageError
from surgery_formats.files.raw import open_file
from surgery_formats.models.checkpoint import open_checkpoint
from tests.support.kit import ROOT

FLOAT = TensorProto.FLOAT
RNG = np.random.default_rng(3)
WEIGHT = RNG.standard_normal((40, 30)).astype(np.float32)


def model(*initializers: Any, nodes: tuple[Any, ...] = (), **fields: Any) -> onnx.ModelProto:
    x, y = (helper.make_tensor_value_info(name, FLOAT, ["n", 40]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"]), *nodes], "g", [x], [y], list(initializers))
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], **fields)


def saved(folder: Path, made: Any, name: str = "model.onnx") -> Path:
    path = folder / name
    path.write_bytes(made if isinstance(made, bytes) else made.SerializeToString())
    return path


def opened(folder: Path, *initializers: Any, **options: Any) -> OnnxGraph:
    return open_graph(saved(folder, model(*initializers, **options)))


def elsewhere(name: str, shape: tuple[int, ...], elements: int = FLOAT, **entries: object) -> TensorProto:
    tensor = TensorProto(name=name, data_type=elements, dims=shape, data_location=TensorProto.EXTERNAL)
    for key, value in entries.items():
        tensor.external_data.add(key=key, value=str(value))
    return tensor


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


@pytest.mark.parametrize(
    ("entries", "what"),
    [
        ({"location": "/etc/passwd"}, "no path inside"), ({"location": "../model/a.data"}, "no path inside"),
        ({"location": "sub/../../a"}, "no path inside"), ({"location": "C:a.data"}, "no path inside"),
        ({"location": "..\\a.data"}, "no path inside"), ({"location": ""}, "no path inside"), ({}, "no path inside"),
        ({"location": "a\n.data"}, "no path inside"), ({"location": "link.data"}, "leads out"),
        ({"location": "linked/a.data"}, "leads out"),
        ({"location": "none.data"}, "No such file"), ({"location": "x" * 300}, "name too long"), ({"location": "."}, "leads out"),
        ({"location": "*/_ORT_MEM_ADDR_/*", "offset": 1}, "No such file"),
        ({"location": "a.data", "offset": 4}, "ends at byte 4804"), ({"location": "a.data", "offset": "-1"}, "no offset"),
        ({"location": "a.data", "offset": "0x10"}, "no offset"), ({"location": "a.data", "offset": 1 << 63}, "no offset"),
        ({"location": "a.data", "length": 4796}, "4796 bytes in 'a.data'"), ({"location": "a.data", "length": "\u0664"}, "no length"),
    ],
)  # fmt: skip
def test_external_data_outside_the_folder_or_its_file_is_refused(
    entries: dict[str, object], what: str, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "a.data").write_bytes(WEIGHT.tobytes())
    (tmp_path / "a.data").write_bytes(WEIGHT.tobytes())
    (folder / "link.data").symlink_to(tmp_path / "a.data")
    (folder / "linked").symlink_to(tmp_path)
    with pytest.raises((MalformedError, NotFoundError), match=what):
        opened(folder, elsewhere("w", (40, 30), **entries))


def test_a_hub_cache_is_opened_through_its_links(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc" / "onnx"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    saved(blobs, model(elsewhere("w", (40, 30), location="model.onnx_data")), "1")
    (blobs / "2").write_bytes(WEIGHT.tobytes())
    (snapshot / "model.onnx").symlink_to("../../../blobs/1")
    (snapshot / "model.onnx_data").symlink_to("../../../blobs/2")
    assert np.array_equal(open_graph(snapshot / "model.onnx").tensors["w"].read(), WEIGHT)


def body(weight: np.ndarray, name: str) -> Any:
    out = helper.make_tensor_value_info("out", FLOAT, None)
    node = helper.make_node("Constant", [], ["c"], value=numpy_helper.from_array(weight[:1]))
    return helper.make_graph([node], name, [], [out], [numpy_helper.from_array(weight, "w")])


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


def test_a_graph_that_is_larger_than_protocol_buffers_allow(tmp_path: Path) -> None:
    rows, path = 3 << 20, tmp_path / "huge.onnx"
    more, tail = rows * 256 * 4, tag(2, b"g")
    tensor = b"\x08" + varint(rows) + b"\x08" + varint(256) + FLOATS + tag(8, b"w") + b"\x4a" + varint(more)
    graph = b"\x2a" + varint(len(tensor) + more) + tensor
    head = b"\x08\x0a\x3a" + varint(len(graph) + more + len(tail)) + graph
    with open(path, "wb") as file:
        file.write(head)
        file.seek(more, os.SEEK_CUR)
        file.write(tail + tag(8, b"\x10\x15"))
    huge = open_graph(path)
    assert (huge.tensors["w"].nbytes, huge.tensors["w"].offset) == (3 << 30, len(head))
    assert not huge.proto.graph.initializer[0].raw_data


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


MADE = model(
    numpy_helper.from_array(WEIGHT, "w"), helper.make_tensor("t", FLOAT, (3,), [1, 2, 3]),
    helper.make_tensor("h", TensorProto.FLOAT16, (3,), [1, 2, 3]), elsewhere("e", (40, 30), location="a.data", offset=0),
    nodes=(helper.make_node("If", ["x"], ["chosen"], then_branch=body(WEIGHT, "t"), else_branch=body(WEIGHT, "e")),),
    producer_name="tests",
)  # fmt: skip
RAW = MADE.SerializeToString()


def test_a_file_that_is_truncated_anywhere_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.data").write_bytes(WEIGHT.tobytes())
    open_graph(saved(tmp_path, RAW))
    end = RAW.index(MADE.graph.SerializeToString()) + MADE.graph.ByteSize()
    for size in {*range(0, end, 97), *range(60), end - 1, len(RAW) - 1}:
        with pytest.raises(MalformedError):
            open_graph(saved(tmp_path, RAW[:size]))


def test_a_damaged_file_is_opened_or_refused(tmp_path: Path) -> None:
    (tmp_path / "a.data").write_bytes(WEIGHT.tobytes())
    draw = random.Random(5)
    spots = [at for at in range(len(RAW)) if at < 400 or draw.random() < 0.05]
    outcomes = set()
    for _ in range(1500):
        damaged = bytearray(RAW)
        for _ in range(draw.choice((1, 1, 2, 5))):
            at = draw.choice(spots)
            kind = draw.randrange(4)
            if kind == 0:
                damaged[at] = draw.randrange(256)
            elif kind == 1:
                damaged[at] ^= 1 << draw.randrange(8)
            elif kind == 2:
                del damaged[at : at + draw.randrange(1, 9)]
            else:
                damaged[at:at] = damaged[at : at + draw.randrange(1, 40)]
            spots = [spot for spot in spots if spot < len(damaged)]
        try:
            graph = open_graph(saved(tmp_path, bytes(damaged)))
        except SurgeryError as error:
            outcomes.add(type(error).__name__)
            continue
        outcomes.add("read")
        parsed = onnx.ModelProto()
        parsed.ParseFromString(bytes(damaged))  # what is read here is what others read
        dims = {tensor.name: tuple(tensor.dims) for tensor in parsed.graph.initializer}
        assert dims.items() <= dict(graph.shapes).items()
        for tensor in graph.tensors.values():
            assert 0 <= tensor.offset <= tensor.offset + tensor.nbytes <= tensor.file.size
        for name in graph.small:
            with suppress(SurgeryError):
                graph.small[name]
        with suppress(SurgeryError):
            assert len(graph.proto.graph.initializer) <= 20
    assert {"read", "MalformedError"} <= outcomes


def tag(number: int, data: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(data)) + data


def wrapped(graph: bytes) -> bytes:
    return b"\x08\x0a" + tag(7, graph)


DIMS, FLOATS = b"\x08\x02", b"\x10\x01"


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"", "it has no graph"), (b"\x08\x0a", "it has no graph"), (tag(7, b""), "it has no graph"),
        (wrapped(b"") + tag(7, b""), "stands twice"), (b"\x08\x0a" + b"\x3d1234", "byte 2"),
        (b"\x0a\x01a" + tag(7, b""), "byte 0"), (wrapped(b"\x0b\x0c"), "no field"), (wrapped(b"\x00\x00"), "no field"),
        (b"\x08\x0a\x3a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01", "no field"), (b"\x08" + b"\xff" * 11, "no field"),
        (wrapped(tag(5, tag(8, b"w") + DIMS + FLOATS + tag(9, bytes(8)) + tag(9, bytes(8)))), "stands twice"),
        (wrapped(tag(5, tag(8, b"w") + DIMS + FLOATS + tag(9, bytes(8)) + tag(4, bytes(8)))), "in two places"),
        (wrapped(tag(5, tag(8, b"w") + DIMS + FLOATS + tag(9, bytes(8)) + b"\x70\x01")), "in two places"),
        (wrapped(tag(5, tag(8, b"w") + DIMS + FLOATS + tag(9, bytes(9)))), "9 bytes for F32 .2., which takes 8"),
        (wrapped(tag(5, tag(8, b"w") + DIMS + b"\x10\x63" + tag(9, bytes(8)))), "element type 99"),
        (wrapped(tag(5, tag(8, b"w") + DIMS + tag(9, bytes(8)))), "element type 0"),
        (wrapped(tag(5, tag(8, b"w") + b"\x08" + b"\xff" * 9 + b"\x01" + FLOATS)), "sizes"),
        (wrapped(tag(5, tag(8, b"w") + b"\x08\x01" * 65 + FLOATS)), "at most 64 sizes"),
        (wrapped(tag(5, tag(8, b"w") + tag(1, b"\x01" * 65) + FLOATS)), "no field"),
        (wrapped(tag(5, tag(8, b"w") + tag(3, b"") + FLOATS)), "segment"),
        (wrapped(tag(5, tag(8, b"w") + DIMS + FLOATS)), "no values"), (wrapped(tag(5, FLOATS + tag(9, b""))), "no values"),
        (wrapped(tag(5, tag(8, b"\xff") + FLOATS)), "not UTF-8"), (wrapped(tag(5, tag(8, b"w" * 70000) + FLOATS)), "no field"),
        (wrapped(tag(5, tag(8, b"w") + b"\x08\x00" + FLOATS) * 2), "appears twice"),
        (wrapped(b"\x2d1234"), "no field"), (wrapped(tag(1, b"\x2d1234")), "no field"),
        (wrapped(tag(1, tag(5, b"") * 4097)), "4097 attributes"),
    ],
)  # fmt: skip
def test_what_is_no_model_or_means_two_things_is_refused(content: bytes, what: str, tmp_path: Path) -> None:
    with pytest.raises(MalformedError, match=what):
        open_graph(saved(tmp_path, content))


def test_bodies_are_not_followed_without_end(tmp_path: Path) -> None:
    graph = b""
    for _ in range(40):
        graph = tag(1, tag(2, b"o") + tag(5, tag(1, b"body") + tag(6, graph)))
    with pytest.raises(MalformedError, match="nested more than 30 deep"):
        open_graph(saved(tmp_path, wrapped(graph)))


def test_a_file_of_countless_fields_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("surgery_formats.containers.onnx.wire._FIELDS", 1000)
    with pytest.raises(MalformedError, match="more than 1000 fields"):
        open_graph(saved(tmp_path, wrapped(b"\x10\x00" * 1001)))


def test_values_of_a_shape_that_they_do_not_fill_are_refused_when_they_are_asked_for(tmp_path: Path) -> None:
    short = TensorProto(name="h", data_type=TensorProto.FLOAT16, dims=(1 << 40,), int32_data=[1, 2])
    graph = opened(tmp_path, short)
    with pytest.raises(MalformedError, match="values cannot be read"):
        graph.small["h"]


def test_an_empty_tensor_has_no_bytes_anywhere(tmp_path: Path) -> None:
    graph = opened(tmp_path, TensorProto(name="slot", data_type=FLOAT, dims=(40, 0)))
    assert graph.tensors["slot"].read().shape == (40, 0)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, (1 << 64) - 1), max_size=20))
def test_varints_are_read_as_they_are_written(numbers: list[int]) -> None:
    assert varints(b"".join(map(varint, numbers)), 20) == tuple(numbers)


def test_fields_are_those_of_the_parser(tmp_path: Path) -> None:
    reader = WireReader(open_file(saved(tmp_path, RAW)))
    fields = {field.number: field for field in reader.fields(0, len(RAW))}
    assert RAW[fields[7].begin : fields[7].end] == MADE.graph.SerializeToString()
    assert reader.text(fields[2]) == "tests"
    assert fields[1].value == MADE.ir_version


# ------------------------------------------------------------------------------------------------ as a checkpoint


def test_a_graph_is_a_checkpoint_of_the_weights_in_it(tmp_path: Path) -> None:
    (tmp_path / "w.data").write_bytes(WEIGHT.tobytes())
    nodes = (
        helper.make_node("Constant", [], ["held"], value=numpy_helper.from_array(WEIGHT[:2])),
        helper.make_node("Constant", [], ["axes"], value=numpy_helper.from_array(np.arange(40))),
        helper.make_node("Constant", [], ["eps"], value=numpy_helper.from_array(np.float32(1e-5))),
    )
    inline = numpy_helper.from_array(WEIGHT, "model.layers.0.mlp.up_proj.weight")
    path = saved(tmp_path, model(inline, elsewhere("head", (40, 30), location="w.data"), nodes=nodes))
    checkpoint = open_checkpoint(path)
    assert checkpoint.is_graph
    assert list(checkpoint.main.parameters) == ["held", inline.name, "head"]  # in the order of files
    assert [shard.path.name for shard in checkpoint.main.shards] == ["model.onnx", "w.data"]
    assert np.array_equal(checkpoint.main.tensors["head"].read(), WEIGHT)
    assert checkpoint.main.role(inline.name) == "mlp"
    checkpoint.check_unchanged()
    os.utime(tmp_path / "w.data", (1, 1))
    with pytest.raises(ProofError, match="changed"):
        checkpoint.check_unchanged()


@pytest.mark.parametrize(
    "others", [(), ("prefill.onnx",), ("model.onnx_data", "tokenizer.json", "config.json")], ids=str
)
def test_a_folder_with_a_graph_opens(others: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "model.onnx_data").write_bytes(WEIGHT.tobytes())
    for name in others:
        saved(tmp_path, model(numpy_helper.from_array(WEIGHT, "v")) if name.endswith(".onnx") else b"{}", name)
    (tmp_path / "model.onnx_data").write_bytes(WEIGHT.tobytes())
    saved(tmp_path, model(elsewhere("w", (40, 30), location="model.onnx_data")))
    checkpoint = open_checkpoint(tmp_path)
    assert list(checkpoint.main.tensors) == ["w"]
    assert "model.onnx_data" not in {name for name, _ in checkpoint.side_files}


def test_a_folder_with_several_graphs_wants_a_name_and_weights_come_first(tmp_path: Path) -> None:
    for name in ("encoder.onnx", "decoder.onnx"):
        saved(tmp_path, model(numpy_helper.from_array(WEIGHT, "w")), name)
    with pytest.raises(MalformedError, match=r"2 files of weights .*name one of them"):
        open_checkpoint(tmp_path)
    save_file({"a": WEIGHT}, tmp_path / "model.safetensors")
    assert list(open_checkpoint(tmp_path).main.tensors) == ["a"]


LORA = ROOT / "examples" / "lora"


@pytest.mark.parametrize(
    "call",
    [
        lambda path, out: surgery.export_onnx(path, output=out),
        lambda path, out: surgery.convert(LORA, "mlx", base=path, output=out),
        lambda path, out: surgery.check(path, LORA),
    ],
    ids=["export", "convert", "check"],
)
def test_where_a_model_is_wanted_a_graph_is_named_as_one(call: Any, tmp_path: Path) -> None:
    path = saved(tmp_path, model(numpy_helper.from_array(WEIGHT, "model.embed_tokens.weight")))
    with pytest.raises(FitError, match="an ONNX graph where"):
        call(path, tmp_path / "out")
    with pytest.raises(UsageError, match="needs the checkpoint that it was made of"):
        surgery.merge(path, LORA, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_weights_that_are_written_one_by_one_are_no_checkpoint(tmp_path: Path) -> None:
    half = WEIGHT.astype(np.float16)
    path = saved(tmp_path, model(helper.make_tensor("h", TensorProto.FLOAT16, half.shape, half.reshape(-1).tolist())))
    with pytest.raises(MalformedError, match=r"1 weights are written value by value .h."):
        open_checkpoint(path)


def test_a_repository_with_graphs_alone_says_where_they_are(tmp_path: Path) -> None:
    (tmp_path / "onnx").mkdir()
    saved(tmp_path / "onnx", model(numpy_helper.from_array(WEIGHT, "w")), "model_q4.onnx")
    with pytest.raises(NotFoundError, match=r"graphs in 'onnx': name one, such as onnx/model_q4.onnx"):
        open_checkpoint(tmp_path)


def test_a_pipeline_of_graphs_opens(tmp_path: Path) -> None:
    names = {
        "unet": ["diffusers", "OnnxRuntimeModel"],
        "scheduler": ["diffusers", "X"],
        "vae_decoder": ["diffusers", "Y"],
    }
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "OnnxStableDiffusionPipeline", **names}))
    for name in names:
        (tmp_path / name).mkdir()
        if name != "scheduler":
            saved(tmp_path / name, model(numpy_helper.from_array(WEIGHT, f"{name}.conv_in.weight")))
    checkpoint = open_checkpoint(tmp_path)
    assert (checkpoint.is_pipeline, checkpoint.is_graph) == (True, True)
    assert {name: list(one.tensors) for name, one in checkpoint.components.items()} == {
        "unet": ["unet.conv_in.weight"],
        "vae_decoder": ["vae_decoder.conv_in.weight"],
    }
    report = surgery.inspect(tmp_path)
    assert report.parameters == 2 * WEIGHT.size
    with pytest.raises(FitError, match="an ONNX graph where"):
        surgery.merge(tmp_path, LORA, output=tmp_path / "out")
