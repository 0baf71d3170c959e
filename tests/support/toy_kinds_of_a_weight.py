# SPDX-License-Identifier: Apache-2.0
"""Kinds of updates that no module of the product knows, and that do not add: two replace a weight, two depend on it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from surgery_formats.arrays import Array
from surgery_formats.tensors.tensor import StoredTensor
from surgery_formats.tensors.views import Index, positions, take
from surgery_formats.updates import Apply, Factor, Held, LoRA, Update, Weight
from surgery_formats.updates.base import Effect
from tests.support.toy_kinds import INPUTS, OUT, factors_in

__all__ = [
    "Lengthened",
    "Overwritten",
    "OverwrittenByTwo",
    "RowGain",
    "lengthened",
    "overwritten",
    "overwritten_by_two",
    "row_gain",
]


@dataclass(frozen=True)
class RowGain:
    """``W' = diag(g) W``: how far it goes depends on W."""

    kind: ClassVar[str] = "row gain"
    needs_weight: ClassVar[bool] = False
    effect: ClassVar[Effect] = "maps"
    rank: ClassVar[None] = None
    alpha: ClassVar[None] = None
    scale: ClassVar[None] = None
    untrained: ClassVar[tuple[StoredTensor, ...]] = ()

    gain: Factor
    inputs: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.gain.shape[0], self.inputs

    @property
    def tensors(self) -> tuple[StoredTensor, ...]:
        return self.gain.tensors

    def factors(self) -> Mapping[str, Factor]:
        return {"gain": self.gain}

    def low_rank(self) -> None:
        return None

    def parts(self) -> tuple[tuple[int, Update], ...]:
        return ((0, self),)

    def prepare(self, weight: Weight) -> Apply:
        gain = self.gain.load(weight.dtype)

        def apply(block: Array, rows: Index, cols: Index) -> Array:
            return block * positions(gain, 0, rows)[:, None]

        return apply


@dataclass(frozen=True)
class Overwritten:
    """``W' = V``, in place of the base's."""

    kind: ClassVar[str] = "overwritten"
    needs_weight: ClassVar[bool] = False
    effect: ClassVar[Effect] = "sets"
    rank: ClassVar[None] = None
    alpha: ClassVar[None] = None
    scale: ClassVar[None] = None
    held: ClassVar[Held] = "in place"
    untrained: ClassVar[tuple[StoredTensor, ...]] = ()

    stored: StoredTensor

    @property
    def shape(self) -> tuple[int, int]:
        return self.stored.matrix

    @property
    def tensors(self) -> tuple[StoredTensor, ...]:
        return (self.stored,)

    def factors(self) -> Mapping[str, Factor]:
        return {"V": Factor.of(self.stored)}

    def low_rank(self) -> None:
        return None

    def parts(self) -> tuple[tuple[int, Update], ...]:
        return ((0, self),)

    def prepare(self, weight: Weight) -> Apply:
        values = Factor.of(self.stored).load(weight.dtype)
        return lambda block, rows, cols: take(values, rows, cols).copy()


@dataclass(frozen=True)
class OverwrittenByTwo(Overwritten):
    """``W' = diag(g) V``, in place of the base's."""

    gain: Factor

    @property
    def tensors(self) -> tuple[StoredTensor, ...]:
        return (self.stored, *self.gain.tensors)

    def factors(self) -> Mapping[str, Factor]:
        return {"V": Factor.of(self.stored), "gain": self.gain}


@dataclass(frozen=True)
class Lengthened:
    """``W' = diag(m) (W + s B A)``: a direction and a length for each row, which no norm divides."""

    kind: ClassVar[str] = "lengthened"
    needs_weight: ClassVar[bool] = False
    effect: ClassVar[Effect] = "maps"
    per_row: ClassVar[bool] = True
    untrained: ClassVar[tuple[StoredTensor, ...]] = ()

    direction: LoRA
    magnitude: Factor

    @property
    def shape(self) -> tuple[int, int]:
        return self.direction.shape

    @property
    def rank(self) -> int:
        return self.direction.rank

    @property
    def alpha(self) -> float | None:
        return self.direction.alpha

    @property
    def scale(self) -> float:
        return self.direction.scale

    @property
    def tensors(self) -> tuple[StoredTensor, ...]:
        return (*self.direction.tensors, *self.magnitude.tensors)

    def factors(self) -> Mapping[str, Factor]:
        return {**self.direction.factors(), "m": self.magnitude}

    def low_rank(self) -> None:
        return None

    def rebuilt(self, direction: LoRA, magnitude: Factor) -> Lengthened:
        return Lengthened(direction, magnitude)

    def parts(self) -> tuple[tuple[int, Update], ...]:
        return ((0, self),)

    def prepare(self, weight: Weight) -> Apply:
        add, lengths = self.direction.prepare(weight), self.magnitude.load(weight.dtype)
        return lambda block, rows, cols: add(block, rows, cols) * positions(lengths, 0, rows)[:, None]


def row_gain(file: Path, seed: int = 1) -> RowGain:
    return RowGain(factors_in(file, seed, {"gain": (OUT,)})["gain"], INPUTS)


def overwritten(file: Path, seed: int = 1) -> Overwritten:
    return Overwritten(factors_in(file, seed, {"V": (OUT, INPUTS)})["V"].tensors[0])


def overwritten_by_two(file: Path, seed: int = 1) -> OverwrittenByTwo:
    found = factors_in(file, seed, {"V": (OUT, INPUTS), "gain": (OUT,)})
    return OverwrittenByTwo(found["V"].tensors[0], found["gain"])


def lengthened(file: Path, seed: int = 1) -> Lengthened:
    found = factors_in(file, seed, {"A": (3, INPUTS), "B": (OUT, 3), "m": (OUT,)})
    return Lengthened(LoRA(found["A"], found["B"], 1.5), found["m"])
