# SPDX-License-Identifier: Apache-2.0
"""Weights stored as codes: what a codec has to say of its format, and what follows from that for all of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, TypeGuard

from surgery_formats.arrays import Array, assign, cast, dtype_of, to_cpu
from surgery_formats.dtypes import DType
from surgery_formats.storage.base import Encoding, PartBytes, Storage

__all__ = [
    "CONFIG_KEYS",
    "MARKER",
    "METADATA_NAMES",
    "METADATA_PLAIN",
    "Grid",
    "Quantised",
    "check_rows",
    "is_coded",
    "is_quantised",
    "keep_where",
    "put_quantised",
    "quantisation_of",
    "read_quantised",
]

CONFIG_KEYS = ("quantization_config", "compression_config", "quantization")
"""Where a config.json says how its weights are quantised; the last is MLX's."""
MARKER = "scaled_fp8"
"""An empty tensor, by which ComfyUI knows that weights whose names begin as its own have scales."""
METADATA_NAMES, METADATA_PLAIN = "tensor_names", '{"_type": "Tensor"}'
"""Where torchao lists weights in a file's metadata, and the entry under the name of one that is not quantised."""


class Grid(Protocol):
    """The numbers that the codes of some rows can stand for: their scales and offsets, as a file stores them."""

    def values(self, codes: Array, first: int = 0) -> Array:
        """What codes stand for.

        Args:
            codes: ``(rows, n)`` of all rows of the grid and of the columns from `first`, which may lie within a block.
            first: A column of the weight's matrix.

        Returns:
            float32 ``(rows, n)``, to the bit what the format defines.
        """

    def nearest(self, values: Array, first: int = 0) -> Array:
        """The codes of the nearest numbers, as `values` takes them; float32 ``(rows, n)`` that are finite."""


class Quantised(Storage, Protocol):
    """A weight stored as codes with scales. Rows and columns are those of its matrix, as `Storage.shape` has them.

    Attributes:
        bits: Of a code.
        block: ``(rows, columns)`` that share a scale; all of them, if the tensor has one.
    """

    @property
    def bits(self) -> int: ...
    @property
    def block(self) -> tuple[int, int]: ...

    def codes(self, start: int, stop: int) -> Array:
        """The codes of any rows, ``(stop - start, columns)`` in the order of the weight's columns, unpacked.

        Raises:
            MalformedError: the file ends before, or holds a code that the format does not have.
        """

    def grid(self, start: int, stop: int) -> Grid:
        """What is stored beside the codes of any rows.

        Raises:
            MalformedError, FitError: a scale is NaN or infinite, or what the format does not allow.
        """

    def fit(self, start: int, values: Array) -> Grid | None:
        """Scales chosen anew for rows of other values, as the format's own program chooses them.

        What is shared with other rows stays as it is stored.

        Args:
            start: A multiple of `group`.
            values: float32 ``(n, columns)``, finite.

        Returns:
            The grid; None where no scales can be chosen for these rows alone.
        """

    def pack(self, start: int, codes: Array, grid: Grid) -> tuple[PartBytes, ...]:
        """The bytes of rows from `start`, a multiple of `group`; see `Encoding.put`."""


_NUMBERS = frozenset(dtype.label for dtype in DType if dtype.is_float)


def is_coded(storage: Storage) -> bool:
    """Whether the values of a weight are worked out of codes, by whatever codec.

    A weight of plain numbers may have no `Storage.elements` either, where its file has them in another order.
    """
    stored: Storage = getattr(storage, "stored", storage)  # of one that is turned
    return stored.elements is None and stored.kind not in _NUMBERS


def is_quantised(storage: Encoding) -> TypeGuard[Quantised]:
    """Whether a codec of this package, or of a plugin that follows `Quantised`, reads the weight."""
    return all(hasattr(storage, member) for member in ("bits", "block", "codes", "grid", "fit", "pack"))


def quantisation_of(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The ``quantization_config`` of a config.json, also of its text model or under an older name; empty without one."""
    holders = [holder for holder in (config, config.get("text_config")) if isinstance(holder, Mapping)]
    found = [holder.get(key) for holder in holders for key in CONFIG_KEYS]
    return next((each for each in found if isinstance(each, Mapping)), {})


def read_quantised(weight: Quantised, block: Array, start: int) -> None:
    """`Storage.read_into` by the codec."""
    stop = start + len(block)
    if len(block):
        block[...] = weight.grid(start, stop).values(weight.codes(start, stop))


def put_quantised(weight: Quantised, start: int, block: Array, rounded: Array) -> tuple[PartBytes, ...]:
    """`Encoding.put` by the codec, on the scales that are stored: values that did not change keep their codes.

    Two codes may stand for one number, so that the nearest code alone need not be the one that was there.
    """
    stop = start + len(block)
    check_rows(weight, start, stop)
    values = cast(to_cpu(block), DType.F32)
    grid, codes = weight.grid(start, stop), weight.codes(start, stop)
    chosen = cast(grid.nearest(values), dtype_of(codes))
    keep_where(chosen, codes, grid.values(codes) == values)
    assign(rounded, grid.values(chosen))
    return weight.pack(start, chosen, grid)


def keep_where(chosen: Array, stored: Array, same: Array) -> None:
    """Replace codes by those that are stored where `same` is true, in place.

    By bits, because numpy's masks cost a mispredicted branch each, ten times as much.
    """
    mask = -same.view("i1").astype(chosen.dtype)  # all ones where true
    chosen ^= (chosen ^ stored) & mask


def check_rows(weight: Encoding, start: int, stop: int) -> None:
    """Raise ValueError unless rows ``[start, stop)`` are whole groups; the last group may be shorter."""
    if start % weight.group or (stop % weight.group and stop != weight.shape[0]):
        raise ValueError(f"rows {start} to {stop} are not whole groups of {weight.group}")
