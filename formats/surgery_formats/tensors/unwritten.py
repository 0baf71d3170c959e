# SPDX-License-Identifier: Apache-2.0
"""Tensors that a plan is going to write: known by name, type, shape and place, with nothing that could be read yet.

A graph is built for them, and refused if it cannot be, before anything is computed.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from surgery_formats.dtypes import DType

__all__ = ["UnwrittenFile", "UnwrittenTensor"]


@dataclass(frozen=True, slots=True, eq=False)
class UnwrittenFile:
    """A weight file of a plan.

    Attributes:
        path: Its name, without a folder.
        size: Bytes it will have.
        header: Its first bytes.
    """

    path: Path
    size: int
    header: bytes


@dataclass(frozen=True, slots=True)
class UnwrittenTensor:
    """A tensor of an `UnwrittenFile`.

    Attributes:
        name: Key in the file.
        dtype: Element type.
        shape: Sizes.
        file: Where it will lie.
        offset: Position of its first byte there.
        nbytes: Length.
    """

    name: str
    dtype: DType
    shape: tuple[int, ...]
    file: UnwrittenFile
    offset: int
    nbytes: int

    @property
    def path(self) -> Path:
        """The file's name, for messages."""
        return self.file.path
