# SPDX-License-Identifier: Apache-2.0
"""The weights that are looked for: a checkpoint's, as they are or after updates, read by rows."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from surgery.engine.blocks import BLOCK_ELEMENTS, block_height
from surgery.engine.plan import Compute
from surgery_formats.arrays import cast, wide
from surgery_formats.binding.operation import Operation
from surgery_formats.dtypes import DType
from surgery_formats.models.checkpoint import Checkpoint
from surgery_formats.storage.base import Storage, read_block
from surgery_formats.storage.plain import Elements
from surgery_formats.tensors.apply import Apply, apply_chain
from surgery_formats.tensors.views import View

if TYPE_CHECKING:
    import numpy

    from surgery_formats.binding.bind import Binding

__all__ = ["KEY", "Wanted", "label_of", "spread", "wanted_weights"]

KEY = 8
"""Elements at the beginning of a row, or of a column, by which it is looked up."""
_ROWS, _COLS = 6, 12


@dataclass(frozen=True)
class Wanted:
    """A weight of a checkpoint, as the matrix that its storage has.

    Attributes:
        component: Part of a pipeline, or empty.
        name: Its name there.
        storage: Its values.
        operations: Updates that its values get when they are read.
    """

    component: str
    name: str
    storage: Storage = field(compare=False)
    operations: tuple[Operation, ...] = field(default=(), compare=False)

    @property
    def label(self) -> str:
        """``component:name``."""
        return label_of(self.component, self.name)

    @property
    def rows(self) -> int:
        """Of its matrix."""
        return self.storage.shape[0]

    @property
    def cols(self) -> int:
        """Of its matrix; 1 for a vector."""
        return self.storage.shape[1]

    @property
    def is_vector(self) -> bool:
        """Whether it is a bias, the weight of a norm or the like."""
        return self.rows * self.cols == max(self.rows, self.cols)

    @property
    def dtype(self) -> DType:
        """Of what `block` gives."""
        return wide(self.storage.dtype) if self.operations else self.storage.dtype

    @cached_property
    def chain(self) -> list[tuple[View, Apply]]:
        """The equations of the updates, with their factors: kept from one block to the next, until `release`."""
        from surgery_formats.binding.edits import prepared

        return prepared(self.operations, self.storage, wide(self.storage.dtype), self._height)

    @cached_property
    def _height(self) -> int:
        """Rows that a merge computes at once: others would round products otherwise."""
        dtype = wide(self.storage.dtype)
        target = Elements(self.storage.sizes, self.storage.shape, dtype)
        return block_height(self.cols, Compute(self.storage, self.operations, target))

    def block(self, start: int, stop: int) -> numpy.ndarray:
        """Rows ``[start, stop)``: as stored, or in the precision of the arithmetic after updates."""
        import numpy

        if not self.operations:
            stored: numpy.ndarray = read_block(self.storage, start, stop)
            return stored
        height = self._height
        parts = []
        for at in range(start - start % height, stop, height):
            end = min(at + height, self.rows)
            values = cast(read_block(self.storage, at, end), wide(self.storage.dtype))
            apply_chain(self.chain, values, at, end)
            parts.append(values[max(start - at, 0) : stop - at])
        return numpy.concatenate(parts)

    def release(self) -> None:
        """Forget the factors: those of all weights are as large as the adapters."""
        self.__dict__.pop("chain", None)

    @cached_property
    def corner(self) -> numpy.ndarray:
        """Its first rows and columns, `KEY` of each at most."""
        values = self.block(0, min(KEY, self.rows))[:, :KEY].copy()
        self.release()
        return values

    @property
    def sampled(self) -> tuple[list[int], list[int]]:
        """The rows and columns of `sample`."""
        return spread(self.rows, _ROWS), spread(self.cols, _COLS)

    @cached_property
    def sample(self) -> numpy.ndarray:
        """A few of its elements, from all over it."""
        import numpy

        rows, cols = self.sampled
        values = numpy.concatenate([self.block(row, row + 1)[:, cols] for row in rows])
        self.release()
        return values

    @cached_property
    def is_uniform(self) -> bool:
        """Whether all its values are one, so that other tensors are likely to have them, too."""
        if self.sample.size and (self.sample != self.sample[0, 0]).any():
            return False
        height = max(1, BLOCK_ELEMENTS // max(self.cols, 1))
        starts = range(0, self.rows, height)
        uniform = all((self.block(at, min(at + height, self.rows)) == self.corner[0, 0]).all() for at in starts)
        self.release()
        return uniform

    def heads(self) -> numpy.ndarray:
        """The first `KEY` elements of every row."""
        import numpy

        height = max(1, BLOCK_ELEMENTS // max(self.cols, 1))
        parts = [self.block(at, min(at + height, self.rows))[:, :KEY].copy() for at in range(0, self.rows, height)]
        self.release()
        return numpy.concatenate(parts)


def label_of(component: str, name: str) -> str:
    """What a weight is called among those of all components: ``component:name``, of a model of one network its name."""
    return f"{component}:{name}" if component else name


def spread(count: int, most: int) -> list[int]:
    """Positions from all over a range, its ends among them, and no regular distance."""
    if count <= most:
        return list(range(count))
    return sorted({0, count - 1, *((i * i + i) * (count - 1) // (most * most) for i in range(1, most))})


def wanted_weights(checkpoint: Checkpoint, binding: Binding | None = None) -> tuple[Wanted, ...]:
    """Every weight of numbers, once: of names that share one tensor the first; after updates, if there is a binding.

    Raises:
        FitError: weights are codes that nothing reads.
    """
    found: list[Wanted] = []
    for component in checkpoint.components.values():
        component.check_read()
        for name in component.parameters:
            parameter = component.parameters[name]
            edit = binding.edits.get((component.name, name)) if binding is not None else None
            if edit is None and (name in component.aliases or not parameter.storage.is_float):
                continue
            storage = parameter.storage if edit is None else edit.source
            if min(storage.shape) > 0:
                found.append(Wanted(component.name, name, storage, () if edit is None else edit.operations))
    return tuple(found)
