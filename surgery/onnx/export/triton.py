# SPDX-License-Identifier: Apache-2.0
"""The configuration of Triton's onnxruntime backend."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx

__all__ = ["triton_config"]

_TYPES = {1: "FP32", 6: "INT32", 7: "INT64", 9: "BOOL", 10: "FP16", 16: "BF16"}
"""Names of types, by ``TensorProto.DataType``."""


def triton_config(model: onnx.ModelProto, name: str) -> bytes:
    """``config.pbtxt`` of Triton's onnxruntime backend, for the inputs that have no default."""
    defaults = {tensor.name for tensor in model.graph.initializer}
    lines = [f"name: {json.dumps(name)}", 'backend: "onnxruntime"', "max_batch_size: 0"]
    inputs = [port for port in model.graph.input if port.name not in defaults]
    for kind, ports in (("input", inputs), ("output", list(model.graph.output))):
        entries = []
        for port in ports:
            tensor = port.type.tensor_type
            dims = ", ".join(str(dim.dim_value) if dim.HasField("dim_value") else "-1" for dim in tensor.shape.dim)
            entries.append(
                f"  {{ name: {json.dumps(port.name)} data_type: TYPE_{_TYPES[tensor.elem_type]} dims: [ {dims} ] }}"
            )
        lines.append(f"{kind} [\n" + ",\n".join(entries) + "\n]")
    return ("\n".join(lines) + "\n").encode()
