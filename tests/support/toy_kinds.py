# SPDX-License-Identifier: Apache-2.0
"""Kinds of updates that no module of the product knows, and that add the same to any weight.

One is of low rank, one a stack of such, one is stored in full, one is neither.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
from safetensors.numpy import save_file

from surgery_formats.canonical.adapter import Adapter, Site
from surgery_formats.containers.safetensors import open_safetensors
from surgery_formats.tensors.tensor import StoredTensor
from surgery_formats.tensors.views import take
from surgery_formats.updates import Apply, Factor, LoRA, Offset, Update, Weight
from surgery_formats.updates.base import Effect

__all__ = [
    "INPUTS",
    "OUT",
    "GainedExperts",
    "GainedLoRA",
    "Halves",
    "OuterSine",
    "adapter_of",
    "factors_in",
    "gained_experts",
    "gained_lora",
    "halves",
    "outer_sine",
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


def factors_in(file: Path, seed: int, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Factor]:
    """Random factors of `shapes`, stored in `file`."""
    draw = np.random.default_rng(seed)
    save_file({name: np.float32(0.3 * draw.standard_normal(shape)) for name, shape in shapes.items()}, file)
    return {tensor.name: Factor.of(tensor) for tensor in open_safetensors(file).tensors}


def gained_lora(file: Path, seed: int = 1, rank: int = 3) -> GainedLoRA:
    found = factors_in(file, seed, {"A": (rank, INPUTS), "B": (OUT, rank), "gain": (OUT,)})
    return GainedLoRA(found["A"], found["B"], found["gain"], 1.5)


def outer_sine(file: Path, seed: int = 1) -> OuterSine:
    found = factors_in(file, seed, {"u": (OUT,), "v": (INPUTS,)})
    return OuterSine(found["u"], found["v"])


def halves(file: Path, seed: int = 1) -> Halves:
    found = factors_in(file, seed, {"high": (OUT, INPUTS), "low": (OUT, INPUTS)})
    return Halves(found["high"], found["low"], 0.5)


def gained_experts(folder: Path, seeds: tuple[int, ...] = (1, 2, 3)) -> GainedExperts:
    return GainedExperts(tuple(gained_lora(folder / f"{seed}.safetensors", seed) for seed in seeds))


def adapter_of(update: Update, module: str = "model.layers.0.self_attn.q_proj") -> Adapter:
    """An adapter in memory that does `update` to one linear layer."""
    site = Site(f"{module}.weight", module_kind="linear")
    path = update.tensors[0].file.path
    return Adapter(path, "toy", update.kind, {site: (update,)}, update.tensors)
