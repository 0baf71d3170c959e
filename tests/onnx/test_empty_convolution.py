# SPDX-License-Identifier: Apache-2.0
"""An empty slot beside a convolution adds nothing, whatever lies in the memory that its result gets."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import save_file

import surgery


def test_an_empty_convolution_leaves_no_garbage(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(4, 4, 1, 1)).astype(np.float32)
    base, lora = tmp_path / "base", tmp_path / "lora"
    base.mkdir()
    lora.mkdir()
    save_file({"conv.weight": weight}, base / "model.safetensors")
    (base / "config.json").write_text("{}")
    factors = {"lora_A": rng.normal(size=(2, 4, 1, 1)), "lora_B": rng.normal(size=(4, 2, 1, 1))}
    save_file(
        {f"base_model.model.conv.{name}.weight": value.astype(np.float32) for name, value in factors.items()},
        lora / "adapter_model.safetensors",
    )
    (lora / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["conv"]})
    )
    path = tmp_path / "graph" / "model.onnx"
    path.parent.mkdir()
    nodes = [
        helper.make_node("Add", ["x", "big"], ["infinite"]),  # in memory that the empty product gets afterwards
        helper.make_node("ReduceMax", ["infinite"], ["most"], keepdims=0),
        helper.make_node("Sub", ["most", "most"], ["none"]),
        helper.make_node("Greater", ["none", "most"], ["never"]),
        helper.make_node("Cast", ["never"], ["zero"], to=TensorProto.FLOAT),
        helper.make_node("Add", ["x", "zero"], ["x2"]),
        helper.make_node("Conv", ["x2", "w"], ["y"]),
    ]
    shape = [1, 4, 32, 32]
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in ("x", "big")]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)]
    graph = helper.make_graph(nodes, "g", inputs, outputs, [numpy_helper.from_array(weight, "w")])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)

    surgery.insert(path, lora, base=base, output=tmp_path / "slots")

    x, big = rng.normal(size=shape).astype(np.float32), np.full(shape, np.inf, np.float32)
    expected = onnxruntime.InferenceSession(path).run(None, {"x": x, "big": big})[0]
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    for _ in range(3):
        session = onnxruntime.InferenceSession(tmp_path / "slots" / "model.onnx", options)
        got = session.run(None, {"x": x, "big": big})[0]
        assert np.abs(got - expected).max() <= 1e-6
