# SPDX-License-Identifier: Apache-2.0
"""Options of a run, and access to values of onnxruntime."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import numpy.typing as npt

from surgery.onnx.run.ports import Port
from surgery_formats.errors import FitError
from surgery_formats.text import show

__all__ = ["as_array", "execute", "run_options"]


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
    import onnxruntime

    options = onnxruntime.RunOptions()
    options.add_run_config_entry("gpu_graph_id", str(number))
    return options
