# SPDX-License-Identifier: Apache-2.0
"""Inputs and outputs of a session: name, type, shape, and the numpy view of their bytes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from surgery_formats.errors import FitError
from surgery_formats.text import show

__all__ = ["Port", "element", "ports"]

_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
# onnx.proto3, TensorProto.DataType, under onnxruntime's names
_TYPES: dict[str, tuple[int, Any]] = {
    "tensor(float)": (1, np.float32),
    "tensor(int32)": (6, np.int32),
    "tensor(int64)": (7, np.int64),
    "tensor(bool)": (9, np.bool_),
    "tensor(float16)": (10, np.float16),
    "tensor(double)": (11, np.float64),
    "tensor(bfloat16)": (16, _BFLOAT16),
    "tensor(int8)": (3, np.int8),
    "tensor(uint8)": (2, np.uint8),
}
_ELEMENTS = {np.dtype(kind): number for number, kind in _TYPES.values()}


@dataclass(frozen=True, slots=True)
class Port:
    """An input or output.

    Attributes:
        name: Name in the graph.
        element: ONNX's number of its type.
        dtype: Numpy's type.
        shape: Sizes; a name or None for a free one.
    """

    name: str
    element: int
    dtype: np.dtype[Any]
    shape: tuple[int | str | None, ...]


def element(dtype: np.dtype[Any]) -> int:
    """Return ONNX's number of a numpy type.

    Raises:
        FitError: the type is not supported.
    """
    if dtype not in _ELEMENTS:
        raise FitError(f"the runner does not support arrays of {dtype}")
    return _ELEMENTS[dtype]


def ports(nodes: Iterable[Any]) -> dict[str, Port]:
    """Describe nodes, by name.

    Raises:
        FitError: a type that the runner does not support.
    """
    result = {}
    for node in nodes:
        if node.type not in _TYPES:
            raise FitError(f"'{show(node.name)}' is a {show(node.type)}, which the runner does not support")
        number, kind = _TYPES[node.type]
        result[node.name] = Port(node.name, number, np.dtype(kind), tuple(node.shape))
    return result
