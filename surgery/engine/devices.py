# SPDX-License-Identifier: Apache-2.0
"""Names of devices, checked against this machine. torch is imported for GPUs only."""

from __future__ import annotations

import re

from surgery_formats.errors import FitError, UsageError
from surgery_formats.text import show

__all__ = ["device_of", "devices_of"]

_DEVICE = re.compile(r"cuda(?::(all|\d{1,3}(?:,\d{1,3}){0,63}))?", re.ASCII)


def devices_of(text: str) -> tuple[str, ...]:
    """``cpu``, ``cuda``, ``cuda:1``, ``cuda:0,1`` or ``cuda:all`` as a list of devices; ``auto`` is all that are there.

    Raises:
        UsageError: not a name.
        FitError: not a device, or not on this machine.
    """
    if not isinstance(text, str):
        raise UsageError(f"device is a name such as 'cuda:0', not {type(text).__name__}")
    parts = text.split(",")
    if text == "cpu" or all(part == "cpu" for part in parts):
        return tuple(parts)
    match = _DEVICE.fullmatch(text)
    if match is None and text != "auto":
        raise FitError(f"'{show(text, 40)}' is no device", hint="there are cpu, cuda, cuda:1, cuda:0,1, cuda:all, auto")
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if match is None:
        return tuple(f"cuda:{number}" for number in range(count)) or ("cpu",)
    listed = match[1] or "0"
    numbers = range(count) if listed == "all" else [int(number) for number in listed.split(",")]
    if not numbers or max(numbers) >= count or len(set(numbers)) < len(numbers):
        raise FitError(f"'{show(text, 40)}' is not on this machine, which has {count} CUDA devices")
    return tuple(f"cuda:{number}" for number in numbers)


def device_of(text: str) -> str:
    """The one device that `text` names; ``auto`` is the first GPU, or the cpu.

    Raises:
        UsageError: not a name.
        FitError: not a device, several, or not on this machine.
    """
    devices = devices_of(text)
    if len(devices) > 1 and text != "auto":
        raise FitError(f"'{show(text, 40)}' is more than one device", hint="a merge runs on one")
    return devices[0]
