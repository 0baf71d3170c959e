# SPDX-License-Identifier: Apache-2.0
"""Which weight each tensor of a GGUF is: its name and order, and the codec of its type."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from surgery_formats.errors import FitError, MalformedError
from surgery_formats.storage.base import Storage
from surgery_formats.storage.gguf.affine import AffineCodec
from surgery_formats.storage.gguf.codebooks import CODEBOOKS
from surgery_formats.storage.gguf.k_quants import K_QUANTS
from surgery_formats.storage.gguf.legacy import LEGACY
from surgery_formats.storage.gguf.library import BY_LIBRARY
from surgery_formats.storage.gguf.names import Namer
from surgery_formats.storage.gguf.rows import StoredRows
from surgery_formats.storage.gguf.seat import Seat
from surgery_formats.storage.gguf.weights import GgufBlocks, GgufElements, GgufLibrary
from surgery_formats.tensors.ggml import BY_NAME
from surgery_formats.tensors.tensor import StoredTensor

__all__ = ["CODECS", "weights"]

CODECS: Mapping[str, AffineCodec] = {codec.type.name: codec for codec in (*LEGACY, *K_QUANTS, *CODEBOOKS)}


def weights(tensors: Iterable[StoredTensor], config: Mapping[str, Any]) -> Iterator[Storage]:
    """The weight that each of the tensors is.

    Raises:
        MalformedError: a tensor is not what its name and type say.
        FitError: an architecture or a type that is not read.
    """
    namer: Namer | None = None
    for tensor in tensors:
        namer = namer or Namer(config, tensor)
        yield _weight(tensor, namer)


def _weight(tensor: StoredTensor, namer: Namer) -> Storage:
    type_ = BY_NAME[tensor.packed_as]
    place = namer.place(tensor)
    rows, columns = place.shape
    if columns % type_.block:
        raise MalformedError(
            f"rows of {columns} values are not whole blocks of {type_.name}", file=tensor.path, tensor=tensor.name
        )
    seat = Seat(place, StoredRows(tensor, rows, columns // type_.block * type_.nbytes, place.head), namer)
    if type_.dtype is not None:
        return GgufElements(seat, type_.dtype)
    if place.plus_one:
        raise MalformedError(f"a norm stored as {type_.name}", file=tensor.path, tensor=tensor.name)
    if type_.name in CODECS:
        return GgufBlocks(seat, CODECS[type_.name])
    if type_.name in BY_LIBRARY:
        return GgufLibrary(seat, type_.name)
    raise FitError(f"values of type {type_.name} are not read", file=tensor.path, tensor=tensor.name)
