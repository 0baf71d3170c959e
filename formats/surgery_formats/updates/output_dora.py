# SPDX-License-Identifier: Apache-2.0
"""AdapterHub's DoRA: ``W' = m / ||W + B A|| (W + s B A)``, ``b' = m / ||W + B A|| b`` (adapters 1.3, ``methods/lora.py``).

The library stretches what a layer gives, its bias too, and measures the lengths without the scale ``s``. Where ``s`` is 1 the weight
is a `DoRA`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from surgery_formats.arrays import Array, cast
from surgery_formats.dtypes import DType
from surgery_formats.errors import FitError
from surgery_formats.storage.parameter import Parameter
from surgery_formats.tensors.tensor import Tensor
from surgery_formats.tensors.views import Index, positions
from surgery_formats.updates.base import Apply, Effect, Factor, Fit, Weight
from surgery_formats.updates.dora import DoRA
from surgery_formats.updates.lora import LoRA
from surgery_formats.updates.weights import WeightView

__all__ = ["DoRABias", "OutputDoRA"]

_ELEMENTS = 1 << 20  # of a block of the weight beside a bias


@dataclass(frozen=True, slots=True)
class OutputDoRA:
    """AdapterHub's DoRA of a weight, where its scale is not 1: ``W' = m / ||W + B A|| (W + s B A)``.

    Attributes:
        added: The low-rank part.
        magnitude: ``m``, one value per row, ``(out,)``.
    """

    kind: ClassVar[str] = "DoRA of outputs"
    needs_weight: ClassVar[bool] = True
    effect: ClassVar[Effect] = "maps"
    untrained: ClassVar[tuple[()]] = ()

    added: LoRA
    magnitude: Factor

    @property
    def shape(self) -> tuple[int, int]:
        """Logical ``(out, in)``."""
        return self.added.shape

    @property
    def rank(self) -> int:
        """Inner size of the low-rank part."""
        return self.added.rank

    @property
    def alpha(self) -> float | None:
        """As written in the file."""
        return self.added.alpha

    @property
    def scale(self) -> float:
        """On the low-rank part that is added, not on the one that is measured."""
        return self.added.scale

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The low-rank part's, then the magnitude's."""
        return (*self.added.tensors, *self.magnitude.tensors)

    def factors(self) -> dict[str, Factor]:
        """Those of the addition, and ``magnitude``."""
        return {**self.added.factors(), "magnitude": self.magnitude}

    def low_rank(self) -> None:
        """None: the lengths of its rows depend on the weight."""

    def parts(self) -> tuple[tuple[int, OutputDoRA], ...]:
        """Itself."""
        return ((0, self),)

    def prepare(self, weight: Weight) -> Apply:
        """One pass over the weight for the lengths, in float64, then blocks."""
        gain = _gain(self.added, self.magnitude, weight, weight.dtype)
        add = self.added.prepare(weight)

        def apply(block: Array, rows: Index, cols: Index) -> Array:
            changed = add(block, rows, cols)
            changed *= positions(gain, 0, rows)[:, None]
            return changed

        return apply


@dataclass(frozen=True, slots=True)
class DoRABias:
    """AdapterHub's DoRA of a bias: ``b' = m / ||W + B A|| b``, W the weight beside it.

    Attributes:
        added: The low-rank part of the weight.
        magnitude: ``m``, ``(out,)``.
        beside: The weight of the layer; None until `fitted`.
    """

    kind: ClassVar[str] = "DoRA of a bias"
    needs_weight: ClassVar[bool] = False
    effect: ClassVar[Effect] = "maps"
    rank: ClassVar[None] = None
    alpha: ClassVar[None] = None
    scale: ClassVar[None] = None
    untrained: ClassVar[tuple[()]] = ()

    added: LoRA
    magnitude: Factor
    beside: Parameter | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """``(n, 1)``."""
        return self.added.shape[0], 1

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The low-rank part's, then the magnitude's."""
        return (*self.added.tensors, *self.magnitude.tensors)

    def fitted(self, fit: Fit) -> DoRABias:
        """With the weight beside the bias."""
        return replace(self, beside=fit.beside)

    def factors(self) -> dict[str, Factor]:
        """Those of the addition, and ``magnitude``."""
        return {**self.added.factors(), "magnitude": self.magnitude}

    def low_rank(self) -> None:
        """None: it stretches the bias."""

    def parts(self) -> tuple[tuple[int, DoRABias], ...]:
        """Itself."""
        return ((0, self),)

    def prepare(self, weight: Weight) -> Apply:
        """One pass over the layer's weight for its lengths, in float64.

        Raises:
            FitError: the weight is not beside the bias, or has other sizes.
        """
        if self.beside is None or self.beside.shape != self.added.shape:
            has = "no weight" if self.beside is None else f"a weight of {list(self.beside.shape)}"
            raise FitError(
                f"stretches a bias by the lengths of a weight of {list(self.added.shape)}, and the base has {has} beside it",
                file=self.tensors[0].path,
                tensor=self.tensors[0].name,
                hint="is this the base it was trained on?",
            )
        storage, view = self.beside.storage, self.beside.view
        height = max(1, _ELEMENTS // storage.shape[1])
        layer = WeightView(storage, (), view, weight.dtype, weight.device, height)
        gain = _gain(self.added, self.magnitude, layer, weight.dtype)

        def apply(block: Array, rows: Index, cols: Index) -> Array:
            block *= positions(gain, 0, rows)[:, None]
            return block

        return apply


def _gain(added: LoRA, magnitude: Factor, weight: Weight, dtype: DType) -> Array:
    """``m / ||W + B A||`` of every row."""
    lengths = DoRA(replace(added, scale=1.0), magnitude).lost(weight)
    return cast(magnitude.load(DType.F64, weight.device) / lengths, dtype)
