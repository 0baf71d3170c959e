# SPDX-License-Identifier: Apache-2.0
"""Operators that hold weights as codes: MatMulNBits, GatherBlockQuantized, DequantizeLinear, MatMulInteger."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from surgery.onnx.locate.coded_matrix import CodedMatrix, PackedCodes, unpacked
from surgery_formats.arrays import cast
from surgery_formats.containers.onnx import OnnxGraph
from surgery_formats.dtypes import DType
from surgery_formats.errors import MalformedError
from surgery_formats.tensors.tensor import StoredTensor

if TYPE_CHECKING:
    import numpy
    import onnx

__all__ = ["coded_matrices"]

_PACKED = {"UINT4": (4, False), "INT4": (4, True), "UINT2": (2, False), "INT2": (2, True)}
_BYTES = {DType.U8: False, DType.I8: True}
_FLOATS = (DType.F32, DType.F16, DType.BF16)
_FLOAT32 = 1  # TensorProto.FLOAT
_Codes = tuple[StoredTensor, int, bool, tuple[int, ...]]
"""A tensor of codes: where it lies, bits and sign of each, and the shape of what they stand for."""
_Values = tuple["numpy.ndarray", DType, StoredTensor | None]
"""Numbers beside codes: float32 and flat, the type they are stored in, and where."""


def coded_matrices(graph: OnnxGraph) -> Iterator[tuple[str, tuple[CodedMatrix, ...]]]:
    """Every tensor of codes with the matrix of its values; of a stack, its matrices.

    Raises:
        MalformedError: an operator's codes and scales do not fit each other.
    """
    seen: set[str] = set()
    readers: dict[str, set[str]] = {}  # of scales: the codes beside them
    widened = _widened(graph)
    nodes = [_from_files(node, widened) for node in graph.proto.graph.node]
    for node in nodes:
        for name in node.input[1:3] if node.op_type in _READERS else ():
            readers.setdefault(name, set()).add(node.input[1 if node.op_type == "MatMulNBits" else 0])
    for node in nodes:
        read = _READERS.get(node.op_type)
        if read is None or len(node.input) < 2:
            continue
        for matrix in read(graph, node):
            if matrix.name not in seen:
                seen.add(matrix.name)
                shared = matrix.scales is not None and len(readers.get(matrix.scales.name, ())) > 1
                yield matrix.name, (replace(matrix, scales=None) if shared else matrix,)


def _widened(graph: OnnxGraph) -> Mapping[str, str]:
    """Tensors of 16 bits by the values of float32 that a Cast makes of them, which are the same numbers."""
    return {
        node.output[0]: node.input[0]
        for node in graph.proto.graph.node
        if node.op_type == "Cast" and _attributes(node).get("to") == _FLOAT32
        if (tensor := graph.tensors.get(node.input[0])) is not None and tensor.dtype in _FLOATS
    }


def _from_files(node: onnx.NodeProto, widened: Mapping[str, str]) -> onnx.NodeProto:
    """The node as if it read what is stored."""
    if node.op_type not in _READERS or not any(name in widened for name in node.input):
        return node
    straight = type(node)()
    straight.CopyFrom(node)
    straight.input[:] = [widened.get(name, name) for name in node.input]
    return straight


def _attributes(node: onnx.NodeProto) -> Mapping[str, Any]:
    return {attribute.name: attribute.i for attribute in node.attribute}


def _values(graph: OnnxGraph, name: str) -> _Values | None:
    """A tensor of numbers whole, float32 and flat, with its type and place; None if the graph has none of the name."""
    import numpy

    tensor = graph.tensors.get(name)
    if tensor is not None:
        if tensor.packed_as in _PACKED:
            bits, signed = _PACKED[tensor.packed_as]
            count = math.prod(graph.shapes[name])
            return (
                PackedCodes(tensor, bits, signed, 1, count, running=True).read(0, 1).reshape(-1).astype("f4"),
                DType.I8,
                tensor,
            )
        return cast(tensor.read(), DType.F32).reshape(-1), tensor.dtype, tensor
    if name in graph.small:
        values = numpy.asarray(graph.small[name])
        return values.astype(numpy.float32).reshape(-1), DType.F32, None
    return None


def _input(node: onnx.NodeProto, index: int) -> str:
    return node.input[index] if index < len(node.input) else ""


def _matmul_nbits(graph: OnnxGraph, node: onnx.NodeProto) -> Iterator[CodedMatrix]:
    said = _attributes(node)
    bits, size, rows, cols = said.get("bits", 4), said.get("block_size", 0), said.get("N", 0), said.get("K", 0)
    tensor, scales = graph.tensors.get(_input(node, 1)), _values(graph, _input(node, 2))
    if tensor is None or scales is None or bits not in (2, 4, 8) or min(size, rows, cols) < 1 or _input(node, 4):
        return
    blocks = -(-cols // size)
    codes = PackedCodes(tensor, bits, False, rows, blocks * size)
    if tensor.nbytes != rows * blocks * size * bits // 8 or len(scales[0]) != rows * blocks:
        raise MalformedError(
            f"MatMulNBits of {rows} x {cols} has other codes or scales", file=graph.path, tensor=tensor.name
        )
    zeros = _byte_zeros(graph, _input(node, 3), bits, rows, blocks)
    label = f"MatMulNBits int{bits}, blocks of {size}"
    yield _coded(tensor.name, label, codes, cols, (1, size), scales, (rows, blocks), zeros)


def _byte_zeros(graph: OnnxGraph, name: str, bits: int, rows: int, blocks: int) -> numpy.ndarray:
    """Zero points of MatMulNBits: in bytes, each row begun anew; as numbers; or half of the range."""
    import numpy

    half = numpy.full((rows, blocks), 1 << bits - 1, numpy.float32)
    if not name:
        return half
    tensor, values = graph.tensors.get(name), _values(graph, name)
    if values is None:
        raise MalformedError("its zero points are no initializer", file=graph.path, tensor=name)
    if tensor is not None and tensor.dtype is DType.U8:
        return unpacked(tensor.read().reshape(-1), bits).reshape(rows, -1)[:, :blocks].astype(numpy.float32)
    if len(values[0]) == rows * blocks:
        return values[0].reshape(rows, blocks)
    raise MalformedError(f"{len(values[0])} zero points for {rows} x {blocks} blocks", file=graph.path, tensor=name)


def _coded(
    name: str,
    label: str,
    codes: PackedCodes,
    cols: int,
    tile: tuple[int, int],
    scales: _Values,
    grid: tuple[int, int],
    zeros: numpy.ndarray | None,
) -> CodedMatrix:
    values, dtype, place = scales
    kept = None if zeros is None or not zeros.any() else zeros.reshape(grid)
    return CodedMatrix(name, label, codes, cols, tile, place, values.reshape(grid), kept, dtype)


def _codes_of(graph: OnnxGraph, name: str, bits: int = 0) -> _Codes | None:
    """The tensor of codes of a name; None if it holds none."""
    tensor = graph.tensors.get(name)
    if tensor is None:
        return None
    shape = graph.shapes[name]
    if tensor.packed_as in _PACKED:
        return tensor, *_PACKED[tensor.packed_as], shape
    if tensor.dtype in _BYTES and not tensor.packed_as:
        if bits in (2, 4):  # several codes in a byte
            return tensor, bits, False, (*shape[:-1], shape[-1] * 8 // bits)
        return tensor, 8, _BYTES[tensor.dtype], shape
    return None


def _gather_blocks(graph: OnnxGraph, node: onnx.NodeProto) -> Iterator[CodedMatrix]:
    said = _attributes(node)
    size, bits = said.get("block_size", 128), said.get("bits", 4)
    found, scales = _codes_of(graph, _input(node, 0), bits), _values(graph, _input(node, 2))
    if found is None or scales is None or said.get("gather_axis", 0) != 0:
        return
    tensor, bits, signed, shape = found
    if len(shape) != 2 or said.get("quantize_axis", 1) not in (1, -1) or size < 1:
        return
    rows, cols = shape
    blocks = -(-cols // size)
    if len(scales[0]) != rows * blocks:
        raise MalformedError(
            f"{len(scales[0])} scales for {rows} x {blocks} blocks", file=graph.path, tensor=tensor.name
        )
    zeros = _same_zeros(graph, _input(node, 3), bits, rows, blocks, tensor.dtype is DType.U8 and not tensor.packed_as)
    codes = PackedCodes(tensor, bits, signed, rows, cols, running=bool(tensor.packed_as))
    label = f"GatherBlockQuantized {'int' if signed else 'uint'}{bits}, blocks of {size}"
    yield _coded(tensor.name, label, codes, cols, (1, size), scales, (rows, blocks), zeros)


def _same_zeros(graph: OnnxGraph, name: str, bits: int, rows: int, blocks: int, in_bytes: bool) -> numpy.ndarray | None:
    """Zero points stored as the codes are; without them half of the range of codes in bytes, else 0."""
    import numpy

    if in_bytes:
        return _byte_zeros(graph, name, bits, rows, blocks)
    values = _values(graph, name) if name else None
    return None if values is None else numpy.ascontiguousarray(values[0][: rows * blocks])


def _dequantize(graph: OnnxGraph, node: onnx.NodeProto) -> Iterator[CodedMatrix]:
    said = _attributes(node)
    found, scales = _codes_of(graph, _input(node, 0)), _values(graph, _input(node, 1))
    if found is None or scales is None or scales[1] not in _FLOATS:
        return
    zeros = _values(graph, _input(node, 2)) if _input(node, 2) else None
    yield from _tiled(found, scales, zeros, said.get("axis", 1), said.get("block_size", 0), "DequantizeLinear")


def _matmul_integer(graph: OnnxGraph, node: onnx.NodeProto) -> Iterator[CodedMatrix]:
    """Codes that a product of integers reads."""
    if (own := _dynamic(graph, _input(node, 1))) is not None:
        zeros = _values(graph, _input(node, 3)) if _input(node, 3) else None
        yield from _tiled(own[0], own[1], zeros, 1, 0, node.op_type)


def _gather(graph: OnnxGraph, node: onnx.NodeProto) -> Iterator[CodedMatrix]:
    """Rows of codes that are dequantised once they are gathered."""
    if (own := _dynamic(graph, _input(node, 0))) is not None:
        yield from _tiled(own[0], own[1], _values(graph, f"{own[2]}_zero_point"), 0, 0, "Gather")


def _dynamic(graph: OnnxGraph, name: str) -> tuple[_Codes, _Values, str] | None:
    """Codes, scales and NAME of what onnxruntime's dynamic quantisation makes: ``NAME_quantized``, ``NAME_scale``."""
    stem = name.removesuffix("_quantized")
    codes, scales = _codes_of(graph, name), _values(graph, f"{stem}_scale")
    return None if codes is None or scales is None or stem == name else (codes, scales, stem)


def _tiled(
    found: _Codes,
    scales: _Values,
    zeros: _Values | None,
    axis: int,
    size: int,
    operator: str,
) -> Iterator[CodedMatrix]:
    """A tensor with a scale for all, for each position of an axis, or for blocks along an axis."""
    tensor, bits, signed, shape = found
    if len(shape) < 2 or math.prod(shape) < 2:
        return
    rows, cols = shape[0], math.prod(shape[1:])
    axis = axis % len(shape)
    count = len(scales[0])
    if count == 1:
        tile, what = (rows, cols), "one scale"
    elif size and axis == len(shape) - 1 and len(shape) == 2:
        tile, what = (1, size), f"blocks of {size}"
    elif size and axis == 0 and len(shape) == 2:
        tile, what = (size, 1), f"blocks of {size}"
    elif not size and axis == 0 and count == rows:
        tile, what = (1, cols), "a scale for each row"
    elif not size and axis == 1 and len(shape) == 2 and count == cols:
        tile, what = (rows, 1), "a scale for each column"
    else:
        return
    grid = (-(-rows // tile[0]), -(-cols // tile[1]))
    if grid[0] * grid[1] != count or (zeros is not None and len(zeros[0]) not in (1, count)):
        return
    codes = PackedCodes(tensor, bits, signed, rows, cols, running=bool(tensor.packed_as))
    label = f"{operator} {'int' if signed else 'uint'}{bits}, {what}"
    import numpy

    points = None if zeros is None else numpy.broadcast_to(zeros[0], (count,)).copy()
    yield _coded(tensor.name, label, codes, cols, tile, scales, grid, points)


_READERS = {
    "MatMulNBits": _matmul_nbits,
    "GatherBlockQuantized": _gather_blocks,
    "DequantizeLinear": _dequantize,
    "MatMulInteger": _matmul_integer,
    "Gather": _gather,
    "ConvInteger": _matmul_integer,
}
