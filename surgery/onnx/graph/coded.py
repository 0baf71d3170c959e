# SPDX-License-Identifier: Apache-2.0
"""Weights of a graph that are codes: MatMulNBits, GatherBlockQuantized and DequantizeLinear over byte ranges of a file."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from surgery.onnx.graph.contract import FLOAT_CODES
from surgery.onnx.graph.graph import MICROSOFT, ONNX_TYPES, Graph
from surgery_formats.dtypes import DType
from surgery_formats.tensors.unwritten import UnwrittenTensor

if TYPE_CHECKING:
    from surgery_formats.storage.block_format import BlockFormat

__all__ = ["GraphCodes", "by_format", "coded_product", "coded_rows", "coded_values", "float_values", "together"]


@dataclass(frozen=True, slots=True)
class GraphCodes:
    """One weight.

    Attributes:
        name: Stored name of the weight.
        shape: ``(out, in)``; of a table ``(rows, columns)``.
        dtype: Type of the checkpoint's values.
        form: How codes are stored.
        parts: Codes, scales, and zero points if there are any.
        rows: Whether rows of it are looked up by their codes, too.
    """

    name: str
    shape: tuple[int, int]
    dtype: DType
    form: BlockFormat
    parts: tuple[UnwrittenTensor, ...]
    rows: bool = False

    def matrix(self, number: int, count: int) -> GraphCodes:
        """One of the `count` matrices of a stack."""
        parts = []
        for part in self.parts:
            rows, nbytes = part.shape[0] // count, part.nbytes // count
            begin = part.offset + number * nbytes
            parts.append(UnwrittenTensor(part.name, part.dtype, (rows, *part.shape[1:]), part.file, begin, nbytes))
        shape = self.shape[0] // count, self.shape[1]
        return GraphCodes(f"{self.name}.{number}", shape, self.dtype, self.form, tuple(parts))


def together(tensors: Sequence[GraphCodes], name: str) -> GraphCodes | None:
    """Several weights of the same inputs as one, outputs below each other; None if their bytes do not lie side by side."""
    first = tensors[0]
    joint = []
    for parts in zip(*(tensor.parts for tensor in tensors), strict=False):
        end = parts[0].offset
        for part in parts:
            if part.file is not parts[0].file or part.offset != end:
                return None
            end += part.nbytes
        rows = sum(part.shape[0] for part in parts)
        part = parts[0]
        nbytes = end - part.offset
        joint.append(UnwrittenTensor(part.name, part.dtype, (rows, *part.shape[1:]), part.file, part.offset, nbytes))
    if any(tensor.form != first.form or tensor.shape[1] != first.shape[1] for tensor in tensors):
        return None
    outputs = sum(tensor.shape[0] for tensor in tensors)
    return GraphCodes(name, (outputs, first.shape[1]), first.dtype, first.form, tuple(joint))


def coded_product(graph: Graph, tensor: GraphCodes, x: str, io: DType, at: str) -> str:
    """``x W^T``."""
    outputs, inputs = tensor.shape
    codes, *rest = coded_values(graph, tensor, io, at)
    form = tensor.form
    sizes: dict[str, Any] = {"K": inputs, "N": outputs, "bits": form.bits, "block_size": form.block}
    return graph.node("MatMulNBits", [x, codes, *rest], at, domain=MICROSOFT, **sizes)


def coded_rows(graph: Graph, tensor: GraphCodes, ids: str, io: DType, at: str) -> str:
    """Rows of a table; a head that is tied to it reads the same bytes."""
    form = tensor.form
    if form.floats:
        return graph.node("Gather", [float_values(graph, tensor, io, at), ids], at, axis=0)
    codes, scales, *zeros = coded_values(graph, tensor, io, at, flat=True)
    how: dict[str, Any] = {"bits": form.bits, "block_size": form.block, "gather_axis": 0, "quantize_axis": 1}
    return graph.node("GatherBlockQuantized", [codes, ids, scales, *zeros], at, domain=MICROSOFT, **how)


def float_values(graph: Graph, tensor: GraphCodes, io: DType, at: str) -> str:
    """A weight of fp8 as a value ``(out, in)`` of the graph's type: any product takes it."""
    if graph.is_initializer(f"{tensor.name}.codes"):
        return tensor.name
    codes, scales = tensor.parts
    for ending, part in (("codes", codes), ("scales", scales)):
        graph.external(f"{tensor.name}.{ending}", part.dtype, part.offset, part.path.name, part.shape, part.nbytes)
    how: dict[str, Any] = {"axis": 1, "block_size": tensor.form.block} if tensor.form.block else {"axis": 0}
    wide = tensor.name if io is DType.F32 else f"{tensor.name}.f32"
    graph.node("DequantizeLinear", [f"{tensor.name}.codes", f"{tensor.name}.scales"], at, out=wide, **how)
    return wide if io is DType.F32 else graph.node("Cast", [wide], at, out=tensor.name, to=ONNX_TYPES[io])


def by_format(tensors: Iterable[GraphCodes]) -> tuple[dict[str, Any], ...]:
    """Weights by how they are stored, for the contract."""
    forms: dict[tuple[int, int, bool, bool], list[str]] = {}
    for tensor in tensors:
        form = tensor.form
        forms.setdefault((form.bits, form.block, form.symmetric, form.floats), []).append(tensor.name)
    return tuple(
        {"bits": bits, "block": block, "symmetric": symmetric, "weights": names}
        | ({"type": FLOAT_CODES} if floats else {})
        for (bits, block, symmetric, floats), names in forms.items()
    )


def coded_values(
    graph: Graph, tensor: GraphCodes, io: DType, at: str, *, flat: bool = False, sizes: tuple[int, ...] = ()
) -> list[str]:
    """Codes, scales in the graph's type, zero points.

    With `flat` the codes of a row have no blocks; `sizes` are those of the rows, which then have none either.
    """
    names = []
    for number, part in enumerate(tensor.parts):
        ending = ("codes", "scales", "zero_points")[number]
        name, shape = f"{tensor.name}.{ending}", part.shape
        if flat and number == 0:
            name, shape = f"{tensor.name}.rows", (part.shape[0], part.shape[1] * part.shape[2])
        if sizes:
            shape = (*sizes, math.prod(part.shape[1:]))
        if part.dtype is not DType.U8 and part.dtype is not io:
            stored = f"{name}.{part.dtype.label.lower()}"
            known = graph.is_initializer(stored)
            graph.external(stored, part.dtype, part.offset, part.path.name, shape, part.nbytes)
            if not known:
                graph.node("Cast", [stored], at, out=name, to=ONNX_TYPES[io])
        else:
            graph.external(name, part.dtype, part.offset, part.path.name, shape, part.nbytes)
        names.append(name)
    return names
