# SPDX-License-Identifier: Apache-2.0
"""``.onnx_adapter`` files: named arrays that replace inputs with a default, used for LoRA factors and soft prompts.

The container is that of `surgery_formats.containers.onnx_adapter`, by which such files are read. They are written by onnxruntime, which
keeps only the addresses of the arrays: if they are freed too early, it silently writes garbage. So they are kept alive here, and
the file is read back by the other reader.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from surgery.onnx.run.ports import element
from surgery_formats.containers.onnx_adapter import LIMIT, open_onnx_adapter
from surgery_formats.errors import FitError, ProofError
from surgery_formats.files.raw import memory_file

__all__ = ["adapter_bytes", "read_adapter_file"]

Array = npt.NDArray[Any]


def adapter_bytes(arrays: Mapping[str, Array]) -> bytes:
    """The bytes of an ``.onnx_adapter`` file with `arrays`, by the name of the input they replace; they are read back.

    onnxruntime writes only to a path: it gets that of a file in memory.

    Raises:
        FitError: no arrays, a type that ONNX lacks, or more data than a flatbuffer holds.
        ProofError: the arrays read back differ.
    """
    import onnxruntime

    if not arrays:
        raise FitError("the adapter has no arrays")
    contiguous = {
        name: np.ascontiguousarray(arrays[name]) for name in sorted(arrays)
    }  # alive until the file is written
    if sum(array.nbytes + len(name.encode()) + 256 for name, array in contiguous.items()) > LIMIT:
        raise FitError("more than 2 GB do not fit into an .onnx_adapter file")
    values = {}
    for name, array in contiguous.items():
        raw = array.view(np.uint16) if array.dtype.name == "bfloat16" else array
        value = onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(raw, element(array.dtype))
        values[name] = value
    writer = onnxruntime.AdapterFormat()
    writer.set_adapter_version(1)
    writer.set_model_version(1)
    writer.set_parameters(values)
    fd = memory_file()
    try:
        path = f"/dev/fd/{fd}"
        writer.export_adapter(path)
        written = read_adapter_file(path)
        if list(written) != list(contiguous):
            raise ProofError("the adapter read back has other names than were written")
        for name, array in contiguous.items():
            copy = written[name]
            if copy.dtype != array.dtype or copy.shape != array.shape or copy.tobytes() != array.tobytes():
                raise ProofError("the array read back differs from what was written", tensor=name)
        with open(path, "rb") as file:
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
