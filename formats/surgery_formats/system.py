# SPDX-License-Identifier: Apache-2.0
"""What is asked of an operating system. Linux and macOS have it; Windows lacks most, and is refused before anything begins."""

from __future__ import annotations

import importlib
import os

from surgery_formats.errors import ResourceError

__all__ = ["check_system", "missing_features"]

_CALLS = ("pread", "preadv", "pwrite", "geteuid", "O_CLOEXEC", "O_NOFOLLOW", "O_DIRECTORY")
"""Reading and writing at a place of a file that threads share, and opening without following links."""
_MODULES = ("fcntl",)  # locks between processes


def missing_features() -> tuple[str, ...]:
    """Names of Python's modules and of their members that this system does not have."""
    calls = [f"os.{name}" for name in _CALLS if not hasattr(os, name)]
    return (*calls, *(name for name in _MODULES if not _is_there(name)))


def _is_there(module: str) -> bool:
    try:
        importlib.import_module(module)
    except ImportError:
        return False
    return True


def check_system() -> None:
    """Refuse a system without what every command needs.

    Raises:
        ResourceError: it is one.
    """
    if missing := missing_features():
        raise ResourceError(
            f"this system has no {', '.join(missing)}: surgery runs on Linux and macOS",
            hint="on Windows, use it in the Windows Subsystem for Linux",
        )
