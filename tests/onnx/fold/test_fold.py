# SPDX-License-Identifier: Apache-2.0
"""A branch is folded as exactly as its weight's type holds it, and a weight on an adapter means something."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import surgery
from surgery.onnx.run.adapter_file import adapter_bytes
from surgery_formats.errors import FitError

TYPES = {"f2": TensorProto.FLOAT16, "f4": TensorProto.FLOAT, "f8": TensorProto.DOUBLE}
RNG = np.random.default_rng(0)
W, A, B = (RNG.standard_normal(size) for size in ((16, 8), (16, 2), (2, 8)))


def slotted(path: Path, dtype: str) -> Path:
    """``y = x W + x A B`` with A and B as inputs."""
    kind = TYPES[dtype]
    shapes = {"x": ["n", 16], "m.lora_A.weight": [16, "r"], "m.lora_B.weight": ["r", 8], "extra": [8]}
    inputs = [helper.make_tensor_value_info(name, kind, dims) for name, dims in shapes.items()]
    nodes = [
        helper.make_node("MatMul", ["x", "W"], ["p"]),
        helper.make_node("MatMul", ["x", "m.lora_A.weight"], ["a"]),
        helper.make_node("MatMul", ["a", "m.lora_B.weight"], ["b"]),
        helper.make_node("Add", ["p", "b"], ["s"]),
        helper.make_node("Add", ["s", "extra"], ["y"]),
    ]
    stored = [numpy_helper.from_array(W.astype(dtype), "W"), numpy_helper.from_array(np.zeros(8, dtype), "extra")]
    out = helper.make_tensor_value_info("y", kind, ["n", 8])
    graph = helper.make_graph(nodes, "g", inputs, [out], stored)
    path.parent.mkdir()
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    return path


def adapter(path: Path, dtype: str, **more: np.ndarray) -> Path:
    given = {"m.lora_A.weight": A, "m.lora_B.weight": B, **more}
    path.write_bytes(adapter_bytes({name: values.astype(dtype) for name, values in given.items()}))
    return path


@pytest.mark.parametrize("dtype", TYPES)
def test_a_weighted_adapter_is_rounded_once(tmp_path: Path, dtype: str) -> None:
    graph, factors = slotted(tmp_path / "g" / "model.onnx", dtype), adapter(tmp_path / "a.onnx_adapter", dtype)
    surgery.fold(graph, [(factors, 0.7)], output=tmp_path / "out")
    (found,) = (t for t in onnx.load(tmp_path / "out" / "model.onnx").graph.initializer if t.name == "W")
    wide = W.astype(dtype).astype("f8") + 0.7 * A.astype(dtype).astype("f8") @ B.astype(dtype).astype("f8")
    limit = max(np.finfo(dtype).eps / 2 * np.abs(wide).max(), 2e-6)
    assert np.abs(numpy_helper.to_array(found) - wide).max() <= limit
    said = json.loads((tmp_path / "out" / "surgery_manifest.json").read_text())
    assert said["adapters"] == [{"name": "a.onnx_adapter", "weight": 0.7}]


def test_a_double_keeps_its_digits(tmp_path: Path) -> None:
    graph, factors = slotted(tmp_path / "g" / "model.onnx", "f8"), adapter(tmp_path / "a.onnx_adapter", "f8")
    zeros = adapter_bytes({"m.lora_A.weight": A, "m.lora_B.weight": np.zeros_like(B)})
    factors.write_bytes(zeros)
    surgery.fold(graph, [factors], output=tmp_path / "out")
    (found,) = (t for t in onnx.load(tmp_path / "out" / "model.onnx").graph.initializer if t.name == "W")
    assert np.array_equal(numpy_helper.to_array(found), W)


def test_a_weight_on_what_is_no_factor_is_refused(tmp_path: Path) -> None:
    """A head that an adapter gives in full would come in at its full strength."""
    graph = slotted(tmp_path / "g" / "model.onnx", "f4")
    factors = adapter(tmp_path / "a.onnx_adapter", "f4", extra=np.ones(8))
    with pytest.raises(FitError, match=r"the weight 0\.7, and gives this as it is"):
        surgery.fold(graph, [(factors, 0.7)], output=tmp_path / "out")
    surgery.fold(graph, [factors], output=tmp_path / "out")
