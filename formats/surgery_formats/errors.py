# SPDX-License-Identifier: Apache-2.0
"""All errors that this project raises on purpose.

    SurgeryError                       exit 1   (never raised itself)
    |-- InputError                     exit 3   an input cannot be read
    |   |-- NotFoundError              exit 3   (also FileNotFoundError)
    |   `-- MalformedError             exit 3   (also ValueError)
    |-- FitError                       exit 4   the input is readable but does not fit (also ValueError)
    |   `-- NothingChangedError        exit 4
    |-- UsageError                     exit 2   arguments that the function does not take (also TypeError)
    |-- OutputExistsError              exit 2   (also FileExistsError)
    |-- MissingPackageError            exit 2   an extra is not installed (also ImportError)
    |-- ProofError                     exit 5   the files written differ from what was planned
    `-- ResourceError                  exit 7   not enough disk or memory (also OSError)

The message describes the fault; ``file`` and ``tensor`` locate it; ``hint`` suggests what to do next. A hint names an
argument as `overwrite=True` or `base=` in backticks, which the command shows as its option. Names that come from files
are untrusted: they are kept raw here and escaped for display with `surgery_formats.text.show`.
"""

from __future__ import annotations

import os
from typing import ClassVar

from surgery_formats.text import show

__all__ = [
    "FitError",
    "InputError",
    "MalformedError",
    "MissingPackageError",
    "NotFoundError",
    "NothingChangedError",
    "OutputExistsError",
    "ProofError",
    "ResourceError",
    "SurgeryError",
    "UsageError",
]


class SurgeryError(Exception):
    """An error with a location and a remedy."""

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
        """Stable name of the error for machines, for example ``"FitError"``."""
        return type(self).__name__

    def __str__(self) -> str:
        where = [show(self.file, 200)] if self.file else []
        where += [f"tensor '{show(self.tensor)}'"] if self.tensor else []
        text = ": ".join([*where, self.message])
        return f"{text}; {self.hint}" if self.hint else text


class InputError(SurgeryError):
    """An input cannot be read."""

    exit_code = 3


class NotFoundError(InputError, FileNotFoundError):
    """There is no such file, folder or repository."""

    __str__ = SurgeryError.__str__


class MalformedError(InputError, ValueError):
    """The bytes do not follow the format of the file."""


class FitError(SurgeryError, ValueError):
    """The input is readable but does not fit: a shape or base differs, or a tensor is left over."""

    exit_code = 4


class NothingChangedError(FitError):
    """The operation would write an unchanged model."""


class UsageError(SurgeryError, TypeError):
    """An argument of a wrong type, one that is missing, or arguments that exclude each other."""

    exit_code = 2


class OutputExistsError(SurgeryError, FileExistsError):
    """The output already exists and ``overwrite`` is not set."""

    exit_code = 2
    __str__ = SurgeryError.__str__


class MissingPackageError(SurgeryError, ImportError):
    """A package that only some commands need is not installed."""

    exit_code = 2
    __str__ = SurgeryError.__str__


class ProofError(SurgeryError):
    """The bytes on disk differ from those that were computed."""

    exit_code = 5


class ResourceError(SurgeryError, OSError):
    """There is not enough disk or memory."""

    exit_code = 7
    __str__ = SurgeryError.__str__
