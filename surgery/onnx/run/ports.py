# SPDX-License-Identifier: Apache-2.0
"""A session: names, types and shapes of its inputs and outputs, its runs, and their values as arrays."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from surgery.onnx.run.conversions import converted_nbytes, with_late_conversions
from surgery.onnx.run.runtime import load_runtime
from surgery_formats.errors import FitError
from surgery_formats.text import show

if TYPE_CHECKING:
    import onnx

__all__ = ["Port", "as_array", "bind_number", "cpu_session", "element", "execute", "ports", "run_options"]

_HELD = 2 << 30
_CONVERT_AT_LOAD = ("ConstantFolding", "FuseFp16InitializerToFp32NodeTransformer")
"""Optimizers of onnxruntime. The second, without the first, fails where a converted weight is read in a branch (onnxruntime 1.31)."""
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


def cpu_session(model: onnx.ModelProto, folder: Path, held: int = _HELD) -> Any:
    """A session on the CPU; onnxruntime's own errors are raised.

    Args:
        model: The graph.
        folder: Of its weight files, which stay mapped.
        held: Bytes that weights which are computed with in another type than they are stored in may take, converted once. More
            are converted in every run, where each is used: the largest takes memory then, and not all.
    """
    onnxruntime = load_runtime()

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # failures are raised, so they need not be logged too
    options.add_session_config_entry("session.disable_prepacking", "1")
    options.add_session_config_entry(
        "session.model_external_initializers_file_folder_path", os.fspath(folder.resolve())
    )
    unused: Sequence[str] = ()
    if converted_nbytes(model) > held:
        model, unused = with_late_conversions(model), _CONVERT_AT_LOAD
        # in the order of the nodes, where it is free
        options.execution_order = onnxruntime.ExecutionOrder.PRIORITY_BASED
        options.enable_cpu_mem_arena = options.enable_mem_pattern = False  # which keep what was converted
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"], disabled_optimizers=list(unused)
    )


def bind_number(binding: Any, name: str, number: int) -> None:
    """Bind a scalar input, int64, of the host's memory; it may be one with a default, of which `bind_cpu_input` knows nothing."""
    onnxruntime = load_runtime()

    binding.bind_ortvalue_input(name, onnxruntime.OrtValue.ortvalue_from_numpy(np.array(number, np.int64)))


def execute(session: Any, binding: Any, options: Any) -> None:
    """Run the session with its binding.

    Raises:
        FitError: onnxruntime fails; some requirements of kernels show only at run time.
    """
    try:
        session.run_with_iobinding(binding, options)
    except Exception as error:  # onnxruntime's own types and RuntimeError
        raise FitError(f"onnxruntime cannot run the graph: {show(error, 500)}") from error


def as_array(value: Any, port: Port) -> npt.NDArray[Any]:
    """Return a value on the cpu as an array, including types that numpy itself lacks."""
    shape = tuple(value.shape())
    nbytes = port.dtype.itemsize * int(np.prod(shape))
    raw = ctypes.string_at(value.data_ptr(), nbytes) if nbytes else b""
    return np.frombuffer(raw, port.dtype).reshape(shape)


def run_options(number: int = -1) -> Any:
    """Options of a run without a CUDA graph; with a `number`, of runs captured as that graph once, and then replayed."""
    onnxruntime = load_runtime()

    options = onnxruntime.RunOptions()
    options.add_run_config_entry("gpu_graph_id", str(number))
    return options
