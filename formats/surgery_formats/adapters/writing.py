# SPDX-License-Identifier: Apache-2.0
"""Shared by all writers: tensors from factors, a ledger of every update, and names looked up in the base."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field
from typing import TypeVar

from surgery_formats.adapters.format import Entry, Moved, NewTensor, Outcome, Rendering
from surgery_formats.adapters.hashes import HASHES
from surgery_formats.arrays import Array, namespace
from surgery_formats.binding.sizes import slices_of
from surgery_formats.canonical.adapter import Adapter, Site
from surgery_formats.dtypes import DType
from surgery_formats.errors import FitError
from surgery_formats.models.checkpoint import Checkpoint
from surgery_formats.models.names import WeightSlice
from surgery_formats.tensors.tensor import StoredTensor, Tensor
from surgery_formats.updates import Factor, Update

__all__ = [
    "OF_THE_FILE",
    "ConversionLedger",
    "commonest",
    "copied",
    "factor_dtype",
    "factor_tensor",
    "nothing_written",
    "places_of",
    "rate_of",
    "surviving_metadata",
    "whole_place",
    "zero_padded",
]

_Key = TypeVar("_Key", bound=Hashable)

OF_THE_FILE = frozenset(["format", *HASHES])  # the container's mark, and hashes of tensors: wrong in another file


@dataclass
class ConversionLedger:
    """Outcomes of every update of the source, recorded by a writer."""

    entries: list[Entry] = field(default_factory=list)
    held: dict[Site, tuple[Update, ...]] = field(default_factory=dict)

    def keep(self, site: Site, update: Update, outcome: Outcome, detail: str = "") -> None:
        """Record that `update` is in the files."""
        self.entries.append(Entry(str(site), outcome, detail))
        self.held[site] = (*self.held.get(site, ()), update)

    def drop(self, site: Site, update: Update, why: str) -> None:
        """Record that `update` is not in the files, and why."""
        self.entries.append(Entry(str(site), "dropped", f"{update.kind}: {why}"))

    def held_in_order(self, adapter: Adapter) -> dict[Site, tuple[Update, ...]]:
        """The held updates, each chain in the order that `adapter` has.

        The order matters: a replacement comes before the updates that are added to it.
        """
        kept = {site: {id(update) for update in chain} for site, chain in self.held.items()}
        return {site: tuple(u for u in adapter.updates[site] if id(u) in kept[site]) for site in self.held}

    def keep_prompt(self, prompt: Tensor) -> None:
        """Record that virtual tokens are in the files."""
        self.entries.append(Entry(prompt.name, "exact", "virtual tokens"))

    def drop_prompt(self, adapter: Adapter) -> None:
        """Record that virtual tokens are dropped, for a format that has none."""
        if adapter.prompt is not None:
            self.entries.append(Entry(adapter.prompt.table.name, "dropped", "this format has no virtual tokens"))


def nothing_written(tensor_file: str, adapter: Adapter, why: str) -> Rendering:
    """What a format renders that is only read: every update dropped, for that reason."""
    ledger = ConversionLedger()
    for site, chain in adapter.updates.items():
        for update in chain:
            ledger.drop(site, update, f"{why}, so that it is only read")
    ledger.drop_prompt(adapter)
    return Rendering(tensor_file, (), entries=tuple(ledger.entries))


def factor_dtype(factors: Iterable[Factor], *, folded: bool) -> DType:
    """The type to store a factor in: the widest it was made of; at least float32 if numbers were multiplied into it."""
    stored = [tensor.dtype for factor in factors for tensor in factor.tensors]
    widest = max(stored, key=lambda dtype: (dtype.bits, dtype is DType.BF16))
    exact = widest.is_float and len({dtype for dtype in stored if dtype.bits == widest.bits}) == 1
    return widest if exact and (widest.bits > 16 or not folded) else (DType.F64 if widest is DType.F64 else DType.F32)


def factor_tensor(
    name: str,
    factor: Factor,
    shape: tuple[int, ...],
    change: Callable[[Array], Array] | None = None,
    *,
    times: float = 1.0,
) -> NewTensor:
    """A factor as a tensor: changed (transposed, padded), then scaled. A product of several tensors counts as folded.

    Args:
        name: Key in the file.
        factor: Values.
        shape: Of the result.
        change: From the factor's values to the result's, up to a reshape.
        times: Number to multiply in.
    """

    def load() -> Array:
        moved = times == 1.0 and factor.view is None and factor.tensors[0].dtype.is_float
        values = factor.load(None if moved else DType.F64)  # values that are only moved need no wider type
        values = (values if change is None else change(values)).reshape(shape)
        return values if times == 1.0 else values * times

    dtype = factor_dtype([factor], folded=times != 1.0 or len(factor.tensors) > 1 or bool(factor.terms))
    only_moved = change is None and times == 1.0 and factor.view is None
    return NewTensor(name, dtype, shape, _moved(factor.tensors[0], load) if only_moved else load)


def zero_padded(values: Array, axis: int, size: int) -> Array:
    """`values` with zeros behind them, up to `size` along `axis`: as further directions they add nothing to a product."""
    shape = list(values.shape)
    shape[axis] = size - shape[axis]
    xp = namespace(values)
    return xp.concat([values, xp.zeros(shape, dtype=values.dtype)], axis=axis) if shape[axis] else values


def copied(name: str, tensor: Tensor) -> NewTensor:
    """A stored tensor as it is."""
    return NewTensor(name, tensor.dtype, tensor.shape, _moved(tensor, tensor.read))


def _moved(tensor: Tensor, load: Callable[[], Array]) -> Callable[[], Array]:
    """`load`, which reads `tensor`, with the mark that it does no more, where its bytes are its values in order."""
    stored = tensor.sources if isinstance(tensor, StoredTensor) or getattr(tensor, "stacked", False) else ()
    return Moved(stored, load) if stored and all(one.strides is None for one in stored) else load


def commonest(values: Iterable[_Key]) -> _Key | None:
    """The value that occurs most often, the least of those that tie; None if there are none."""
    counts = Counter(values)
    return min(counts, key=lambda value: (-counts[value], value), default=None)


def rate_of(counts: Iterable[tuple[int, int]]) -> float:
    """The rate by which each size gives its count, for ``(count, size)`` that were made as ``int(size * rate)``."""
    known = [(count, size) for count, size in counts if size]
    low = max((count / size for count, size in known), default=0.0)
    return (low + min(((count + 1) / size for count, size in known), default=low)) / 2


def surviving_metadata(adapter: Adapter, *, hashed: bool = False) -> dict[str, str]:
    """The metadata strings that are true in any file.

    Args:
        adapter: Whose.
        hashed: Whether hashes that it has are worked out again, by a packing that knows them; else they are left out.
    """
    kept = {key: value for key, value in adapter.metadata.items() if key not in OF_THE_FILE}
    return kept | {key: HASHES[key] for key in HASHES.keys() & adapter.metadata.keys()} if hashed else kept


def places_of(site: Site, base: Checkpoint, tensors: tuple[Tensor, ...]) -> tuple[WeightSlice, ...]:
    """Where the base holds the weight of `site`.

    Raises:
        FitError: it has no such weight.
    """
    slices = slices_of(site, base)
    if not slices:
        raise FitError(
            f"the base has no parameter '{site}'",
            file=tensors[0].path,
            tensor=tensors[0].name,
            hint="is this the base it was trained on?",
        )
    return slices


def whole_place(slices: tuple[WeightSlice, ...]) -> tuple[str, tuple[int, ...]] | None:
    """``(stored name, shape as stored)`` of a weight that the base holds in one tensor of its own; None otherwise."""
    place = slices[0]
    if len(slices) != 1 or not place.parameter.is_whole:
        return None
    return place.alias or place.parameter.name, place.parameter.sizes
