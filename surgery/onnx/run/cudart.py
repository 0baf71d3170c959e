# SPDX-License-Identifier: Apache-2.0
"""Device memory through the CUDA runtime that onnxruntime itself has loaded, by ctypes: no torch, no other package.

Functions and their meaning: CUDA Runtime API, "Memory Management", "Stream Management". One stream is made, and given to the session as
``user_compute_stream``, so that copies and runs are in order without waiting for each other.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import sys
import time
import weakref
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from surgery.onnx.run.memory import Buffer, Bytes, raw
from surgery_formats.errors import FitError, ResourceError, SurgeryError

__all__ = ["INSTALL", "CudaMemory", "copy_bandwidth", "device_count", "used"]

INSTALL = "pip install 'onnxruntime-gpu[cuda,cudnn]', or run on the cpu"
_SONAMES = ("libcudart.so.13", "libcudart.so.12")
_TO_DEVICE, _TO_HOST, _ON_DEVICE = 1, 2, 3
_OUT_OF_MEMORY = 2
_NON_BLOCKING = 1

_SIGNATURES = {
    "cudaGetDeviceCount": (ctypes.POINTER(ctypes.c_int),),
    "cudaSetDevice": (ctypes.c_int,),
    "cudaMalloc": (ctypes.POINTER(ctypes.c_void_p), ctypes.c_size_t),
    "cudaFree": (ctypes.c_void_p,),
    "cudaMemsetAsync": (ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t, ctypes.c_void_p),
    "cudaMemcpyAsync": (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p),
    "cudaStreamCreateWithFlags": (ctypes.POINTER(ctypes.c_void_p), ctypes.c_uint),
    "cudaStreamSynchronize": (ctypes.c_void_p,),
    "cudaMemGetInfo": (ctypes.POINTER(ctypes.c_size_t), ctypes.POINTER(ctypes.c_size_t)),
}


@cache
def _preloaded() -> str:
    """Let onnxruntime load what it needs from the folders of the nvidia packages, or of torch; what it printed meanwhile."""
    import onnxruntime

    said = io.StringIO()
    if hasattr(onnxruntime, "preload_dlls"):
        with contextlib.redirect_stdout(said):
            onnxruntime.preload_dlls()
    return said.getvalue()


@cache
def _library() -> Any | None:
    """The CUDA runtime; None where there is none."""
    if not sys.platform.startswith("linux"):
        return None
    _preloaded()
    for name in _SONAMES:
        try:
            found = ctypes.CDLL(name)
        except OSError:
            continue
        for function, arguments in _SIGNATURES.items():
            getattr(found, function).argtypes = arguments
            getattr(found, function).restype = ctypes.c_int
        found.cudaGetErrorString.restype = ctypes.c_char_p
        return found
    return None


def device_count() -> int:
    """CUDA devices that can be used; 0 without a driver."""
    library, number = _library(), ctypes.c_int(0)
    if library is None or library.cudaGetDeviceCount(ctypes.byref(number)) != 0:
        return 0
    return number.value


def _call(function: str, *arguments: Any) -> None:
    library = _library()
    if library is None:
        raise FitError("no CUDA runtime", hint=INSTALL)
    if (code := getattr(library, function)(*arguments)) != 0:
        text = library.cudaGetErrorString(code).decode(errors="replace")
        if code == _OUT_OF_MEMORY:
            raise ResourceError(f"not enough memory on the CUDA device: {text}")
        raise SurgeryError(f"{function}: {text}")


class CudaMemory:
    """Memory of one CUDA device, and the stream that everything on it runs in."""

    device = "cuda"

    def __init__(self, index: int = 0) -> None:
        self.index = index
        _call("cudaSetDevice", index)
        handle = ctypes.c_void_p()
        _call("cudaStreamCreateWithFlags", ctypes.byref(handle), _NON_BLOCKING)
        self.stream: int = handle.value or 0  # lives as long as the process, as sessions may outlive this object

    def allocate(self, nbytes: int) -> Buffer:
        """`nbytes` zeros."""
        place = ctypes.c_void_p()
        _call("cudaMalloc", ctypes.byref(place), max(nbytes, 1))
        address = place.value or 0
        buffer = Buffer(address, nbytes, owner := _Owner())
        weakref.finalize(owner, _free, address)
        _call("cudaMemsetAsync", address, 0, nbytes, self.stream)
        return buffer

    def write(self, buffer: Buffer, values: npt.NDArray[Any], offset: int = 0) -> None:
        """Copy `values` to byte `offset` of `buffer`; they may be changed at once, pageable memory is staged."""
        source = raw(values)
        if offset < 0 or offset + source.size > buffer.nbytes:
            raise IndexError("behind the end of a buffer")
        if source.size:
            _call("cudaMemcpyAsync", buffer.address + offset, source.ctypes.data, source.size, _TO_DEVICE, self.stream)

    def read(self, address: int, nbytes: int) -> Bytes:
        """A copy of `nbytes` bytes at `address`, once everything before is done."""
        found = np.empty(nbytes, np.uint8)
        if nbytes:
            _call("cudaMemcpyAsync", found.ctypes.data, address, nbytes, _TO_HOST, self.stream)
        self.wait()
        return found

    def copy(self, source: Buffer, target: Buffer, nbytes: int) -> None:
        """Copy on the device."""
        _call("cudaMemcpyAsync", target.address, source.address, nbytes, _ON_DEVICE, self.stream)

    def wait(self) -> None:
        """Until everything so far is done."""
        _call("cudaStreamSynchronize", self.stream)

    def free(self) -> int:
        """Bytes that are free on the device."""
        return _memory_info(self.index)[0]


def used(index: int = 0) -> int:
    """Bytes taken on a device, by whomever."""
    free, total = _memory_info(index)
    return total - free


def _memory_info(index: int) -> tuple[int, int]:
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    _call("cudaSetDevice", index)
    _call("cudaMemGetInfo", ctypes.byref(free), ctypes.byref(total))
    return free.value, total.value


class _Owner:
    __slots__ = ("__weakref__",)


def _free(address: int) -> None:
    library = _library()
    if library is not None:
        library.cudaFree(address)


def copy_bandwidth(memory: CudaMemory, nbytes: int, repeats: int = 20) -> float:
    """Bytes per second that a copy of `nbytes` moves on the device: each byte is read once and written once. The median of `repeats`."""
    source, target = memory.allocate(nbytes), memory.allocate(nbytes)
    seconds = []
    for _ in range(repeats + 3):
        memory.wait()
        began = time.perf_counter()
        memory.copy(source, target, nbytes)
        memory.wait()
        seconds.append(time.perf_counter() - began)
    return 2 * nbytes / float(np.median(seconds[3:]))
