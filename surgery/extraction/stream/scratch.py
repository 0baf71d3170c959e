# SPDX-License-Identifier: Apache-2.0
"""A nameless temporary file for factors, so that memory holds only the matrices being worked on."""

from __future__ import annotations

import os
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy
import xxhash

from surgery_formats.arrays import Array, cast, empty, to_cpu
from surgery_formats.dtypes import DType
from surgery_formats.errors import ResourceError
from surgery_formats.files.output.kernel_copy import write_all
from surgery_formats.files.output.output_file import output_faults
from surgery_formats.tensors.tensor import as_bytes

__all__ = ["ScratchFile", "ScratchSlot", "SlotReader", "Workspace", "digest"]


class ScratchFile:
    """Float32 matrices in a file without a name, which the kernel removes whatever happens. Any thread may use it."""

    def __init__(self, folder: Path | None) -> None:
        self._shown = folder or Path(tempfile.gettempdir())
        try:
            self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  # lives as long as this object
        except OSError as error:
            raise ResourceError(
                f"no temporary file can be made here ({error.strerror or error})", file=folder
            ) from error
        self._end = 0
        self._lock = threading.Lock()

    def put(self, values: Array) -> ScratchSlot:
        """Store a matrix."""
        matrix = numpy.ascontiguousarray(cast(to_cpu(values), DType.F32))
        raw = as_bytes(matrix)
        with self._lock:
            at, self._end = self._end, self._end + len(raw)
        with output_faults(self._shown, len(raw)):
            write_all(self._file.fileno(), raw, at)
        return ScratchSlot(self, at, (matrix.shape[0], matrix.shape[1]), digest(matrix))

    def read(self, slot: ScratchSlot) -> numpy.ndarray:
        """The matrix at `slot`, in memory of the caller's own."""
        matrix: numpy.ndarray = empty(slot.shape, DType.F32)
        raw, done = as_bytes(matrix), 0
        with output_faults(self._shown):
            while done < len(raw):
                done += os.preadv(self._file.fileno(), [raw[done:]], slot.offset + done)
        return matrix

    def close(self) -> None:
        """Delete the file."""
        self._file.close()


class SlotReader(Protocol):
    """What matrices lie in: a scratch file, or what another process has written."""

    def read(self, slot: ScratchSlot) -> numpy.ndarray:
        """The matrix at `slot`, in memory of the caller's own."""
        ...


@dataclass(frozen=True, slots=True)
class ScratchSlot:
    """Where a matrix lies.

    Attributes:
        scratch: What it lies in.
        offset: First byte.
        shape: Of the float32 matrix.
        digest: Of the values that were stored.
    """

    scratch: SlotReader
    offset: int
    shape: tuple[int, int]
    digest: str

    def read(self) -> numpy.ndarray:
        """The matrix, in memory of the caller's own."""
        return self.scratch.read(self)


def digest(values: numpy.ndarray) -> str:
    """xxh3-128 of a contiguous matrix in memory."""
    return xxhash.xxh3_128_hexdigest(as_bytes(values))


@dataclass(frozen=True, slots=True)
class Workspace:
    """Where factors are computed and kept.

    Attributes:
        scratch: Holds them until they are written.
        device: Device of SVDs.
        lanes: Number of threads that use it.
        workers: Number of threads where all arithmetic runs on the CPU.
    """

    scratch: ScratchFile
    device: str
    lanes: int
    workers: int
