# SPDX-License-Identifier: Apache-2.0
"""``.onnx_adapter`` files: named arrays that replace inputs with a default, used for LoRA factors and soft prompts.

The container is that of `surgery_formats.containers.onnx_adapter`, laid out as onnxruntime lays it out, to the byte. onnxruntime's own
writer takes all arrays at once; here they are made one by one while the file is written, and compared with it afterwards.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from surgery_formats.containers.base import TensorSpec
from surgery_formats.containers.onnx_adapter import ELEMENTS, open_onnx_adapter
from surgery_formats.containers.onnx_adapter_layout import OnnxAdapterPlan, plan_onnx_adapter
from surgery_formats.errors import FitError, ProofError
from surgery_formats.files.output.folder import OutputFolder
from surgery_formats.tensors.tensor import as_bytes

__all__ = [
    "AdapterFile",
    "SmallFiles",
    "adapter_bytes",
    "adapter_file",
    "read_adapter_file",
    "sha256_of",
    "write_small_files",
]

Array = npt.NDArray[Any]
SmallFiles = Mapping[str, "bytes | AdapterFile"]
"""Contents of the small files of an export, by their path in the output."""
_TYPES = {dtype.numpy: dtype for dtype in ELEMENTS}


@dataclass(frozen=True)
class AdapterFile:
    """An ``.onnx_adapter`` file whose arrays are made when it is written.

    Attributes:
        plan: Where everything lies.
        specs: Name, type and shape of every array, by name.
        make: Makes the array of a name.
    """

    plan: OnnxAdapterPlan
    specs: Mapping[str, TensorSpec]
    make: Callable[[str], Array]
    _written: dict[str, bytes] = field(default_factory=dict, repr=False)

    @staticmethod
    def of(specs: Mapping[str, tuple[np.dtype[Any], tuple[int, ...]]], make: Callable[[str], Array]) -> AdapterFile:
        """The file of arrays with these types and shapes.

        Raises:
            FitError: no arrays, a type that ONNX lacks, or more data than a flatbuffer holds.
        """
        if unknown := next((dtype for dtype, _ in specs.values() if dtype not in _TYPES), None):
            raise FitError(f"an .onnx_adapter file has no arrays of {unknown}")
        tensors = {name: (name, _TYPES[dtype], shape) for name, (dtype, shape) in specs.items()}
        return AdapterFile(plan_onnx_adapter([*tensors.values()]), tensors, make)

    def __len__(self) -> int:
        return self.plan.nbytes

    def pieces(self) -> Iterator[bytes | memoryview]:
        """All bytes in order; each array is made when it is its turn.

        Raises:
            FitError: as `make`.
        """
        return self.plan.pieces(map(self._bytes_of, self.plan.ranges))

    @cached_property
    def sha256(self) -> str:
        """Of all bytes, for which every array is made once.

        Raises:
            FitError: as `make`.
        """
        state = hashlib.sha256()
        for piece in self.pieces():
            state.update(piece)
        return state.hexdigest()

    def _bytes_of(self, name: str) -> memoryview:
        array = np.ascontiguousarray(self.make(name))
        _, dtype, shape = self.specs[name]
        assert (array.dtype, array.shape) == (dtype.numpy, shape) or not shape, name
        data = as_bytes(array)
        self._written[name] = xxhash.xxh3_128_digest(data)
        return data

    def prove(self, path: str | os.PathLike[str]) -> None:
        """Read back what was written at `path`, array by array.

        Raises:
            ProofError: the arrays read back differ from those that were made.
        """
        found = {tensor.name: tensor for tensor in open_onnx_adapter(path).tensors}
        if [(tensor.name, tensor.dtype, tensor.shape) for tensor in found.values()] != sorted(self.specs.values()):
            raise ProofError("the adapter read back has other names, types or shapes than were written", file=path)
        for name, tensor in found.items():
            if xxhash.xxh3_128_digest(tensor.file.read(tensor.offset, tensor.nbytes)) != self._written[name]:
                raise ProofError("the array read back differs from what was written", file=path, tensor=name)


def adapter_file(arrays: Mapping[str, Array]) -> AdapterFile:
    """The file of arrays that are there.

    Raises:
        FitError: as `AdapterFile.of`.
    """
    return AdapterFile.of({name: (array.dtype, array.shape) for name, array in arrays.items()}, arrays.__getitem__)


def adapter_bytes(arrays: Mapping[str, Array]) -> bytes:
    """The bytes of an ``.onnx_adapter`` file with `arrays`, by the name of the input they replace.

    Raises:
        FitError: no arrays, a type that ONNX lacks, or more data than a flatbuffer holds.
    """
    return b"".join(adapter_file(arrays).pieces())


def sha256_of(data: bytes | AdapterFile) -> str:
    """Of the contents of a small file.

    Raises:
        FitError: as `AdapterFile.make`.
    """
    return data.sha256 if isinstance(data, AdapterFile) else hashlib.sha256(data).hexdigest()


def write_small_files(folder: OutputFolder, files: SmallFiles) -> None:
    """Write all of them, and read back those that are made while they are written.

    Raises:
        FitError, ResourceError: as `OutputFolder.write_made`.
        ProofError: see `AdapterFile.prove`.
    """
    for name, data in files.items():
        if isinstance(data, AdapterFile):
            folder.write_made(name, len(data), data.pieces())
            data.prove(folder.staged / name)
        else:
            folder.write_small(name, data)


def read_adapter_file(path: str | os.PathLike[str]) -> dict[str, Array]:
    """Read the arrays of an ``.onnx_adapter`` file, in file order.

    Raises:
        NotFoundError: no such file.
        MalformedError: not such a file, an offset outside the file, sizes that do not fit, or a repeated name.
    """
    return {tensor.name: np.asarray(tensor.read()) for tensor in open_onnx_adapter(path).tensors}
