# SPDX-License-Identifier: Apache-2.0
"""Containers: ways to store a model's tensors in a file or a folder, such as safetensors and sharded folders."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from surgery_formats.dtypes import DType
from surgery_formats.errors import MalformedError
from surgery_formats.files.raw import File
from surgery_formats.tensors.tensor import StoredTensor

__all__ = [
    "CUT_OFF",
    "MAX_DIMS",
    "SIZE_LIMIT",
    "Container",
    "FileContainer",
    "FileLayout",
    "Shard",
    "ShardSet",
    "TensorSpec",
    "WritableContainer",
    "is_size",
    "one_file",
    "stored_tensors",
]

TensorSpec = tuple[str, DType, tuple[int, ...]]
"""Name, element type and shape of a tensor that is to be stored."""

MAX_DIMS = 64  # numpy's limit; torch has the same
CUT_OFF = "a copy or download of it was not finished: get the file again"  # the cure for a file that ends early
SIZE_LIMIT = 1 << 63  # sizes and offsets are signed 64-bit integers in torch


@dataclass(frozen=True, slots=True)
class Shard:
    """One open file of weights.

    Attributes:
        path: The file.
        container: Name of its container.
        file: The same file, open.
        tensors: In order of position, where the container has one, else in the order it lists them.
        metadata: Free strings of the file.
        header_nbytes: Bytes before the data, for a container that keeps an unchanged header; else 0.
    """

    path: Path
    container: str
    file: File
    tensors: tuple[StoredTensor, ...]
    metadata: Mapping[str, str] = field(default_factory=dict)
    header_nbytes: int = 0


@dataclass(frozen=True)
class ShardSet:
    """The weights of one component.

    Attributes:
        folder: Where they lie.
        shards: In order of their names.
        index_path: The index file, if the weights have one.
        index: Its content.
        config: The component's configuration, if its weights carry it; a config.json beside them comes first, unless they
            are `self_contained`.
        self_contained: Whether the weights carry all that is known of the model, so that outputs need no config.json.
    """

    folder: Path
    shards: tuple[Shard, ...]
    index_path: Path | None = None
    index: Mapping[str, Any] | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    self_contained: bool = False

    @cached_property
    def tensors(self) -> dict[str, StoredTensor]:
        """Every tensor by name (names are unique across shards), in order of shards and positions."""
        return {tensor.name: tensor for shard in self.shards for tensor in shard.tensors}


@dataclass(frozen=True, slots=True)
class FileLayout:
    """A file of weights before it is written.

    Attributes:
        header: Its first bytes.
        ranges: ``{tensor: (absolute offset, nbytes)}``; the bytes of each are little endian, in C order.
        nbytes: Length of the whole file.
        padding: ``(offset, nbytes)`` of zeros between and behind the tensors.
    """

    header: bytes
    ranges: Mapping[str, tuple[int, int]]
    nbytes: int
    padding: tuple[tuple[int, int], ...] = ()


@runtime_checkable
class Container(Protocol):
    """One way to store a model.

    Attributes:
        name: Its name in reports and manifests.
        title: The common name of its files, for ``surgery formats``.
        written_as: Name of the container that outputs take: its own, or another's if this one is only read.
    """

    @property
    def name(self) -> str: ...
    @property
    def title(self) -> str: ...
    @property
    def written_as(self) -> str: ...

    def detect(self, path: Path) -> bool:
        """Whether the file or folder `path` is of this container, by content; cheap, never raises for foreign files."""

    def open(self, path: Path) -> Mapping[str, ShardSet]:
        """The weights of every component by name; a plain model has one, called "". Only headers are read.

        Raises:
            InputError: the files do not follow the container's format. No tensor reaches beyond its file.
        """


@runtime_checkable
class FileContainer(Container, Protocol):
    """A container of one file, which may be a shard of a model as well as the whole of it.

    Attributes:
        suffixes: Endings of its files; outputs have the first.
    """

    @property
    def suffixes(self) -> tuple[str, ...]: ...


@runtime_checkable
class WritableContainer(FileContainer, Protocol):
    """A container of one file that can be written."""

    def lay_out(self, tensors: Sequence[TensorSpec], like: Shard | None = None, alignment: int = 1) -> FileLayout:
        """The layout of a file with these tensors. The same input gives the same layout.

        Args:
            tensors: Tensors in the order of the file.
            like: The shard that the file replaces. Its metadata is kept, and its header too if no tensor changed size.
            alignment: The data begins at a multiple of it.

        Raises:
            FitError: the container cannot hold such a tensor.
        """


def one_file(shard: Shard, config: Mapping[str, Any] | None = None) -> dict[str, ShardSet]:
    """The result of `Container.open` for a file that holds a whole plain model."""
    return {"": ShardSet(shard.path.parent, (shard,), config=config or {})}


def stored_tensors(
    file: File, entries: Iterable[tuple[Any, Any, Any, Any]], begin: int = 0
) -> tuple[StoredTensor, ...]:
    """Contiguous tensors by the header of an untrusted file, each checked.

    Args:
        file: The file that holds them.
        entries: Name, type as safetensors calls it (``BF16``), sizes, and position of the first byte.
        begin: Where the data begins, if positions count from there.

    Raises:
        MalformedError: a wrong type, an unknown dtype, invalid sizes, bytes outside the file, or a name twice.
    """
    tensors: dict[str, StoredTensor] = {}
    for name, label, shape, offset in entries:
        if not isinstance(name, str):
            raise MalformedError("the name of a tensor is not a string", file=file.path)
        dtype = next((dtype for dtype in DType if dtype.label == label), None)
        if dtype is None:
            raise MalformedError("unknown dtype", file=file.path, tensor=name)
        if not isinstance(shape, list | tuple) or len(shape) > MAX_DIMS or not all(map(is_size, shape)):
            raise MalformedError(f"its shape is not a list of at most {MAX_DIMS} sizes", file=file.path, tensor=name)
        bits = math.prod(shape) * dtype.bits
        if bits % 8:
            raise MalformedError(f"{bits} bits are not whole bytes", file=file.path, tensor=name)
        if type(offset) is not int or offset < 0 or begin + offset + bits // 8 > file.size:
            raise MalformedError("its bytes are not inside the file", file=file.path, tensor=name)
        if name in tensors:
            raise MalformedError("the name appears twice", file=file.path, tensor=name)
        tensors[name] = StoredTensor(name, dtype, tuple(shape), file, begin + offset, bits // 8)
    return tuple(tensors.values())


def is_size(value: object) -> bool:
    """Whether `value` can be a size, stride or offset (bool is not)."""
    return type(value) is int and 0 <= value < SIZE_LIMIT
