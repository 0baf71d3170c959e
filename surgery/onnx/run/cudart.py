# SPDX-License-Identifier: Apache-2.0
"""Device memory through the CUDA runtime that onnxruntime has loaded, by ctypes, without torch or other packages.

Functions: CUDA Runtime API, "Memory Management", "Stream Management". A single stream, also given to the session as
``user_compute_stream``, keeps copies and runs in order without waiting.
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
from surgery.onnx.run.runtime import load_runtime
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
    """Let onnxruntime load its libraries from the folders of the nvidia packages, or of torch; returns its output."""
    onnxruntime = load_runtime()

    output = io.StringIO()
    if hasattr(onnxruntime, "preload_dlls"):
        with contextlib.redirect_stdout(output):
            onnxruntime.preload_dlls()
    return output.getvalue()


@cache
def _library() -> Any | None:
    """The CUDA runtime, or None."""
    if not sys.platform.startswith("linux"):
        return None
    _preloaded()
    for name in _SONAMES:
        try:
            library = ctypes.CDLL(name)
        except OSError:
            continue
        for function, arguments in _SIGNATURES.items():
            getattr(library, function).argtypes = arguments
            getattr(library, function).restype = ctypes.c_int
        library.cudaGetErrorString.restype = ctypes.c_char_p
        return library
    return None


def device_count() -> int:
    """Number of usable CUDA devices; 0 without a driver."""
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
    """Memory of one CUDA device, and its stream for copies and runs."""

    device = "cuda"

    def __init__(self, index: int = 0) -> None:
        self.index = index
        _call("cudaSetDevice", index)
        handle = ctypes.c_void_p()
        _call("cudaStreamCreateWithFlags", ctypes.byref(handle), _NON_BLOCKING)
        self.stream: int = handle.value or 0  # never destroyed, because sessions may outlive this object

    def allocate(self, nbytes: int) -> Buffer:
        """Allocate `nbytes` zeros."""
        pointer = ctypes.c_void_p()
        _call("cudaMalloc", ctypes.byref(pointer), max(nbytes, 1))
        address = pointer.value or 0
        buffer = Buffer(address, nbytes, owner := _Owner())
        weakref.finalize(owner, _free, address)
        _call("cudaMemsetAsync", address, 0, nbytes, self.stream)
        return buffer

    def write(self, buffer: Buffer, values: npt.NDArray[Any], offset: int = 0) -> None:
        """Copy `values` to byte `offset` of `buffer`; pageable memory is staged, so they may change afterwards."""
        source = raw(values)
        if offset < 0 or offset + source.size > buffer.nbytes:
            raise IndexError("beyond the end of the buffer")
        if source.size:
            _call("cudaMemcpyAsync", buffer.address + offset, source.ctypes.data, source.size, _TO_DEVICE, self.stream)

    def read(self, address: int, nbytes: int) -> Bytes:
        """Copy `nbytes` bytes at `address` to the host, after all earlier work."""
        copy = np.empty(nbytes, np.uint8)
        if nbytes:
            _call("cudaMemcpyAsync", copy.ctypes.data, address, nbytes, _TO_HOST, self.stream)
        self.wait()
        return copy

    def copy(self, source: Buffer, target: Buffer, nbytes: int) -> None:
        """Copy from buffer to buffer on the device."""
        _call("cudaMemcpyAsync", target.address, source.address, nbytes, _ON_DEVICE, self.stream)

    def wait(self) -> None:
        """Wait until all work is done."""
        _call("cudaStreamSynchronize", self.stream)

    def free(self) -> int:
        """Free memory of the device in bytes."""
        return _memory_info(self.index)[0]


def used(index: int = 0) -> int:
    """Used memory of the device in bytes, by all processes."""
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


def copy_bandwidth(memory: CudaMemory, nbytes: int) -> float:
    """Median bytes per second moved by a copy of `nbytes` on the device; every byte is read once and written once."""
    source, target = memory.allocate(nbytes), memory.allocate(nbytes)
    seconds = []
    for _ in range(23):  # the first three warm up
        memory.wait()
        began = time.perf_counter()
        memory.copy(source, target, nbytes)
        memory.wait()
        seconds.append(time.perf_counter() - began)
    return 2 * nbytes / float(np.median(seconds[3:]))
