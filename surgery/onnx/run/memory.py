# SPDX-License-Identifier: Apache-2.0
"""Memory that a session's inputs and outputs are bound to by address: of the host here, of a CUDA device in `cudart`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

__all__ = ["Buffer", "DeviceScratch", "HostMemory", "Memory", "raw"]

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True, eq=False)
class Buffer:
    """Bytes at a fixed address, zero at first.

    Attributes:
        address: Of the first byte, on its device.
        nbytes: How many.
        owner: Frees them when it goes.
    """

    address: int
    nbytes: int
    owner: Any = field(repr=False)


class Memory(Protocol):
    """Where buffers lie. Copies are in order with the runs of a session on the same memory."""

    @property
    def device(self) -> str:
        """``cpu`` or ``cuda``, as onnxruntime names it."""

    @property
    def index(self) -> int:
        """Of the device."""

    @property
    def stream(self) -> int:
        """Address of the stream that runs and copies are in order on; 0 where there is none."""

    def allocate(self, nbytes: int) -> Buffer:
        """`nbytes` zeros."""

    def write(self, buffer: Buffer, values: npt.NDArray[Any], offset: int = 0) -> None:
        """Copy `values` to byte `offset` of `buffer`."""

    def read(self, address: int, nbytes: int) -> Bytes:
        """A copy of `nbytes` bytes at `address`, once everything before is done."""


def raw(values: npt.NDArray[Any]) -> Bytes:
    """The bytes of an array, as an array."""
    return np.ascontiguousarray(values).reshape(-1).view(np.uint8)


class HostMemory:
    """Memory of this process."""

    device = "cpu"
    index = 0
    stream = 0

    def allocate(self, nbytes: int) -> Buffer:
        """`nbytes` zeros, which take no memory until they are touched."""
        owner = np.zeros(max(nbytes, 1), np.uint8)
        return Buffer(owner.ctypes.data, nbytes, owner)

    def write(self, buffer: Buffer, values: npt.NDArray[Any], offset: int = 0) -> None:
        """Copy `values` to byte `offset` of `buffer`."""
        source = raw(values)
        if offset < 0 or offset + source.size > buffer.nbytes:
            raise IndexError("behind the end of a buffer")
        buffer.owner[offset : offset + source.size] = source

    def read(self, address: int, nbytes: int) -> Bytes:
        """A copy of `nbytes` bytes at `address`."""
        import ctypes

        return np.frombuffer(ctypes.string_at(address, nbytes), np.uint8)


class DeviceScratch:
    """Named buffers that are kept and only grow: what a prefill needs, whatever its length was before."""

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self._kept: dict[str, Buffer] = {}

    def get(self, name: str, nbytes: int) -> Buffer:
        """At least `nbytes` bytes under `name`; what they held is not kept."""
        found = self._kept.get(name)
        if found is None or found.nbytes < nbytes:
            self._kept.pop(name, None)  # freed before the larger one is made
            found = self._kept[name] = self._memory.allocate(nbytes)
        return found
