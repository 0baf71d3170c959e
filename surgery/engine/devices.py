# SPDX-License-Identifier: Apache-2.0
"""Names of devices, checked against this machine. torch is imported for GPUs only, in a thread."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

from surgery.engine.cuda import count_devices, start
from surgery_formats.errors import FitError, UsageError
from surgery_formats.text import show

__all__ = ["Devices", "device_of", "devices_of", "extraction_devices", "on_gpus"]

_PAYS = 1_000_000_000
"""Parameters from which an extraction is sooner done on a GPU. Measured with 16 cores and an H200 (docs/benchmarks.md): 1.24 B
take 4.3 to 5.1 s on the cores and 3.2 s on the GPU, 2.3 of which start torch and the GPU; 8 B take 4.8 s there."""


class Devices(NamedTuple):
    """Where an extraction is computed.

    Attributes:
        names: Devices, as `devices_of` lists them.
        why: The reason for these, for people; empty if they were asked for.
    """

    names: tuple[str, ...]
    why: str = ""


_DEVICE = re.compile(r"cuda(?::(all|\d{1,3}(?:,\d{1,3}){0,63}))?", re.ASCII)


def devices_of(text: str) -> tuple[str, ...]:
    """``cpu``, ``cuda``, ``cuda:1``, ``cuda:0,1`` or ``cuda:all`` as a list of devices; ``auto`` is all that are there.

    GPUs begin to start, in threads.

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
    count = count_devices()
    if match is None:
        start(tuple(range(count)))
        return tuple(f"cuda:{number}" for number in range(count)) or ("cpu",)
    listed = match[1] or "0"
    numbers = tuple(range(count) if listed == "all" else map(int, listed.split(",")))
    if not numbers or max(numbers) >= count or len(set(numbers)) < len(numbers):
        raise FitError(f"'{show(text, 40)}' is not on this machine, which has {count} CUDA devices")
    start(numbers)
    return tuple(f"cuda:{number}" for number in numbers)


def extraction_devices(text: str, parameters: int) -> Devices:
    """The devices for an extraction from a model of so many parameters; ``auto`` takes those that are sooner done.

    Raises:
        UsageError, FitError: see `devices_of`.
    """
    if text != "auto":
        return Devices(devices_of(text))
    if parameters < _PAYS:
        return Devices(("cpu",), f"it is sooner done there below {_PAYS / 1e9:.1f} B parameters")
    devices = devices_of(text)
    return Devices(
        devices, "no GPU is here" if devices == ("cpu",) else f"a GPU pays from {_PAYS / 1e9:.1f} B parameters on"
    )


def on_gpus(devices: Iterable[str]) -> bool:
    """Whether there is a GPU among devices as `devices_of` lists them."""
    return any(device != "cpu" for device in devices)


def device_of(text: str) -> str:
    """The one device that `text` names; ``auto`` is the cpu, where a merge is sooner done at any size.

    Raises:
        UsageError: not a name.
        FitError: not a device, several, or not on this machine.
    """
    if text == "auto":
        return "cpu"
    devices = devices_of(text)
    if len(devices) > 1:
        raise FitError(f"'{show(text, 40)}' is more than one device", hint="a merge runs on one")
    return devices[0]
