# SPDX-License-Identifier: Apache-2.0
"""What one adapter puts into the slots of a graph that somebody else made, weight by weight."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from surgery.onnx.export.additions import BoundAdditions, factors_of
from surgery.onnx.insert.slots import SlotShape
from surgery.onnx.run.adapter_file import AdapterFile

__all__ = ["SlotContents", "factors_for"]

Array = npt.NDArray[Any]


def factors_for(bound: BoundAdditions, name: str, shape: SlotShape) -> tuple[Array, Array]:
    """A and B of one weight, ``(in, rank)`` and ``(rank, out)``, float32."""
    size = bound.sizes[name]
    inputs = math.prod(size[1:])
    order = (size[0], inputs) if shape.table else (inputs, size[0])
    return factors_of(bound.weights[name], order, table=shape.table)


@dataclass(eq=False)
class SlotContents:
    """The arrays of one adapter, made when they are written; both of the last slot are kept.

    Attributes:
        bound: What the adapter adds to each weight.
        shapes: The slots, by weight.
        full: Parameters that it gives in full, by input.
    """

    bound: BoundAdditions
    shapes: Mapping[str, SlotShape]
    full: Mapping[str, Array]
    _last: tuple[str, dict[str, Array]] = field(default=("", {}), repr=False)

    @property
    def file(self) -> AdapterFile:
        """The file of all arrays.

        Raises:
            FitError: see `AdapterFile.of`.
        """
        specs: dict[str, tuple[np.dtype[Any], tuple[int, ...]]] = {}
        weights: dict[str, str] = {}
        for name, additions in self.bound.weights.items():
            shape, rank = self.shapes[name], sum(lora.rank for lora, _ in additions)
            for key, sizes in ((shape.slot.A, shape.down), (shape.slot.B, shape.up)):
                specs[key] = shape.dtype, tuple(rank if size is None else size for size in sizes)
                weights[key] = name
        specs |= {key: (array.dtype, array.shape) for key, array in self.full.items()}
        return AdapterFile.of(specs, lambda key: self.full[key] if key in self.full else self._made(weights[key])[key])

    def _made(self, name: str) -> dict[str, Array]:
        """Both arrays of a weight.

        Raises:
            FitError: a factor that is not finite, or that the slot's type does not hold.
        """
        if self._last[0] != name:
            shape = self.shapes[name]
            A, B = shape.shaped(*factors_for(self.bound, name, shape))
            self._last = name, {shape.slot.A: A, shape.slot.B: B}
        return self._last[1]
