# SPDX-License-Identifier: Apache-2.0
"""A graph under construction: nodes with stable names, constants stored once, and the ONNX model at the end.

It writes ONNX's own protocol buffers. A graph library on top would take longer to import than an export takes
(docs/adr/0013).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import onnx

from surgery._version import __version__
from surgery.onnx.graph.opset import ir_version, nodes_of
from surgery_formats.dtypes import DType

__all__ = ["END", "MICROSOFT", "ONNX_TYPES", "Graph"]

MICROSOFT = "com.microsoft"
END = 2**62
"""An end of Slice beyond any length."""
ONNX_TYPES = {
    DType.F32: 1, DType.U8: 2, DType.I32: 6, DType.I64: 7, DType.BOOL: 9, DType.F16: 10, DType.F64: 11, DType.BF16: 16,
    DType.F8_E4M3: 17,
}  # fmt: skip
"""``TensorProto.DataType`` of stored types."""

_NUMPY = {"float32": 1, "int32": 6, "int64": 7, "bool": 9, "float16": 10, "bfloat16": 16}


class Graph:
    """Nodes in order. Values are strings, as in ONNX."""

    def __init__(self) -> None:
        self._onnx = onnx
        self._model = onnx.ModelProto()
        self._proto = self._model.graph
        self._proto.name = "surgery"
        self._taken: dict[str, int] = {}
        self._constants: dict[tuple[str, tuple[int, ...], bytes], str] = {}
        self._initializers: set[str] = set()

    @property
    def nodes(self) -> int:
        """Number of nodes."""
        return len(self._proto.node)

    @property
    def proto(self) -> onnx.GraphProto:
        """What was built so far."""
        return self._proto

    def node(
        self, op: str, inputs: Sequence[str], at: str, *, domain: str = "", out: str = "*", **attributes: Any
    ) -> str:
        """Add a node and return the name of its one output.

        An empty input stands for an omitted optional one; `at` is the module that the node belongs to, the first part
        of its name.
        """
        return self.several(op, inputs, at, (out,), domain=domain, **attributes)[0]

    def several(
        self,
        op: str,
        inputs: Sequence[str],
        at: str,
        outputs: Sequence[str],
        *,
        domain: str = "",
        **attributes: Any,
    ) -> list[str]:
        """Add a node with several outputs: ``*`` generates a name, empty omits the output, other texts are names."""
        name = self._name(f"{at}/{op}" if at else op)
        number = sum(1 for output in outputs if output == "*")
        names = [
            output if output != "*" else (name if number == 1 else f"{name}.{i}") for i, output in enumerate(outputs)
        ]
        trimmed = list(inputs)
        while trimmed and not trimmed[-1]:
            trimmed.pop()
        node = self._proto.node.add(op_type=op, name=name, input=trimmed, output=names)
        if domain:
            node.domain = domain
        for key, value in attributes.items():
            _set(node.attribute.add(name=key), value)
        return names

    def _name(self, name: str) -> str:
        count = self._taken.get(name, 0)
        self._taken[name] = count + 1
        return name if count == 0 else f"{name}_{count}"

    def rename(self, value: str, name: str) -> str:
        """Rename the output `value` of the last node."""
        last = self._proto.node[-1]
        last.output[list(last.output).index(value)] = name
        return name

    def constant(self, array: np.ndarray, name: str = "") -> str:
        """Add an initializer that holds `array`; equal ones are stored once."""
        raw = array.tobytes()
        key = (array.dtype.name, array.shape, raw)
        if key not in self._constants:
            label = name or self._name("constant")
            self._add(label, _NUMPY[array.dtype.name], array.shape).raw_data = raw
            self._constants[key] = label
        return self._constants[key]

    def ints(self, *values: int) -> str:
        """Add a vector of int64."""
        return self.constant(np.array(values, np.int64))

    def number(self, value: float, io: DType) -> str:
        """Add a scalar of type `io`."""
        return self.constant(np.array(value, self.numpy_type(io)))

    def ones(self, width: int, io: DType) -> str:
        """Add a vector of ones of type `io`."""
        return self.constant(np.ones(width, self.numpy_type(io)))

    def cast(self, value: str, io: DType, at: str) -> str:
        """Convert `value` to another type."""
        return self.node("Cast", [value], at, to=ONNX_TYPES[io])

    def numpy_type(self, io: DType) -> np.dtype[Any]:
        """Return the numpy type."""
        if io is DType.BF16:
            bfloat16: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
            return bfloat16
        names = {DType.F32: "f4", DType.F16: "f2", DType.I64: "i8", DType.I32: "i4", DType.BOOL: "?"}
        dtype: np.dtype[Any] = np.dtype(names[io])
        return dtype

    def external(self, name: str, dtype: DType, offset: int, file: str, shape: Sequence[int], nbytes: int) -> None:
        """Add an initializer stored as `nbytes` bytes of `file` from `offset`; may be called twice."""
        if name in self._initializers:
            return
        tensor = self._add(name, ONNX_TYPES[dtype], shape)
        tensor.data_location = self._onnx.TensorProto.EXTERNAL
        for key, value in (("location", file), ("offset", offset), ("length", nbytes)):
            tensor.external_data.add(key=key, value=str(value))

    def is_initializer(self, name: str) -> bool:
        """Whether there is an initializer of this name."""
        return name in self._initializers

    def drop_unused(self) -> None:
        """Remove initializers that no node reads, of which onnxruntime would warn."""
        used = {name for node in self._proto.node for name in node.input}
        used |= {port.name for port in (*self._proto.input, *self._proto.output)}
        kept = [tensor for tensor in self._proto.initializer if tensor.name in used]
        if len(kept) < len(self._proto.initializer):
            del self._proto.initializer[:]
            self._proto.initializer.extend(kept)

    def initializer(self, name: str, array: np.ndarray) -> None:
        """Add a named initializer: the default of the input with that name, if there is one."""
        self._add(name, _NUMPY[array.dtype.name], array.shape).raw_data = array.tobytes()

    def _add(self, name: str, data_type: int, shape: Sequence[int]) -> onnx.TensorProto:
        self._initializers.add(name)
        tensor: onnx.TensorProto = self._proto.initializer.add(name=name, data_type=data_type, dims=list(shape))
        return tensor

    def input(self, name: str, dtype: DType, shape: Sequence[int | str]) -> str:
        """Add an input."""
        _describe(self._proto.input.add(name=name), dtype, shape)
        return name

    def output(self, name: str, dtype: DType, shape: Sequence[int | str]) -> None:
        """Add an output."""
        _describe(self._proto.output.add(name=name), dtype, shape)

    def describe(self, dtype: DType) -> None:
        """State the type of what operators give that onnx does not know, of which all that this package uses give `dtype`."""
        known = {port.name for port in self._proto.output}
        for node in self._proto.node:
            for name in () if self._onnx.defs.has(node.op_type, node.domain) else node.output:
                if name and name not in known:
                    self._proto.value_info.add(name=name).type.tensor_type.elem_type = ONNX_TYPES[dtype]

    def model(self, metadata: Mapping[str, str], opset: int) -> onnx.ModelProto:
        """Complete the model that this is the graph of, stamp it with a set of operators, and return it: the last step."""
        model = self._model
        model.ir_version, model.producer_name, model.producer_version = ir_version(opset), "surgery", __version__
        model.opset_import.add(domain="", version=opset)
        if any(node.domain == MICROSOFT for node in nodes_of(self._proto)):
            model.opset_import.add(domain=MICROSOFT, version=1)
        for key in sorted(metadata):
            model.metadata_props.add(key=key, value=metadata[key])
        return model


def _describe(value: onnx.ValueInfoProto, dtype: DType, shape: Sequence[int | str]) -> None:
    kind = value.type.tensor_type
    kind.elem_type = ONNX_TYPES[dtype]
    kind.shape.SetInParent()
    for size in shape:
        if isinstance(size, int):
            kind.shape.dim.add(dim_value=size)
        else:
            kind.shape.dim.add(dim_param=size)


def _set(attribute: onnx.AttributeProto, value: Any) -> None:
    if isinstance(value, int):
        attribute.type, attribute.i = attribute.INT, value
    elif isinstance(value, float):
        attribute.type, attribute.f = attribute.FLOAT, value
    elif isinstance(value, str):
        attribute.type, attribute.s = attribute.STRING, value.encode()
    else:
        attribute.type = attribute.INTS
        attribute.ints.extend(value)
