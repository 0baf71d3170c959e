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
from collections.abc import Callable
from pathlib import Path

__all__ = ["count_devices", "start"]


def count_devices() -> int:
    """CUDA devices that torch can use.

    If the driver can say, torch is imported in a thread; whoever imports it meanwhile waits for it.
    """
    if "torch" not in sys.modules or _driver.cache_info().currsize:
        if not _has_torch():
            return 0
        if (found := _driver_count()) is not None:
            return found
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


@functools.cache
def start(numbers: tuple[int, ...]) -> None:
    """Start devices in a thread; a failure is left to those who use them: they see it again."""
    if _driver.cache_info().currsize:
        _in_thread(_start_devices, numbers)


def _in_thread(function: Callable[..., None], *arguments: object) -> None:
    threading.Thread(target=function, args=arguments, name="surgery-start", daemon=True).start()


def _import_torch() -> None:
    with contextlib.suppress(Exception):  # whoever needs it imports it again, and sees what is wrong with it
        import torch  # noqa: F401 - to have it loaded


def _has_torch() -> bool:
    """Whether a torch that was built for GPUs is installed; asking does not import it."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return False
    return any((Path(spec.origin).parent / "lib").glob("*c10_[ch]*"))  # CUDA, or HIP, which calls itself CUDA


@functools.cache  # asked for only if torch is not imported yet
def _driver() -> ctypes.CDLL | None:
    """The driver, ready to be called; None where there is none, or where it finds no device."""
    name = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    try:
        driver = ctypes.CDLL(name)
    except OSError:
        return None
    _in_thread(_import_torch)  # before the driver is started, which takes a tenth of a second or more
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
