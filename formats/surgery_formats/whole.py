# SPDX-License-Identifier: Apache-2.0
"""Functions that are not to be left halfway: between what they do and what they note of it, an exception from outside leaves litter.

A program that turns signals into exceptions looks for them on its stack, and waits until they have returned. All are short, but
for what `interruptible` marks inside of them.
"""

from __future__ import annotations

from collections.abc import Callable
from types import CodeType, FrameType
from typing import Any, TypeVar

__all__ = ["interruptible", "is_within_whole", "whole"]

F = TypeVar("F", bound=Callable[..., Any])
_codes: set[CodeType] = set()
_interruptible: set[CodeType] = set()


def whole(function: F) -> F:
    """Mark a function, or the generator of a context manager: its beginning and its end, not what runs inside."""
    _codes.add(function.__code__)
    return function


def interruptible(function: F) -> F:
    """Mark a function that takes long and undoes by itself what it has done: it may be left even if a `whole` one calls it."""
    _interruptible.add(function.__code__)
    return function


def is_within_whole(frame: FrameType | None) -> bool:
    """Whether `frame` belongs to a function that is not to be left, or was called by one."""
    while frame is not None:
        if frame.f_code in _interruptible:
            return False
        if frame.f_code in _codes:
            return True
        frame = frame.f_back
    return False
