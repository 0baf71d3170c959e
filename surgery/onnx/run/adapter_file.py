# SPDX-License-Identifier: Apache-2.0
"""``.onnx_adapter`` files: named arrays that replace inputs with a default, used for LoRA factors and soft prompts.

The container is that of `surgery_formats.containers.onnx_adapter`, by which such files are read. They are written by onnxruntime, which
keeps only the addresses of the arrays: if they are freed too early, it silently writes garbage. So they are kept alive here, and
the file is read back by the other reader.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from surgery.onnx.run.ports import element
from surgery_formats.containers.onnx_adapter import LIMIT, open_onnx_adapter
from surgery_formats.errors import FitError, ProofError

__all__ = ["adapter_bytes", "read_adapter_file", "write_adapter_file"]

Array = npt.NDArray[Any]


def write_adapter_file(path: str | os.PathLike[str], arrays: Mapping[str, Array]) -> int:
    """Write `arrays`, by the name of the input they replace, to the new file `path`, and read them back; returns the bytes written.

    The file is written in place; write it to a staging folder to make it appear atomically.

    Raises:
        FitError: no arrays, a type that ONNX lacks, or more data than a flatbuffer holds.
        FileExistsError: the file exists.
        ProofError: the arrays read back differ.
    """
    import onnxruntime

    if not arrays:
        raise FitError("the adapter has no arrays", file=path)
    contiguous = {
        name: np.ascontiguousarray(arrays[name]) for name in sorted(arrays)
    }  # alive until the file is written
    if sum(array.nbytes + len(name.encode()) + 256 for name, array in contiguous.items()) > LIMIT:
        raise FitError("more than 2 GB do not fit into an .onnx_adapter file", file=path)
    values = {}
    for name, array in contiguous.items():
        raw = array.view(np.uint16) if array.dtype.name == "bfloat16" else array
        value = onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(raw, element(array.dtype))
        values[name] = value
    writer = onnxruntime.AdapterFormat()
    writer.set_adapter_version(1)
    writer.set_model_version(1)
    writer.set_parameters(values)
    with open(path, "xb"):
        pass  # reserves the name: onnxruntime itself would overwrite an existing file
    writer.export_adapter(os.fspath(path))
    written = read_adapter_file(path)
    if list(written) != list(contiguous):
        raise ProofError("the adapter read back has other names than were written", file=path)
    for name, array in contiguous.items():
        copy = written[name]
        if copy.dtype != array.dtype or copy.shape != array.shape or copy.tobytes() != array.tobytes():
            raise ProofError("the array read back differs from what was written", file=path, tensor=name)
    return Path(path).stat().st_size


def adapter_bytes(arrays: Mapping[str, Array]) -> bytes:
    """The bytes of an ``.onnx_adapter`` file with `arrays`, see `write_adapter_file`."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "adapter.onnx_adapter"
        write_adapter_file(path, arrays)
        return path.read_bytes()


def read_adapter_file(path: str | os.PathLike[str]) -> dict[str, Array]:
    """Read the arrays of an ``.onnx_adapter`` file, in file order.

    Raises:
        NotFoundError: no such file.
        MalformedError: not such a file, an offset outside the file, sizes that do not fit, or a repeated name.
    """
    return {tensor.name: np.asarray(tensor.read()) for tensor in open_onnx_adapter(path).tensors}
