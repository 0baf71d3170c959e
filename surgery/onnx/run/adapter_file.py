# SPDX-License-Identifier: Apache-2.0
"""``.onnx_adapter`` files: named arrays that replace inputs with a default, used for LoRA factors and soft prompts.

The container is that of `surgery_formats.containers.onnx_adapter`, by which such files are read. They are written by onnxruntime, which
keeps only the addresses of the arrays: if they are freed too early, it silently writes garbage. So they are kept alive here, and
the file is read back by the other reader.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from surgery.onnx.run.ports import element
from surgery.onnx.run.runtime import load_runtime
from surgery_formats.containers.onnx_adapter import LIMIT, open_onnx_adapter
from surgery_formats.errors import FitError, ProofError
from surgery_formats.files.raw import memory_file

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
    contiguous = _writable(arrays, path)
    with open(path, "xb"):
        pass  # reserves the name: onnxruntime itself would overwrite an existing file
    _export(path, contiguous)
    return Path(path).stat().st_size


def _writable(arrays: Mapping[str, Array], path: str | os.PathLike[str]) -> dict[str, Array]:
    if not arrays:
        raise FitError("the adapter has no arrays", file=path)
    contiguous = {name: np.ascontiguousarray(arrays[name]) for name in sorted(arrays)}
    for array in contiguous.values():
        element(array.dtype)
    if sum(array.nbytes + len(name.encode()) + 256 for name, array in contiguous.items()) > LIMIT:
        raise FitError("more than 2 GB do not fit into an .onnx_adapter file", file=path)
    return contiguous


def _export(path: str | os.PathLike[str], contiguous: Mapping[str, Array]) -> None:
    """Let onnxruntime write arrays, which live until it has, and read them back."""
    onnxruntime = load_runtime()

    values = {}
    for name, array in contiguous.items():
        raw = array.view(np.uint16) if array.dtype.name == "bfloat16" else array
        value = onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(raw, element(array.dtype))
        values[name] = value
    writer = onnxruntime.AdapterFormat()
    writer.set_adapter_version(1)
    writer.set_model_version(1)
    writer.set_parameters(values)
    writer.export_adapter(os.fspath(path))
    written = open_onnx_adapter(path).tensors
    if [tensor.name for tensor in written] != list(contiguous):
        raise ProofError("the adapter read back has other names than were written", file=path)
    for tensor in written:  # one at a time: all of them would be held twice
        array, copy = contiguous[tensor.name], np.asarray(tensor.read())
        if copy.dtype != array.dtype or copy.shape != array.shape or copy.tobytes() != array.tobytes():
            raise ProofError("the array read back differs from what was written", file=path, tensor=tensor.name)


def adapter_bytes(arrays: Mapping[str, Array]) -> bytes:
    """The bytes of an ``.onnx_adapter`` file with `arrays`, see `write_adapter_file`."""
    contiguous = _writable(arrays, "adapter.onnx_adapter")
    fd = memory_file()  # a temporary folder may be full, and a killed run would leave what it holds
    try:
        _export(f"/dev/fd/{fd}", contiguous)
        with open(fd, "rb", closefd=False) as file:
            file.seek(0)  # where /dev/fd/N is the same open file, writing has moved its position
            return file.read()
    finally:
        os.close(fd)


def read_adapter_file(path: str | os.PathLike[str]) -> dict[str, Array]:
    """Read the arrays of an ``.onnx_adapter`` file, in file order.

    Raises:
        NotFoundError: no such file.
        MalformedError: not such a file, an offset outside the file, sizes that do not fit, or a repeated name.
    """
    return {tensor.name: np.asarray(tensor.read()) for tensor in open_onnx_adapter(path).tensors}
