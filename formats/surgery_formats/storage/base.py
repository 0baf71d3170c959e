# SPDX-License-Identifier: Apache-2.0
"""Storages: ways to hold a logical weight in stored tensors, read and written a block of rows at a time."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeGuard

from surgery_formats.arrays import Array, cast, empty, wide
from surgery_formats.dtypes import DType
from surgery_formats.errors import FitError
from surgery_formats.tensors.tensor import StoredTensor, Tensor

__all__ = [
    "Encoding",
    "Housed",
    "PartBytes",
    "Storage",
    "StorageKind",
    "StoredPart",
    "is_contiguous",
    "is_housed",
    "is_stacked",
    "is_storage",
    "parts_named",
    "read_block",
    "read_rows",
    "read_values",
]


@dataclass(frozen=True, slots=True)
class StoredPart:
    """One of the stored tensors that hold a weight in an output."""

    name: str
    dtype: DType
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Length of its bytes."""
        return self.dtype.nbytes(math.prod(self.shape))


@dataclass(frozen=True, slots=True)
class PartBytes:
    """Some bytes of a part.

    Attributes:
        part: Its position in `Encoding.parts`.
        offset: From the part's first byte.
        data: The bytes; good until the next `Encoding.put` into the same buffer.
    """

    part: int
    offset: int
    data: memoryview


class Encoding(Protocol):
    """How the values of a weight become bytes of stored tensors.

    Attributes:
        sizes: Shape of the weight in the model's code: ``(out, in)``, ``(out, in, k, k)``, ``(experts, rows, cols)``,
            ``(n,)``.
        shape: ``(rows, cols)`` of the same values as a matrix; blocks are rows of it.
        dtype: Type of the values that a reader gets.
        group: Rows that can only be put together: blocks begin at a multiple of it and end at one, or at the last row.
    """

    @property
    def sizes(self) -> tuple[int, ...]: ...
    @property
    def shape(self) -> tuple[int, int]: ...
    @property
    def dtype(self) -> DType: ...
    @property
    def group(self) -> int: ...

    def parts(self, name: str) -> tuple[StoredPart, ...]:
        """The stored tensors that hold the weight if it is called `name`, in the order of `Storage.sources`."""

    def put(self, start: int, block: Array, rounded: Array) -> tuple[PartBytes, ...]:
        """The bytes of the rows from `start`, rounded once; blocks in order give the bytes of every part in order.

        Args:
            start: A multiple of `group`.
            block: ``(n, cols)``, finite, in any floating-point type on any device; never written to.
            rounded: ``(n, cols)`` of `dtype` on the CPU; filled with the values that a reader will get. The returned
                bytes may lie in it.

        Raises:
            ValueError: rows that cannot be put alone, see `group`.
        """


class Storage(Encoding, Protocol):
    """A weight in stored tensors.

    Attributes:
        name: Of the weight, as the model's code has it.
        sources: Every stored tensor it is made of.
        kind: Name of the type it is stored in, for people: ``BF16``, ``NF4``.
        elements: The one tensor whose elements are its values, so that it may be reshaped, and stored in another type
            or with more rows; None where values are coded.
        is_float: Whether its values are numbers that updates can be added to, not codes or indices.
        transposed: Whether the rows of its matrix are the columns of the weight: ``(in, out)`` for sizes ``(out, in)``,
            each expert ``(out, in)`` for sizes ``(experts, in, out)``.
    """

    @property
    def name(self) -> str: ...
    @property
    def sources(self) -> tuple[StoredTensor, ...]: ...
    @property
    def kind(self) -> str: ...
    @property
    def elements(self) -> Tensor | None: ...
    @property
    def is_float(self) -> bool: ...
    @property
    def transposed(self) -> bool: ...

    def read_into(self, block: Array, start: int) -> None:
        """Fill `block` ``(n, cols)``, contiguous, of `dtype` and on the CPU, with any rows from `start` on.

        Raises:
            MalformedError: the file ends before, or what is stored is not what the storage says.
        """


class Housed(Storage, Protocol):
    """A weight that only files of its own container can hold: they have names, types and an order of their own for it.

    Attributes:
        container: Name of the container.
        coded: Whether its values are codes.
    """

    @property
    def container(self) -> str: ...
    @property
    def coded(self) -> bool: ...

    def in_elements(self, dtype: DType) -> Encoding:
        """The weight in elements of `dtype`, as the container stores it; itself, if such a weight keeps its type."""

    def check_place(self, name: str, sizes: tuple[int, ...]) -> None:
        """Refuse to store a weight `name` of `sizes` in the place of this one, or beside it.

        Raises:
            FitError: the container has no place for it.
        """

    def check_written(self) -> None:
        """Refuse a type that is only read.

        Raises:
            FitError: it is one.
        """


class StorageKind(Protocol):
    """One way to store weights. Add one as an object in `registry.BUILT_IN` or as a plugin's entry point.

    Attributes:
        name: As reports call it.
        title: One line for ``surgery formats``.
    """

    @property
    def name(self) -> str: ...
    @property
    def title(self) -> str: ...

    def claim(self, tensors: Mapping[str, StoredTensor], config: Mapping[str, Any]) -> Iterable[Storage]:
        """The weights that are stored this way.

        Args:
            tensors: Every stored tensor of a network, by name.
            config: Its config.json.

        Raises:
            MalformedError: the configuration names this storage, and the tensors are not what it needs.
        """


def parts_named(weight: Storage, name: str) -> tuple[StoredPart, ...]:
    """The stored tensors of a layer's weight as parts of one called `name`, of the same types and sizes."""
    stem, old = name.removesuffix(".weight"), weight.name.removesuffix(".weight")
    return tuple(StoredPart(stem + each.name[len(old) :], each.dtype, each.shape) for each in weight.sources)


def read_block(storage: Storage, start: int, stop: int) -> Array:
    """Rows ``[start, stop)`` of the matrix, in `Storage.dtype`, in memory of the caller's own.

    Raises:
        FitError: neither numpy nor ml_dtypes has such an element type.
    """
    rows, cols = storage.shape
    try:
        block = empty((max(min(stop, rows) - start, 0), cols), storage.dtype)
    except TypeError as error:
        path = storage.sources[0].path if storage.sources else None
        raise FitError(f"values of type {storage.kind} cannot be read", file=path, tensor=storage.name) from error
    storage.read_into(block, start)
    return block


def read_values(storage: Storage, start: int, stop: int, dtype: DType | None = None) -> Array:
    """Rows ``[start, stop)`` of the matrix in `dtype`; by default float32, or float64 if stored as such."""
    return cast(read_block(storage, start, stop), dtype or wide(storage.dtype))


def read_rows(storage: Storage, start: int = 0, stop: int | None = None) -> Array:
    """Elements ``[start:stop]`` of the first axis of `Storage.sizes`, in `Storage.dtype`."""
    if not storage.sizes:
        return read_block(storage, 0, 1).reshape(())
    count = storage.sizes[0]
    stop = count if stop is None else min(stop, count)
    sizes = (max(stop - start, 0), *storage.sizes[1:])
    if storage.transposed and not is_stacked(storage):
        return read_block(storage, 0, storage.shape[0])[:, start:stop].T.reshape(sizes)
    per = storage.shape[0] // count if count else 1
    rows = read_block(storage, start * per, stop * per)
    return rows.reshape(sizes[0], *sizes[:0:-1]).mT if storage.transposed else rows.reshape(sizes)


def is_stacked(storage: Storage) -> bool:
    """Whether its matrix holds a stack of experts one under the other, a row for every row of every expert."""
    return len(storage.sizes) == 3 and storage.shape[0] != storage.sizes[0]


def is_contiguous(storage: Storage) -> bool:
    """Whether its stored tensors can be copied as they are: each is a range of bytes in C order."""
    return all(source.strides is None for source in storage.sources)


def is_storage(encoding: Encoding) -> TypeGuard[Storage]:
    """Whether it can be read, too."""
    return hasattr(encoding, "read_into")


def is_housed(storage: Encoding) -> TypeGuard[Housed]:
    """Whether only files of one container can hold a weight as it is stored."""
    return hasattr(storage, "in_elements")
