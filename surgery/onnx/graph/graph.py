# SPDX-License-Identifier: Apache-2.0
"""A graph under construction: nodes with stable names, constants stored once, the bytes of an ONNX file at the end.

It writes ONNX's own protocol buffers. A graph library on top would cost more time to import than all of the export takes
(docs/adr/0013).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from surgery_formats.dtypes import DType

if TYPE_CHECKING:
    import numpy as np
    import onnx

__all__ = ["MICROSOFT", "ONNX_TYPES", "Graph"]

MICROSOFT = "com.microsoft"
ONNX_TYPES = {DType.F32: 1, DType.I32: 6, DType.I64: 7, DType.BOOL: 9, DType.F16: 10, DType.F64: 11, DType.BF16: 16}
"""``TensorProto.DataType`` of stored types."""

_OPSET, _IR = 23, 11  # Attention and RMSNormalization; the first IR version of opset 23
_NUMPY = {"float32": 1, "int32": 6, "int64": 7, "bool": 9, "float16": 10, "bfloat16": 16}


class Graph:
    """Nodes in order. Values are strings, as in ONNX."""

    def __init__(self) -> None:
        import onnx

        self._onnx = onnx
        self._proto = onnx.GraphProto(name="surgery")
        self._taken: dict[str, int] = {}
        self._constants: dict[tuple[str, tuple[int, ...], bytes], str] = {}
        self._initializers: set[str] = set()

    @property
    def nodes(self) -> int:
        """How many nodes there are."""
        return len(self._proto.node)

    def node(
        self, op: str, inputs: Sequence[str], at: str, *, domain: str = "", out: str = "*", **attributes: Any
    ) -> str:
        """Add a node with one output.

        Args:
            op: Operator.
            inputs: Values; empty for an optional input left out.
            at: Module the node belongs to, the first part of its name.
            domain: Of the operator; empty for ONNX's own.
            out: Name of the output; by default one is made up.
            attributes: int, float, str, or lists of them.

        Returns:
            Its output.
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
        """Add a node with any number of outputs: ``*`` for a name made up here, empty for one left out, else its name."""
        name = self._name(f"{at}/{op}" if at else op)
        number = sum(1 for one in outputs if one == "*")
        made = [one if one != "*" else (name if number == 1 else f"{name}.{i}") for i, one in enumerate(outputs)]
        kept = list(inputs)
        while kept and not kept[-1]:
            kept.pop()
        node = self._proto.node.add(op_type=op, name=name, input=kept, output=made)
        if domain:
            node.domain = domain
        for key, value in attributes.items():
            _set(node.attribute.add(name=key), value)
        return made

    def _name(self, wanted: str) -> str:
        count = self._taken.get(wanted, 0)
        self._taken[wanted] = count + 1
        return wanted if count == 0 else f"{wanted}_{count}"

    def rename(self, value: str, name: str) -> str:
        """Call the output `value` of the last node `name`."""
        last = self._proto.node[-1]
        last.output[list(last.output).index(value)] = name
        return name

    def constant(self, array: np.ndarray, name: str = "") -> str:
        """An initializer that holds `array`; equal ones are stored once."""
        raw = array.tobytes()
        key = (array.dtype.name, array.shape, raw)
        if key not in self._constants:
            made = name or self._name("constant")
            self._add(made, _NUMPY[array.dtype.name], array.shape).raw_data = raw
            self._constants[key] = made
        return self._constants[key]

    def ints(self, *values: int) -> str:
        """A vector of int64."""
        import numpy as np

        return self.constant(np.array(values, np.int64))

    def number(self, value: float, io: DType) -> str:
        """A scalar of type `io`."""
        import numpy as np

        return self.constant(np.array(value, self.numpy_type(io)))

    def ones(self, width: int, io: DType) -> str:
        """A vector of ones of type `io`."""
        import numpy as np

        return self.constant(np.ones(width, self.numpy_type(io)))

    def cast(self, value: str, io: DType, at: str) -> str:
        """`value` in another type."""
        return self.node("Cast", [value], at, to=ONNX_TYPES[io])

    def numpy_type(self, io: DType) -> np.dtype[Any]:
        """Numpy's name of a type."""
        import numpy as np

        if io is DType.BF16:
            import ml_dtypes

            wide: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
            return wide
        names = {DType.F32: "f4", DType.F16: "f2", DType.I64: "i8", DType.I32: "i4", DType.BOOL: "?"}
        found: np.dtype[Any] = np.dtype(names[io])
        return found

    def external(self, name: str, dtype: DType, offset: int, file: str, shape: Sequence[int], nbytes: int) -> None:
        """An initializer that is `nbytes` bytes of `file` from `offset`; harmless twice."""
        if name in self._initializers:
            return
        made = self._add(name, ONNX_TYPES[dtype], shape)
        made.data_location = self._onnx.TensorProto.EXTERNAL
        for key, value in (("location", file), ("offset", offset), ("length", nbytes)):
            made.external_data.add(key=key, value=str(value))

    def initializer(self, name: str, array: np.ndarray) -> None:
        """A named initializer: the default of an input, if there is one of that name."""
        self._add(name, _NUMPY[array.dtype.name], array.shape).raw_data = array.tobytes()

    def _add(self, name: str, kind: int, shape: Sequence[int]) -> onnx.TensorProto:
        self._initializers.add(name)
        made: onnx.TensorProto = self._proto.initializer.add(name=name, data_type=kind, dims=list(shape))
        return made

    def input(self, name: str, dtype: DType, shape: Sequence[int | str]) -> str:
        """Add an input."""
        _describe(self._proto.input.add(name=name), dtype, shape)
        return name

    def output(self, name: str, dtype: DType, shape: Sequence[int | str]) -> None:
        """Add an output."""
        _describe(self._proto.output.add(name=name), dtype, shape)

    def model(self, metadata: Mapping[str, str]) -> onnx.ModelProto:
        """The whole file."""
        from surgery._version import __version__

        model = self._onnx.ModelProto(ir_version=_IR, producer_name="surgery", producer_version=__version__)
        model.opset_import.add(domain="", version=_OPSET)
        if any(node.domain == MICROSOFT for node in self._proto.node):
            model.opset_import.add(domain=MICROSOFT, version=1)
        for key in sorted(metadata):
            model.metadata_props.add(key=key, value=metadata[key])
        model.graph.CopyFrom(self._proto)
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
