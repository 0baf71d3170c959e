# SPDX-License-Identifier: Apache-2.0
"""What training takes in memory: weights, gradients and the two moments of AdamW, by type; activations are not counted.

Counted as PEFT and torch hold them: the base as it is stored, the adapter in float32 (PEFT's ``autocast_adapter_dtype``), its
gradients and both moments in the type of what is trained. In full fine-tuning everything is in the base's own types.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from surgery_formats.dtypes import DType
from surgery_formats.models.component import Component
from surgery_formats.storage.quantised import is_coded

__all__ = ["MemoryItem", "TrainingMemory", "adapter_memory", "base_items", "full_memory"]

Item = Literal["base", "adapter", "projections", "gradients", "moments"]
_MOMENTS = 2


@dataclass(frozen=True, slots=True)
class MemoryItem:
    """Numbers of one use and one type.

    Attributes:
        item: Their use.
        dtype: As torch or the format calls the type.
        numbers: How many; of a quantised base, how many its codes stand for.
        nbytes: What they take.
    """

    item: Item
    dtype: str
    numbers: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class TrainingMemory:
    """Everything that is held from the first step on.

    Attributes:
        items: By use and type.
    """

    items: tuple[MemoryItem, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all items."""
        return sum(item.nbytes for item in self.items)

    def of(self, name: Item) -> int:
        """Bytes of one use."""
        return sum(item.nbytes for item in self.items if item.item == name)

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        rows = [
            {"item": item.item, "dtype": item.dtype, "numbers": item.numbers, "nbytes": item.nbytes}
            for item in self.items
        ]
        return {"nbytes": self.nbytes, "items": rows}


def base_items(bases: Iterable[Component]) -> tuple[MemoryItem, ...]:
    """The weights of a base as they are stored; what is tied is held once."""
    numbers: Counter[str] = Counter()
    nbytes: Counter[str] = Counter()
    for base in bases:
        for parameter in base.parameters.without(base.aliases).values():
            storage = parameter.storage
            label = storage.kind if is_coded(storage) else storage.dtype.label
            numbers[label] += parameter.numel
            nbytes[label] += parameter.nbytes
    return tuple(MemoryItem("base", label, numbers[label], nbytes[label]) for label in numbers)


def adapter_memory(base: tuple[MemoryItem, ...], trained: int, frozen: int) -> TrainingMemory:
    """Of an adapter with so many trained numbers, and so many that are only held."""
    size = DType.F32.nbytes(1)
    items = [*base, MemoryItem("adapter", DType.F32.label, trained, size * trained)]
    if frozen:
        items.append(MemoryItem("projections", DType.F32.label, frozen, size * frozen))
    items.append(MemoryItem("gradients", DType.F32.label, trained, size * trained))
    items.append(MemoryItem("moments", DType.F32.label, _MOMENTS * trained, size * _MOMENTS * trained))
    return TrainingMemory(tuple(items))


def full_memory(base: Component) -> TrainingMemory:
    """Of all weights; those that are stored as codes are held in 16 bits, for codes have no gradients."""
    numbers: Counter[DType] = Counter()
    for parameter in base.parameters.without(base.aliases).values():
        if parameter.storage.is_float or is_coded(parameter.storage):
            numbers[base.plain_dtype if is_coded(parameter.storage) else parameter.storage.dtype] += parameter.numel
    uses: Mapping[Item, int] = {"base": 1, "gradients": 1, "moments": _MOMENTS}
    return TrainingMemory(
        tuple(
            MemoryItem(use, dtype.label, times * count, dtype.nbytes(times * count))
            for use, times in uses.items()
            for dtype, count in numbers.items()
        )
    )
