# SPDX-License-Identifier: Apache-2.0
"""GGUF's tensors: GGML's types of elements and blocks, under llama.cpp's names and in its order of rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
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

__all__ = ["GGUF_TENSORS"]

_CODECS: Mapping[str, AffineCodec] = {codec.type.name: codec for codec in (*LEGACY, *K_QUANTS, *CODEBOOKS)}


@dataclass(frozen=True, slots=True)
class _GgufTensors:
    name: str = "gguf"
    title: str = (
        "tensors of a GGUF: GGML's blocks (Q4_0 to Q8_0, K-quants, IQ4, MXFP4, NVFP4, TQ; IQ1 to IQ3 read only)"
    )

    def claim(self, tensors: Mapping[str, StoredTensor], config: Mapping[str, Any]) -> Iterator[Storage]:
        """Every tensor of a GGUF: the container marks them."""
        namer: Namer | None = None
        for tensor in tensors.values():
            if tensor.packed_as:
                namer = namer or Namer(config, tensor)
                yield _weight(tensor, namer)


GGUF_TENSORS = _GgufTensors()


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
    if type_.name in _CODECS:
        return GgufBlocks(seat, _CODECS[type_.name])
    if type_.name in BY_LIBRARY:
        return GgufLibrary(seat, type_.name)
    raise FitError(f"values of type {type_.name} are not read", file=tensor.path, tensor=tensor.name)
