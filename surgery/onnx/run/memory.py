# SPDX-License-Identifier: Apache-2.0
"""Memory bound by address to a session's inputs and outputs: host memory here, CUDA memory in `cudart`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

__all__ = ["Buffer", "DeviceScratch", "HostMemory", "Memory", "placed", "raw"]

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True, eq=False)
class Buffer:
    """Bytes at a fixed address, initially zero.

    Attributes:
        address: Address of the first byte on its device.
        nbytes: Size in bytes.
        owner: Frees the memory when it is released.
    """

    address: int
    nbytes: int
    owner: Any = field(repr=False)


class Memory(Protocol):
    """A place for buffers. Copies are in order with the runs of a session on the same memory."""

    @property
    def device(self) -> str:
        """``cpu`` or ``cuda``, as onnxruntime names it."""

    @property
    def index(self) -> int:
        """Index of the device."""

    @property
    def stream(self) -> int:
        """Address of the stream that orders runs and copies; 0 for none."""

    def allocate(self, nbytes: int) -> Buffer:
        """Allocate `nbytes` zeros."""

    def write(self, buffer: Buffer, values: npt.NDArray[Any], offset: int = 0) -> None:
        """Copy `values` to byte `offset` of `buffer`."""

    def read(self, address: int, nbytes: int) -> Bytes:
        """Copy `nbytes` bytes at `address` to the host, after all earlier work."""


def raw(values: npt.NDArray[Any]) -> Bytes:
    """The bytes of an array, as an array."""
    return np.ascontiguousarray(values).reshape(-1).view(np.uint8)


def placed(memory: Memory, values: npt.NDArray[Any]) -> Buffer:
    """A new buffer that holds `values`."""
    buffer = memory.allocate(values.nbytes)
    memory.write(buffer, values)
    return buffer


class HostMemory:
    """Host memory."""

    device = "cpu"
    index = 0
    stream = 0

    def allocate(self, nbytes: int) -> Buffer:
        """Allocate `nbytes` zeros, which use no memory until they are touched."""
        owner = np.zeros(max(nbytes, 1), np.uint8)
        return Buffer(owner.ctypes.data, nbytes, owner)

    def write(self, buffer: Buffer, values: npt.NDArray[Any], offset: int = 0) -> None:
        """Copy `values` to byte `offset` of `buffer`."""
        source = raw(values)
        if offset < 0 or offset + source.size > buffer.nbytes:
            raise IndexError("beyond the end of the buffer")
        buffer.owner[offset : offset + source.size] = source

    def read(self, address: int, nbytes: int) -> Bytes:
        """A copy of `nbytes` bytes at `address`."""
        import ctypes

        return np.frombuffer(ctypes.string_at(address, nbytes), np.uint8)


class DeviceScratch:
    """Named buffers that are reused and only grow, for prefills of any length."""

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self._buffers: dict[str, Buffer] = {}

    def get(self, name: str, nbytes: int) -> Buffer:
        """Return at least `nbytes` bytes under `name`; their content is undefined."""
        buffer = self._buffers.get(name)
        if buffer is None or buffer.nbytes < nbytes:
            self._buffers.pop(name, None)  # free the old one before allocating the larger one
            buffer = self._buffers[name] = self._memory.allocate(nbytes)
        return buffer
