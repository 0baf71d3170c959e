# SPDX-License-Identifier: Apache-2.0
"""Inputs and outputs of a session: name, type, shape; and how bytes of such a type are seen by numpy."""

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
        name: In the graph.
        element: Number of its type in ONNX.
        dtype: Of numpy.
        shape: Sizes; names or None where they are free.
    """

    name: str
    element: int
    dtype: np.dtype[Any]
    shape: tuple[int | str | None, ...]


def element(dtype: np.dtype[Any]) -> int:
    """ONNX's number of a numpy type.

    Raises:
        FitError: it has none here.
    """
    if dtype not in _ELEMENTS:
        raise FitError(f"arrays of {dtype} are not known to the runner")
    return _ELEMENTS[dtype]


def ports(nodes: Iterable[Any]) -> dict[str, Port]:
    """By name.

    Raises:
        FitError: a type that the runner does not know.
    """
    found = {}
    for node in nodes:
        if node.type not in _TYPES:
            raise FitError(f"'{show(node.name)}' is a {show(node.type)}, which the runner does not know")
        number, kind = _TYPES[node.type]
        found[node.name] = Port(node.name, number, np.dtype(kind), tuple(node.shape))
    return found
