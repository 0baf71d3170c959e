# SPDX-License-Identifier: Apache-2.0
"""Kinds of updates that no module of the product knows: one of low rank, one that adds without it, one that depends on the base."""

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
from surgery_formats.updates import Apply, Factor, LoRA, Update, Weight
from surgery_formats.updates.base import Effect

__all__ = ["GainedLoRA", "OuterSine", "RowGain", "adapter_of", "gained_lora", "outer_sine", "row_gain"]

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


def adapter_of(update: Update, module: str = "model.layers.0.self_attn.q_proj") -> Adapter:
    """An adapter in memory that does `update` to one linear layer."""
    site = Site(f"{module}.weight", module_kind="linear")
    path = update.tensors[0].file.path
    return Adapter(path, "toy", update.kind, {site: (update,)}, update.tensors)
