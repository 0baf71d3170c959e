# SPDX-License-Identifier: Apache-2.0
"""A graph's matrix of codes as a storage: the engine reads it by rows, and writes codes and scales again."""

from __future__ import annotations

import math
from dataclasses import dataclass

from surgery.onnx.locate.coded_matrix import CodedMatrix
from surgery_formats.arrays import Array, to_cpu
from surgery_formats.dtypes import DType
from surgery_formats.storage.base import PartBytes, StoredPart
from surgery_formats.tensors.tensor import StoredTensor

__all__ = ["CodedWeight"]


@dataclass(frozen=True, eq=False)
class CodedWeight:
    """Codes and scales of a graph.

    Attributes:
        matrix: Both.
    """

    matrix: CodedMatrix

    dtype = DType.F32
    elements = None
    is_float = True
    transposed = False

    @property
    def name(self) -> str:
        """Of the tensor of codes."""
        return self.matrix.name

    @property
    def sizes(self) -> tuple[int, ...]:
        """Of the matrix."""
        return self.shape

    @property
    def shape(self) -> tuple[int, int]:
        """Of the matrix."""
        return self.matrix.rows, self.matrix.cols

    @property
    def kind(self) -> str:
        """In words."""
        return self.matrix.label

    @property
    def group(self) -> int:
        """Rows that share a scale, and begin and end at whole bytes."""
        return math.lcm(self.matrix.tile[0], self.matrix.codes.step)

    @property
    def sources(self) -> tuple[StoredTensor, ...]:
        """Codes, and scales if they have a place."""
        scales = self.matrix.scales
        return (self.matrix.codes.tensor, *(() if scales is None else (scales,)))

    def parts(self, name: str) -> tuple[StoredPart, ...]:
        """As they are: the graph's names do not change."""
        return tuple(StoredPart(tensor.name, tensor.dtype, tensor.shape) for tensor in self.sources)

    def read_into(self, block: Array, start: int) -> None:
        """See `Storage.read_into`."""
        block[...] = self.matrix.block(start, start + len(block))

    def put(self, start: int, block: Array, rounded: Array) -> tuple[PartBytes, ...]:
        """See `Encoding.put`."""
        matrix = self.matrix
        codes, scales, values = matrix.chosen(start, to_cpu(block))
        rounded[...] = values
        raw = matrix.code_bytes(start, codes)
        at = matrix.codes.byte_of(start)
        written = [PartBytes(0, at, memoryview(raw))]
        if matrix.scales is not None:
            first = start // matrix.tile[0] * matrix.scale_values.shape[1]
            written.append(PartBytes(1, matrix.scale_dtype.nbytes(first), memoryview(matrix.scale_bytes(scales))))
        return tuple(written)
