# SPDX-License-Identifier: Apache-2.0
"""Pair the tensors of a fine-tune with those of its base, and read their differences as matrices.

Tensors that do not fit together are refused by name. A difference is never kept: each use reads it again, in blocks of
rows. Subtraction is done in float32, or in float64 where either side is stored so.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy

from surgery_formats.arrays import Array, all_finite, namespace
from surgery_formats.dtypes import DType
from surgery_formats.errors import FitError
from surgery_formats.models.component import Component
from surgery_formats.storage.aligned import aligned
from surgery_formats.storage.base import Storage, read_block, read_values
from surgery_formats.storage.parameter import Parameter
from surgery_formats.text import closest, listing, show

__all__ = [
    "BLOCK_ELEMENTS",
    "Delta",
    "Pair",
    "Strip",
    "check_finite",
    "differing_settings",
    "nbytes_of",
    "not_finite",
    "pair_up",
    "path_of",
]

Match = Literal["pair", "alias", "derivable"]


@dataclass(frozen=True, slots=True)
class Pair:
    """A weight of TUNED and the weight of BASE that it was tuned from.

    Attributes:
        name: TUNED's name for it. An untied head has its own name even where BASE stores none.
        base: BASE's weight; for a head that only TUNED stores apart, BASE's embedding.
        tuned: TUNED's weight.
        match: ``pair`` if the two are compared, ``alias`` if it is another name of a weight that is compared,
            ``derivable`` if the model computes it when it is built.
        why: Remark for the ledger.
    """

    name: str
    base: Storage
    tuned: Storage
    match: Match = "pair"
    why: str = ""

    @property
    def numel(self) -> int:
        """Number of TUNED's values."""
        return math.prod(self.tuned.sizes)

    @property
    def nbytes(self) -> int:
        """Size of what TUNED stores."""
        return nbytes_of(self.tuned)

    @property
    def is_float(self) -> bool:
        """Whether both hold numbers that can be subtracted."""
        return self.base.is_float and self.tuned.is_float

    def matrices(self, *, stacked: bool = False) -> tuple[Storage, Storage]:
        """Both sides as matrices whose rows and columns agree; see `surgery_formats.storage.aligned.aligned`."""
        return aligned(self.base, self.tuned, stacked=stacked)

    @property
    def grown(self) -> int:
        """Number of rows that TUNED has and BASE lacks."""
        return self.tuned.sizes[0] - self.base.sizes[0] if self.tuned.sizes else 0


def pair_up(base: Component, tuned: Component) -> tuple[Pair, ...]:
    """Pair every tensor of TUNED with its tensor in BASE, in TUNED's order.

    Raises:
        FitError: the architectures or shapes differ, or one of them lacks a tensor.
    """
    _check_kind(base, tuned)
    for component in (base, tuned):
        component.check_read()
    pairs, lacking, matched = [], [], set()
    originals, weights = base.parameters, tuned.parameters
    for name, parameter in weights.items():
        weight, source = parameter.storage, tuned.aliases.get(name)
        if source and source in weights and _places(weights[source].storage) == _places(weight):
            pairs.append(Pair(name, weight, weight, "alias", f"tied to {source}"))
            continue
        if any(f".{name}".endswith(f".{leaf}") for leaf in tuned.family.derivable):
            pairs.append(Pair(name, weight, weight, "derivable", "computed when the model is built"))
            continue
        original = originals.get(name) or originals.get(base.aliases.get(name, "")) or _elsewhere(name, base, weight)
        if original is None:
            lacking.append(name)
            continue
        matched.add(original.name)
        pairs.append(Pair(name, original.storage, weight))
    if lacking:
        raise FitError(
            f"BASE lacks {len(lacking)} of TUNED's {len(weights)} tensors: {listing(lacking)}",
            file=tuned.folder,
            tensor=lacking[0],
            hint=(closest(lacking[0], originals) if len(lacking) == 1 else "") or "is this the base it was tuned from?",
        )
    missing = [
        name
        for name in originals
        if name not in matched
        and name not in weights
        and base.aliases.get(name, tuned.aliases.get(name)) not in weights
        and not any(f".{name}".endswith(f".{leaf}") for leaf in base.family.derivable)
    ]
    if missing:
        raise FitError(
            f"TUNED lacks {len(missing)} of BASE's {len(originals)} tensors: {listing(missing)}",
            file=tuned.folder,
            tensor=missing[0],
            hint=(closest(missing[0], weights) if len(missing) == 1 else "") or "is this the base it was tuned from?",
        )
    mismatched = [pair for pair in pairs if pair.base.sizes != pair.tuned.sizes and not _may_grow(pair, tuned)]
    if mismatched:
        pair = mismatched[0]
        raise FitError(
            f"{list(pair.tuned.sizes)} in TUNED, {list(pair.base.sizes)} in BASE ({len(mismatched)} tensors differ in "
            f"shape: {listing(pair.name for pair in mismatched)})",
            file=path_of(pair.tuned),
            tensor=pair.name,
            hint="is this the base it was tuned from?",
        )
    for pair in pairs:
        _check_types(pair)
    return tuple(pairs)


def _check_types(pair: Pair) -> None:
    """Quantised codes cannot be subtracted from plain numbers, and no adapter can replace one by the other."""
    if pair.base.dtype is not pair.tuned.dtype and not pair.is_float:
        raise FitError(
            f"{pair.tuned.kind} in TUNED, {pair.base.kind} in BASE, which cannot be subtracted",
            file=path_of(pair.tuned),
            tensor=pair.name,
            hint="take both in a plain floating-point type: F32, F16 or BF16",
        )


def _places(storage: Storage) -> list[object]:
    return [source.place for source in storage.sources]


def nbytes_of(storage: Storage) -> int:
    """Size of what is stored of a weight."""
    return sum(source.nbytes for source in storage.sources)


def path_of(storage: Storage) -> Path | None:
    """The file of a weight, for messages."""
    return storage.sources[0].path if storage.sources else None


def _elsewhere(name: str, base: Component, weight: Storage) -> Parameter | None:
    """The same weight under another spelling: names of another era, or another prefix."""
    places = base.names.resolve(name)
    if len(places) != 1:
        return None
    original = base.parameters.get(places[0].parameter.name)
    return original if original is not None and original.sizes == weight.sizes else None


def _may_grow(pair: Pair, tuned: Component) -> bool:
    """Only the embedding and the head that goes with it may have more rows than in BASE."""
    same = len(pair.base.sizes) == 2 == len(pair.tuned.sizes) and pair.base.sizes[1] == pair.tuned.sizes[1]
    return same and pair.grown > 0 and pair.name in (tuned.embedding, tuned.head)


_DECIDES = (
    "rope_theta",
    "rope_scaling",
    "hidden_act",
    "rms_norm_eps",
    "layer_norm_eps",
    "num_attention_heads",
    "sliding_window",
)


def _check_kind(base: Component, tuned: Component) -> None:
    """Compare the architectures: tensors of equal shapes may mean different things."""
    for key in ("model_type", "_class_name"):
        base_kind, tuned_kind = base.config.get(key), tuned.config.get(key)
        if base_kind and tuned_kind and base_kind != tuned_kind:
            raise FitError(
                f"TUNED is a '{show(tuned_kind)}', BASE is a '{show(base_kind)}'",
                file=tuned.folder,
                hint="extract from the base that TUNED was tuned from",
            )


def differing_settings(base: Component, tuned: Component) -> tuple[str, ...]:
    """Warnings about settings that change what the model computes and that no adapter can hold."""
    return tuple(
        f"'{key}' is {show(repr(tuned.config[key]), 60)} in TUNED and {show(repr(base.config[key]), 60)} in BASE, "
        "which no adapter holds"
        for key in _DECIDES
        if key in base.config and key in tuned.config and base.config[key] != tuned.config[key]
    )


BLOCK_ELEMENTS = 1 << 19
"""Elements per block, 2 MB of float32. Fixed, so that sums depend on nothing else."""


@dataclass(frozen=True, slots=True)
class Strip:
    """Rows ``[first, last)`` of a pair, seen as matrices ``(rows, cols)``."""

    base: Storage
    tuned: Storage
    first: int
    last: int

    @property
    def height(self) -> int:
        """Number of rows."""
        return self.last - self.first


@dataclass(frozen=True, slots=True)
class Delta:
    """TUNED minus BASE as one logical matrix ``(out, in)``, stacked from strips.

    Its rows are stored ones, read again at every use: a `surgery_formats.linalg.matrix.MatrixSource`.

    Attributes:
        strips: From top to bottom.
        transposed: Whether the stored matrix is ``(in, out)``; there is one strip then.
        names: TUNED's tensors.
    """

    strips: tuple[Strip, ...]
    transposed: bool = False
    names: tuple[str, ...] = field(default=())

    @property
    def shape(self) -> tuple[int, int]:
        """Stored ``(rows of all strips, columns)``."""
        return sum(strip.height for strip in self.strips), self.strips[0].tuned.shape[1]

    @property
    def logical_shape(self) -> tuple[int, int]:
        """Logical ``(out, in)``."""
        rows, cols = self.shape
        return (cols, rows) if self.transposed else (rows, cols)

    @property
    def dtype(self) -> DType:
        """Precision of the subtraction: float64 if either side is stored so, else float32."""
        wide = any(side.dtype is DType.F64 for strip in self.strips for side in (strip.base, strip.tuned))
        return DType.F64 if wide else DType.F32

    def rows(self, start: int, stop: int) -> Array:
        """Stored rows ``[start, stop)`` of the difference, ``(stop - start, cols)``.

        Raises:
            FitError: NaN or Inf on one side.
        """
        parts, at = [], 0
        for strip in self.strips:
            low, high = max(start - at, 0), min(stop - at, strip.height)
            if low < high:
                parts.append(_subtract(strip, strip.first + low, strip.first + high, self.dtype))
            at += strip.height
        return parts[0] if len(parts) == 1 else namespace(*parts).concat(parts)

    def whole(self) -> Array:
        """The logical matrix in one piece, read now."""
        stored = self.rows(0, self.shape[0])
        return namespace(stored).asarray(stored.T, copy=True, order="C") if self.transposed else stored

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


def _subtract(strip: Strip, start: int, stop: int, dtype: DType) -> Array:
    difference = read_values(strip.tuned, start, stop, dtype)
    with numpy.errstate(invalid="ignore", over="ignore"):  # seen below
        difference -= read_values(strip.base, start, stop, dtype)
    if not all_finite(difference):
        raise not_finite(strip.base, strip.tuned)
    return difference


def check_finite(side: Storage, start: int, stop: int) -> None:
    """Check rows ``[start, stop)`` of a tensor.

    Raises:
        FitError: NaN or Inf among them.
    """
    step = max(1, BLOCK_ELEMENTS // max(side.shape[1], 1))
    for at in range(start, stop, step):
        if not all_finite(read_block(side, at, min(at + step, stop))):
            raise FitError("holds NaN or Inf", file=path_of(side), tensor=side.name)


def not_finite(base: Storage, tuned: Storage) -> FitError:
    """The error for a difference that is not finite.

    Raises:
        FitError: NaN or Inf on one side, which it names.
    """
    for side in (base, tuned):
        check_finite(side, 0, side.shape[0])
    text = "values or differences too large: their squares overflow"
    return FitError(text, file=path_of(tuned), tensor=tuned.name)
