# SPDX-License-Identifier: Apache-2.0
"""Kinds of updates that no module of the product knows.

One is of low rank, one a stack of such, one is stored in full, one adds without either, one replaces a weight, two depend on the base.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
from safetensors.numpy import save_file

from surgery_formats.arrays import Array
from surgery_formats.canonical.adapter import Adapter, Site
from surgery_formats.containers.safetensors import open_safetensors
from surgery_formats.tensors.tensor import StoredTensor
from surgery_formats.tensors.views import Index, positions, take
from surgery_formats.updates import Apply, Factor, Held, LoRA, Offset, Update, Weight
from surgery_formats.updates.base import Effect

__all__ = [
    "GainedExperts",
    "GainedLoRA",
    "Halves",
    "Lengthened",
    "OuterSine",
    "Overwritten",
    "OverwrittenByTwo",
    "RowGain",
    "adapter_of",
    "gained_experts",
    "gained_lora",
    "halves",
    "lengthened",
    "outer_sine",
    "overwritten",
    "overwritten_by_two",
    "row_gain",
]

OUT, INPUTS = 32, 32


@dataclass(frozen=True)
class GainedLoRA:
    """``W' = W + s diag(g) B A``: of low rank, with a factor that LoRA does not have."""

    kind: ClassVar[str] = "gained LoRA"
    needs_weight: ClassVar[bool] = False
    effect: ClassVar[Effect] = "adds"
    alpha: ClassVar[None] = None
    untrained: ClassVar[tuple[StoredTensor, ...]] = ()

    A: Factor
    B: Factor
    gain: Factor
    scale: float

    @property
    def rank(self) -> int:
        return self.A.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        return self.B.shape[0], self.A.shape[1]

    @property
    def tensors(self) -> tuple[StoredTensor, ...]:
        return (*self.A.tensors, *self.B.tensors, *self.gain.tensors)

    def factors(self) -> Mapping[str, Factor]:
        return {"A": self.A, "B": self.B, "gain": self.gain}

    def scaled(self, weight: float) -> GainedLoRA:
        return replace(self, scale=self.scale * weight)

    def low_rank(self) -> LoRA:
        B = Factor.computed((self.B, self.gain), self.B.shape, lambda b, gain: b * gain[:, None])
        return LoRA(self.A, B, self.scale)

    def parts(self) -> tuple[tuple[int, Update], ...]:
        return ((0, self),)

    def prepare(self, weight: Weight) -> Apply:
        return self.low_rank().prepare(weight)


@dataclass(frozen=True)
class OuterSine:
    """``W' = W + s sin(u v^T)``: the same whatever W is, and of full rank."""

    kind: ClassVar[str] = "outer sine"
    needs_weight: ClassVar[bool] = False
    effect: ClassVar[Effect] = "adds"
    rank: ClassVar[None] = None
    alpha: ClassVar[None] = None
    untrained: ClassVar[tuple[StoredTensor, ...]] = ()

    u: Factor
    v: Factor
    scale: float = 1.0

    @property
    def shape(self) -> tuple[int, int]:
        return self.u.shape[0], self.v.shape[0]

    @property
    def tensors(self) -> tuple[StoredTensor, ...]:
        return (*self.u.tensors, *self.v.tensors)

    def factors(self) -> Mapping[str, Factor]:
        return {"u": self.u, "v": self.v}

    def scaled(self, weight: float) -> OuterSine:
        return replace(self, scale=self.scale * weight)

    def low_rank(self) -> None:
        return None

    def parts(self) -> tuple[tuple[int, Update], ...]:
        return ((0, self),)

    def prepare(self, weight: Weight) -> Apply:
        delta = np.sin(np.outer(self.u.load(weight.dtype), self.v.load(weight.dtype))) * self.scale
        return lambda block, rows, cols: block + take(delta, rows, cols)


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
class Halves:
    """``W' = W + s (high + low)``: stored in full, as two tensors."""

    kind: ClassVar[str] = "halves"
    needs_weight: ClassVar[bool] = False
    effect: ClassVar[Effect] = "adds"
    rank: ClassVar[None] = None
    alpha: ClassVar[None] = None
    untrained: ClassVar[tuple[StoredTensor, ...]] = ()

    high: Factor
    low: Factor
    scale: float = 1.0

    @property
    def shape(self) -> tuple[int, int]:
        return self.high.shape[0], self.high.shape[1]

    @property
    def tensors(self) -> tuple[StoredTensor, ...]:
        return (*self.high.tensors, *self.low.tensors)

    def factors(self) -> Mapping[str, Factor]:
        return {"high": self.high, "low": self.low}

    def scaled(self, weight: float) -> Halves:
        return replace(self, scale=self.scale * weight)

    def low_rank(self) -> None:
        return None

    def in_full(self) -> Offset:
        return Offset(Factor.computed((self.high, self.low), self.high.shape, np.add), self.scale)

    def parts(self) -> tuple[tuple[int, Update], ...]:
        return ((0, self),)

    def prepare(self, weight: Weight) -> Apply:
        return self.in_full().prepare(weight)


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


@dataclass(frozen=True)
class GainedExperts:
    """A stack of `GainedLoRA`."""

    kind: ClassVar[str] = "gained experts"
    needs_weight: ClassVar[bool] = False
    effect: ClassVar[Effect] = "adds"
    alpha: ClassVar[None] = None
    untrained: ClassVar[tuple[StoredTensor, ...]] = ()

    experts: tuple[GainedLoRA, ...]

    @property
    def rank(self) -> int:
        return self.experts[0].rank

    @property
    def scale(self) -> float:
        return self.experts[0].scale

    @property
    def shape(self) -> tuple[int, int]:
        return OUT * len(self.experts), INPUTS

    @property
    def tensors(self) -> tuple[StoredTensor, ...]:
        return tuple(tensor for expert in self.experts for tensor in expert.tensors)

    def factors(self) -> Mapping[str, Factor]:
        return {f"{name}{e}": f for e, expert in enumerate(self.experts) for name, f in expert.factors().items()}

    def scaled(self, weight: float) -> GainedExperts:
        return GainedExperts(tuple(expert.scaled(weight) for expert in self.experts))

    def low_rank(self) -> None:
        return None

    def parts(self) -> tuple[tuple[int, Update], ...]:
        return tuple((OUT * e, expert) for e, expert in enumerate(self.experts))

    def prepare(self, weight: Weight) -> Apply:
        raise TypeError("applied by its parts")


def _factors(file: Path, seed: int, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Factor]:
    draw = np.random.default_rng(seed)
    save_file({name: np.float32(0.3 * draw.standard_normal(shape)) for name, shape in shapes.items()}, file)
    return {tensor.name: Factor.of(tensor) for tensor in open_safetensors(file).tensors}


def gained_lora(file: Path, seed: int = 1, rank: int = 3) -> GainedLoRA:
    found = _factors(file, seed, {"A": (rank, INPUTS), "B": (OUT, rank), "gain": (OUT,)})
    return GainedLoRA(found["A"], found["B"], found["gain"], 1.5)


def outer_sine(file: Path, seed: int = 1) -> OuterSine:
    found = _factors(file, seed, {"u": (OUT,), "v": (INPUTS,)})
    return OuterSine(found["u"], found["v"])


def row_gain(file: Path, seed: int = 1) -> RowGain:
    return RowGain(_factors(file, seed, {"gain": (OUT,)})["gain"], INPUTS)


def halves(file: Path, seed: int = 1) -> Halves:
    found = _factors(file, seed, {"high": (OUT, INPUTS), "low": (OUT, INPUTS)})
    return Halves(found["high"], found["low"], 0.5)


def overwritten(file: Path, seed: int = 1) -> Overwritten:
    return Overwritten(_factors(file, seed, {"V": (OUT, INPUTS)})["V"].tensors[0])


def overwritten_by_two(file: Path, seed: int = 1) -> OverwrittenByTwo:
    found = _factors(file, seed, {"V": (OUT, INPUTS), "gain": (OUT,)})
    return OverwrittenByTwo(found["V"].tensors[0], found["gain"])


def lengthened(file: Path, seed: int = 1) -> Lengthened:
    found = _factors(file, seed, {"A": (3, INPUTS), "B": (OUT, 3), "m": (OUT,)})
    return Lengthened(LoRA(found["A"], found["B"], 1.5), found["m"])


def gained_experts(folder: Path, seeds: tuple[int, ...] = (1, 2, 3)) -> GainedExperts:
    return GainedExperts(tuple(gained_lora(folder / f"{seed}.safetensors", seed) for seed in seeds))


def adapter_of(update: Update, module: str = "model.layers.0.self_attn.q_proj") -> Adapter:
    """An adapter in memory that does `update` to one linear layer."""
    site = Site(f"{module}.weight", module_kind="linear")
    path = update.tensors[0].file.path
    return Adapter(path, "toy", update.kind, {site: (update,)}, update.tensors)
