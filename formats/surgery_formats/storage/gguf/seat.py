# SPDX-License-Identifier: Apache-2.0
"""Where a weight lies in a GGUF: its tensor, its name there and in the model's code, and what may take its place."""

from __future__ import annotations

from dataclasses import dataclass

from surgery_formats.arrays import Array, assign
from surgery_formats.dtypes import DType
from surgery_formats.errors import FitError
from surgery_formats.storage.base import PartBytes, StoredPart
from surgery_formats.storage.gguf.names import Namer, Place
from surgery_formats.storage.gguf.rows import StoredRows
from surgery_formats.storage.quantised import check_rows
from surgery_formats.tensors.ggml import BY_NAME
from surgery_formats.tensors.tensor import StoredTensor

__all__ = ["AsElements", "Seat"]


@dataclass(frozen=True, slots=True)
class Seat:
    """A tensor of a GGUF, and the weight that it is.

    Attributes:
        place: The weight's name, sizes and order.
        rows: The stored tensor.
        namer: The names of the network.
    """

    place: Place
    rows: StoredRows
    namer: Namer

    @property
    def tensor(self) -> StoredTensor:
        """The stored tensor."""
        return self.rows.tensor

    @property
    def group(self) -> int:
        """Rows that are put together: a head, if its halves are interleaved."""
        return self.rows.head

    def check_place(self, name: str, sizes: tuple[int, ...]) -> None:
        """See `surgery_formats.storage.base.Housed`."""
        if name != self.place.name and not self.namer.stored_name(name):
            raise FitError(
                f"a GGUF of the architecture {self.namer.architecture} has no place for it",
                tensor=name,
                hint="merge into the model in safetensors",
            )
        if sizes != self.place.sizes:
            raise FitError(
                f"{list(sizes)} in place of {list(self.place.sizes)}: "
                "the vocabulary and all sizes of a GGUF are among its key-values, which stay as they are",
                file=self.tensor.path,
                tensor=name,
                hint="merge into the model in safetensors, and convert that",
            )

    def parts(self, name: str, dtype: DType, shape: tuple[int, ...]) -> tuple[StoredPart, ...]:
        """The tensor of an output that holds the weight as `name`."""
        stored = self.tensor.name if name == self.place.name else self.namer.stored_name(name) or name
        return (StoredPart(stored, dtype, shape),)


@dataclass(frozen=True, slots=True)
class AsElements:
    """The encoding of a weight of a GGUF as elements.

    Attributes:
        seat: Where the weight lies, or one of its name and sizes.
        dtype: Element type.
    """

    seat: Seat
    dtype: DType

    @property
    def sizes(self) -> tuple[int, ...]:
        """The weight's."""
        return self.seat.place.sizes

    @property
    def shape(self) -> tuple[int, int]:
        """The weight's."""
        return self.seat.place.shape

    @property
    def group(self) -> int:
        """See `Seat.group`."""
        return self.seat.group

    def parts(self, name: str) -> tuple[StoredPart, ...]:
        """One tensor."""
        tensor = self.seat.tensor
        return self.seat.parts(name, self.dtype, BY_NAME[tensor.packed_as].sizes(tensor.shape))

    def put(self, start: int, block: Array, rounded: Array) -> tuple[PartBytes, ...]:
        """The rows rounded to `dtype`, in the order of the file."""
        check_rows(self, start, start + len(block))
        assign(rounded, block)
        return self.seat.rows.written(start, rounded)
