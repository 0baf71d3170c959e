# SPDX-License-Identifier: Apache-2.0
"""ONNX files of a few initializers, inline and elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from surgery.onnx.run.adapter_file import adapter_bytes
from surgery_formats.containers.onnx import OnnxGraph, open_graph

__all__ = ["FLOAT", "RNG", "WEIGHT", "body", "elsewhere", "model", "opened", "saved", "write_adapter_file"]

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


def body(weight: np.ndarray, name: str) -> Any:
    out = helper.make_tensor_value_info("out", FLOAT, None)
    node = helper.make_node("Constant", [], ["c"], value=numpy_helper.from_array(weight[:1]))
    return helper.make_graph([node], name, [], [out], [numpy_helper.from_array(weight, "w")])


def write_adapter_file(path: Path, arrays: Mapping[str, Any]) -> None:
    path.write_bytes(adapter_bytes(arrays))
