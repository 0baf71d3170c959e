# SPDX-License-Identifier: Apache-2.0
"""A graph whose texts are no texts, or whose values are broken, is one clear error wherever it is parsed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

import surgery
from surgery_formats.containers.onnx import open_graph
from surgery_formats.containers.onnx.parse import parsed_model
from surgery_formats.errors import MalformedError

VERBS: dict[str, Callable[[Path], object]] = {
    "inspect": surgery.inspect,
    "diff": lambda path: surgery.diff(path, path),
    "strip": lambda path: surgery.strip(path, all_metadata=True, dry_run=True),
    "proto": lambda path: open_graph(path).proto,
}
FIELDS = ("NODE", "OPERATOR", "DOMAIN", "DOC", "VALUE", "KEY", "INPUT", "PRODUCER", "INNER", "DIM")


def model() -> onnx.ModelProto:
    inner = helper.make_graph([helper.make_node("Neg", ["x"], ["z"], name="INNER")], "inner", [], [])
    node = helper.make_node("OPERATOR", ["INPUT"], ["y"], name="NODE", domain="DOMAIN", doc_string="DOC", body=inner)
    node.metadata_props.add(key="KEY", value="VALUE")
    given = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["DIM"])
    made: onnx.ModelProto = helper.make_model(helper.make_graph([node], "g", [given], []), producer_name="PRODUCER")
    return made


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("field", FIELDS)
def test_every_text_is_utf_8(field: str, verb: str, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    data = model().SerializeToString()
    path.write_bytes(data)
    VERBS["proto"](path)
    assert data.count(field.encode()) == 1
    path.write_bytes(data.replace(field.encode(), b"\xff" * len(field)))
    with pytest.raises(MalformedError, match="UTF-8"):
        VERBS[verb](path)


def test_texts_of_any_bytes_are_no_texts() -> None:
    """Attributes and tensors may hold what they like."""
    node = helper.make_node("Op", [], ["y"], text=b"\xff\xfe")
    tensor = helper.make_tensor("t", TensorProto.STRING, [1], [b"\xff"])
    data = helper.make_model(helper.make_graph([node], "g", [], [], [tensor])).SerializeToString()
    assert parsed_model(data, Path()).graph.node[0].attribute[0].s == b"\xff\xfe"


def test_values_that_are_no_numbers_are_refused_where_the_whole_file_is_parsed(tmp_path: Path) -> None:
    tensor = TensorProto(name="w", data_type=TensorProto.INT32, dims=[400], int32_data=[1 << 30] * 400)
    made = model()
    made.graph.initializer.append(tensor)
    values = b"\x80\x80\x80\x80\x04" * 400
    data = made.SerializeToString()
    assert values in data
    (tmp_path / "model.onnx").write_bytes(data.replace(values, b"\xff" * len(values)))
    assert open_graph(tmp_path / "model.onnx").proto.graph.node
    with pytest.raises(MalformedError, match="cannot be parsed"):
        surgery.strip(tmp_path / "model.onnx", all_metadata=True, dry_run=True)
