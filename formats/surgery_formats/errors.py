# SPDX-License-Identifier: Apache-2.0
"""Every fault this project reports on purpose.

    SurgeryError                       exit 1   (never raised itself)
    |-- InputError                     exit 3   what was given cannot be read
    |   |-- NotFoundError              exit 3   (also FileNotFoundError)
    |   `-- MalformedError             exit 3   (also ValueError)
    |-- FitError                       exit 4   readable, but it does not fit (also ValueError)
    |   `-- NothingChangedError        exit 4
    |-- UsageError                     exit 2   arguments that the function does not take (also TypeError)
    |-- OutputExistsError              exit 2   (also FileExistsError)
    |-- ProofError                     exit 5   what was written is not what was meant
    `-- ResourceError                  exit 7   not enough disk or memory (also OSError)

A message says what is wrong; ``file`` and ``tensor`` say where; ``hint`` says what to do next. Names that come from files are untrusted
text: they are kept raw here and escaped by whoever shows them (`surgery_formats.text.show`).
"""

from __future__ import annotations

import os
from typing import ClassVar

from surgery_formats.text import show

__all__ = [
    "FitError",
    "InputError",
    "MalformedError",
    "NotFoundError",
    "NothingChangedError",
    "OutputExistsError",
    "ProofError",
    "ResourceError",
    "SurgeryError",
    "UsageError",
]


class SurgeryError(Exception):
    """A fault with a place and a remedy."""

    exit_code: ClassVar[int] = 1

    def __init__(
        self,
        message: str,
        *,
        file: str | os.PathLike[str] | None = None,
        tensor: str | None = None,
        hint: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.file = None if file is None else os.fspath(file)
        self.tensor = tensor
        self.hint = hint

    @property
    def code(self) -> str:
        """Stable name of the fault for machines, e.g. ``"FitError"``."""
        return type(self).__name__

    def __str__(self) -> str:
        where = [show(self.file, 200)] if self.file else []
        where += [f"tensor '{show(self.tensor)}'"] if self.tensor else []
        text = ": ".join([*where, self.message])
        return f"{text}; {self.hint}" if self.hint else text


class InputError(SurgeryError):
    """What was given cannot be read."""

    exit_code = 3


class NotFoundError(InputError, FileNotFoundError):
    """No such file, folder or repository."""

    __str__ = SurgeryError.__str__


class MalformedError(InputError, ValueError):
    """The bytes are not what their format says they are."""


class FitError(SurgeryError, ValueError):
    """Readable, but it does not fit: shape, base, or a tensor nobody consumed."""

    exit_code = 4


class NothingChangedError(FitError):
    """The operation would write the model it was given."""


class UsageError(SurgeryError, TypeError):
    """An argument of a wrong type, one that is missing, or arguments that exclude each other."""

    exit_code = 2


class OutputExistsError(SurgeryError, FileExistsError):
    """The output is already there and ``overwrite`` was not asked for."""

    exit_code = 2
    __str__ = SurgeryError.__str__


class ProofError(SurgeryError):
    """What lies on disk is not what was meant to be written."""

    exit_code = 5


class ResourceError(SurgeryError, OSError):
    """Not enough disk or memory."""

    exit_code = 7
    __str__ = SurgeryError.__str__
