# SPDX-License-Identifier: Apache-2.0
"""Two storages of one weight as matrices of one shape, whichever way round either is stored."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from dataclasses import dataclass

from surgery_formats.arrays import Array, assign, empty
from surgery_formats.dtypes import DType
from surgery_formats.errors import FitError
from surgery_formats.storage.base import PartBytes, Storage, StoredPart, read_block
from surgery_formats.storage.plain import Plain
from surgery_formats.tensors.tensor import StoredTensor, matrix_of

__all__ = ["Turned", "aligned", "as_stored", "flattened", "oriented", "release", "turned", "with_columns"]

_HELD = threading.local()


_SIDES = 2  # matrices of a thread: both sides of a difference


def release() -> None:
    """Let go of the matrices that the calling thread read last in order to turn them."""
    _HELD.slabs = []


Columns = Callable[[int, int], Array]
"""Columns ``[start, stop)`` of a matrix in memory, as rows."""


def _columns_of(storage: Storage, start: int, stop: int) -> Columns:
    """Of the rows ``[start, stop)``; a codec that knows how holds its codes, and not the numbers they stand for."""
    held = getattr(storage, "held_columns", None)
    if held is not None and (start, stop) == (0, storage.shape[0]):
        columns: Columns = held()
        return columns
    matrix = read_block(storage, start, stop)
    return lambda first, last: matrix[:, first:last].T


@dataclass(frozen=True, slots=True)
class Turned:
    """A storage whose matrix, or each matrix of its stack ``(experts, rows, cols)``, is transposed.

    A thread that reads holds two of these matrices, as stored, until it reads others or calls `release`.

    Attributes:
        stored: As it lies in its files.
    """

    stored: Storage

    @property
    def _slab(self) -> tuple[int, int]:
        """``(rows, cols)`` of one matrix as stored."""
        rows, cols = self.stored.shape
        count = self.stored.sizes[0] if len(self.stored.sizes) == 3 else 1
        return rows // max(count, 1), cols

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
        """Of the matrices under each other, each turned."""
        rows, cols = self._slab
        return self.stored.shape[0] // max(rows, 1) * cols, rows

    @property
    def held_nbytes(self) -> int:
        """Memory that a thread which reads it holds: of a matrix of codes a byte for each."""
        return math.prod(self._slab) * (1 if hasattr(self.stored, "held_columns") else self.dtype.bits // 8)

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
        """A whole matrix."""
        return max(self._slab[1], 1)

    @property
    def elements(self) -> None:
        """None: they have another order."""
        return None

    @property
    def is_float(self) -> bool:
        """As stored."""
        return self.stored.is_float

    @property
    def transposed(self) -> bool:
        """The other way round."""
        return not self.stored.transposed

    @property
    def sources(self) -> tuple[StoredTensor, ...]:
        """As stored."""
        return self.stored.sources

    def parts(self, name: str) -> tuple[StoredPart, ...]:
        """As stored."""
        return self.stored.parts(name)

    def read_into(self, block: Array, start: int) -> None:
        """See `Storage.read_into`."""
        height, stop = self.group, start + len(block)
        for number in range(start // height, -(-stop // height)):
            first, last = max(start, number * height), min(stop, (number + 1) * height)
            columns = self._matrix(number)(first - number * height, last - number * height)
            assign(block[first - start : last - start], columns)

    def _matrix(self, number: int) -> Columns:
        held: list[tuple[Storage, int, Columns]] = getattr(_HELD, "slabs", [])
        found = next((slab for of, which, slab in held if of is self.stored and which == number), None)
        if found is None:
            _HELD.slabs = held = held[1 - _SIDES :]  # room, before the next one is there
            rows = self._slab[0]
            found = _columns_of(self.stored, number * rows, (number + 1) * rows)
            held.append((self.stored, number, found))
        return found

    def put(self, start: int, block: Array, rounded: Array) -> tuple[PartBytes, ...]:
        """Whole matrices, turned back."""
        rows, cols = self._slab
        if start % self.group or len(block) % self.group:
            raise ValueError(f"rows {start} to {start + len(block)} are not whole matrices of {self.group}")
        count = len(block) // self.group
        back = block.reshape(count, cols, rows).mT.reshape(count * rows, cols)
        stored = empty(back.shape, self.dtype)
        written = self.stored.put(start // self.group * rows, back, stored)
        assign(rounded, stored.reshape(count, rows, cols).mT.reshape(block.shape))
        return written


def with_columns(storage: Storage, columns: int) -> Storage:
    """A weight as a matrix of so many columns.

    Raises:
        FitError: it is stored in a way that knows its matrix in another shape only.
    """
    if storage.shape[1] == columns:
        return storage
    if storage.elements is None:
        raise FitError(
            f"{storage.kind} holds {list(storage.sizes)} as {list(storage.shape)}, not in rows of {columns}",
            file=storage.sources[0].path if storage.sources else None,
            tensor=storage.name,
        )
    return Plain(storage.elements, (math.prod(storage.sizes) // max(columns, 1), columns))


def flattened(storage: Storage) -> Storage:
    """A weight flattened after its first axis."""
    return with_columns(storage, matrix_of(storage.sizes)[1])


def as_stored(storage: Storage) -> Storage:
    """The storage itself, or the one that is turned in order to lie as its fellow does."""
    stored: Storage = getattr(storage, "stored", storage)  # of a Turned
    return stored


def turned(storage: Storage) -> Storage:
    """The storage with its matrix, or each matrix of its stack, transposed."""
    original: Storage | None = getattr(storage, "stored", None)  # of a Turned
    return Turned(storage) if original is None else original


def oriented(storage: Storage, like: Storage) -> Storage:
    """The storage as a matrix with the rows and columns of another one, of a weight of equal sizes.

    Raises:
        FitError: they know their matrices in different shapes only.
    """
    if storage.transposed != like.transposed:
        storage = turned(storage if storage.elements is None else with_columns(storage, storage.sizes[-1]))
    return with_columns(storage, like.shape[1])


def aligned(one: Storage, other: Storage, *, stacked: bool = False) -> tuple[Storage, Storage]:
    """Two storages of weights of equal sizes, but perhaps for their first, as matrices whose rows and columns agree.

    What is stored as elements follows what is not, so that codes are read as they lie.

    Args:
        one: Of one weight.
        other: Of the other.
        stacked: Whether the matrices of a stack lie under each other, rather than each in one row.

    Raises:
        FitError: they know their matrices in different shapes only.
    """
    if one.elements is not None and other.elements is not None:
        sides = [with_columns(side, side.sizes[-1]) if stacked else flattened(side) for side in (one, other)]
        return sides[0], sides[1]
    if one.elements is None:
        return one, oriented(other, one)
    return oriented(one, other), other
