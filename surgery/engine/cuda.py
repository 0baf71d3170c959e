# SPDX-License-Identifier: Apache-2.0
"""Starts CUDA while something else is done: torch takes seconds to import, and a device half a second to start.

The driver itself counts the devices and starts them, for a library of two functions is loaded at once. torch takes over
what was started: a device has one primary context for the whole process.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.util
import sys
import threading
from collections.abc import Callable, Iterable
from pathlib import Path

__all__ = ["count_devices", "start"]


def count_devices() -> int:
    """CUDA devices that torch can use; it is imported only if the driver cannot say."""
    if "torch" not in sys.modules:
        if not _has_torch():
            return 0
        if (found := _driver_count()) is not None:
            return found
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def start(numbers: Iterable[int]) -> None:
    """Start devices and import torch in threads; whoever imports torch meanwhile waits for it.

    A failure is left to those who use the device: they see it again.
    """
    if "torch" not in sys.modules and _driver() is not None:
        _start_once(tuple(numbers))


@functools.cache
def _start_once(numbers: tuple[int, ...]) -> None:
    _in_thread(_start_devices, numbers)
    _in_thread(_import_torch)


def _in_thread(function: Callable[..., None], *arguments: object) -> None:
    threading.Thread(target=function, args=arguments, name="surgery-start", daemon=True).start()


def _import_torch() -> None:
    with contextlib.suppress(Exception):
        import torch  # noqa: F401


def _has_torch() -> bool:
    """Whether a torch that was built for CUDA is installed; asking does not import it."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return False
    return any((Path(spec.origin).parent / "lib").glob("*c10_cuda*"))


@functools.cache
def _driver() -> ctypes.CDLL | None:
    """The driver, ready to be called; None where there is none, or where it finds no device."""
    name = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    try:
        driver = ctypes.CDLL(name)
    except OSError:
        return None
    return driver if driver.cuInit(0) == 0 else None


def _driver_count() -> int | None:
    driver, count = _driver(), ctypes.c_int()
    if driver is None or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return None
    return count.value


def _start_devices(numbers: tuple[int, ...]) -> None:
    driver = _driver()
    for number in numbers:
        device, context = ctypes.c_int(), ctypes.c_void_p()
        if driver is not None and driver.cuDeviceGet(ctypes.byref(device), number) == 0:
            driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device)  # until this process ends
