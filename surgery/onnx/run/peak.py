# SPDX-License-Identifier: Apache-2.0
"""The memory that a process really takes at its peak: what an operator takes for a moment, and mapped weights, included."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

__all__ = ["Peak", "device_nbytes", "resident_nbytes"]


class Peak:
    """The peak of one user of memory, beginning now; others may have taken memory of the same process before."""

    def __init__(self, device: str) -> None:
        self._device = device if device != "cpu" and device_nbytes(device) else ""
        self._before = self._now()

    def held(self) -> int:
        """Bytes taken since the beginning, and still held."""
        return max(0, self._now() - self._before)

    def _now(self) -> int:
        return device_nbytes(self._device) if self._device else resident_nbytes("VmRSS")

    def during(self, work: Callable[[], Any]) -> int:
        """Most bytes that are taken beside those held before, while `work` runs.

        On CUDA what onnxruntime took is its own until the session ends, so what is taken afterwards is the peak; on the cpu
        the kernel keeps the highest mark, which is set back before, where the system lets it.
        """
        if self._device:
            before = device_nbytes(self._device)
            work()
            return max(0, device_nbytes(self._device) - before)
        _set_back()
        before = resident_nbytes("VmRSS")
        work()
        return max(0, resident_nbytes("VmHWM") - before)


def device_nbytes(device: str) -> int:
    """Bytes taken on a CUDA device by all its users; 0 without one."""
    from surgery.onnx.run.cudart import device_count, used

    return used(int(device.partition(":")[2] or 0)) if device_count() else 0


def _set_back() -> None:
    """Set the mark of the highest resident memory to what is resident now (proc(5), clear_refs)."""
    try:
        with open("/proc/self/clear_refs", "w") as control:
            control.write("5")
    except OSError:  # the mark of the whole process then
        return


def resident_nbytes(field: str) -> int:
    """A figure of this process by ``/proc/self/status``, in bytes; 0 where the system has none."""
    try:
        with open("/proc/self/status") as status:
            return next((int(line.split()[1]) * 1024 for line in status if line.startswith(f"{field}:")), 0)
    except OSError:
        return 0
