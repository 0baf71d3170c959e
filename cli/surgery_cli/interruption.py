# SPDX-License-Identifier: Apache-2.0
"""Whether the user asked to stop. torch's import runs C code that loses a KeyboardInterrupt; a flag is not lost."""

from __future__ import annotations

import threading

__all__ = ["asked", "check", "remember"]

_asked = threading.Event()


def remember() -> None:
    """The user asked."""
    _asked.set()


def asked() -> bool:
    """Whether the user asked."""
    return _asked.is_set()


def check() -> None:
    """Raise KeyboardInterrupt if the user asked, from whatever thread."""
    if asked():
        raise KeyboardInterrupt
