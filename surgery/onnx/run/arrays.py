# SPDX-License-Identifier: Apache-2.0
"""Arrays that users give as files (.npy)."""

from __future__ import annotations

from pathlib import Path
from tokenize import TokenError
from typing import Any

import numpy as np
import numpy.typing as npt

from surgery_formats.errors import FitError, MalformedError, NotFoundError

__all__ = ["check_file", "read_array"]

_LARGEST = 1 << 30  # bytes of a file
_FAULTS = (ValueError, OSError, EOFError, OverflowError, MemoryError, SyntaxError, SystemError, TypeError, TokenError)
"""What numpy raises for headers that are damaged: it reads them as Python, and makes room for as many numbers as they say."""


def check_file(file: Path) -> None:
    """Refuse a file that is not there, or too large to be read whole.

    Raises:
        NotFoundError: no such file.
        FitError: it is too large.
    """
    if not file.is_file():
        raise NotFoundError("no such file", file=file)
    if file.stat().st_size > _LARGEST:
        raise FitError(f"has {file.stat().st_size} bytes (at most {_LARGEST} are read)", file=file)


def read_array(file: Path) -> npt.NDArray[Any]:
    """The array in `file`; objects in it are refused.

    Raises:
        NotFoundError: no such file.
        MalformedError: not an array.
        FitError: it is too large.
    """
    check_file(file)
    try:
        with open(file, "rb") as opened:
            return np.asarray(np.lib.format.read_array(opened, allow_pickle=False))
    except _FAULTS as error:
        raise MalformedError("not an array", file=file) from error
