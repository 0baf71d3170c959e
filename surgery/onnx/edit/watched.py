# SPDX-License-Identifier: Apache-2.0
"""A storage whose reader shows every block to somebody else, too, so that it is read once for two purposes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from surgery_formats.arrays import Array
from surgery_formats.dtypes import DType
from surgery_formats.storage.base import PartBytes, Storage, StoredPart
from surgery_formats.tensors.tensor import StoredTensor, Tensor

__all__ = ["Watched"]


@dataclass(frozen=True, eq=False)
class Watched:
    """A storage, and who sees what is read.

    Attributes:
        stored: As it lies in its files.
        seen: Called with the first row of every block, and its values.
    """

    stored: Storage
    seen: Callable[[int, Array], None]

    @property
    def name(self) -> str:
        """As stored."""
        return self.stored.name

    @property
    def sizes(self) -> tuple[int, ...]:
        """As stored."""
        return self.stored.sizes

    @property
    def shape(self) -> tuple[int, int]:
        """As stored."""
        return self.stored.shape

    @property
    def dtype(self) -> DType:
        """As stored."""
        return self.stored.dtype

    @property
    def kind(self) -> str:
        """As stored."""
        return self.stored.kind

    @property
    def group(self) -> int:
        """As stored."""
        return self.stored.group

    @property
    def elements(self) -> Tensor | None:
        """As stored."""
        return self.stored.elements

    @property
    def is_float(self) -> bool:
        """As stored."""
        return self.stored.is_float

    @property
    def transposed(self) -> bool:
        """As stored."""
        return self.stored.transposed

    @property
    def sources(self) -> tuple[StoredTensor, ...]:
        """As stored."""
        return self.stored.sources

    def parts(self, name: str) -> tuple[StoredPart, ...]:
        """As stored."""
        return self.stored.parts(name)

    def read_into(self, block: Array, start: int) -> None:
        """See `Storage.read_into`."""
        self.stored.read_into(block, start)
        self.seen(start, block)

    def put(self, start: int, block: Array, rounded: Array) -> tuple[PartBytes, ...]:
        """As stored."""
        return self.stored.put(start, block, rounded)
