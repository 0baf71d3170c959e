# SPDX-License-Identifier: Apache-2.0
"""Pair the tensors of a fine-tune with those of its base, and read their differences as matrices.

Tensors that do not fit together are refused by name. A difference is never kept: each use reads it again, in blocks of rows.
Subtraction is done in float32, or in float64 where either side is stored so.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from surgery_formats.dtypes import DType
from surgery_formats.errors import FitError
from surgery_formats.models.checkpoint import Component
from surgery_formats.storage.base import read_values
from surgery_formats.storage.plain import Plain
from surgery_formats.tensors.tensor import StoredTensor
from surgery_formats.text import closest, listing, show

if TYPE_CHECKING:
    import torch

__all__ = ["BLOCK_ELEMENTS", "Delta", "Pair", "StoredDelta", "Strip", "differing_settings", "pair_up"]

Match = Literal["pair", "alias", "derivable"]


@dataclass(frozen=True, slots=True)
class Pair:
    """A tensor of TUNED and the tensor of BASE that it was tuned from.

    Attributes:
        name: TUNED's name for it. An untied head has its own name even where BASE stores none.
        base: BASE's tensor; for a head that only TUNED stores apart, BASE's embedding.
        tuned: TUNED's tensor.
        match: ``pair`` if the two are compared, ``alias`` if it is another name of a tensor that is compared, ``derivable`` if the model
            computes it when it is built.
        why: Remark for the ledger.
    """

    name: str
    base: StoredTensor
    tuned: StoredTensor
    match: Match = "pair"
    why: str = ""

    @property
    def grown(self) -> int:
        """Number of rows that TUNED has and BASE lacks."""
        return self.tuned.shape[0] - self.base.shape[0] if self.tuned.shape else 0


def pair_up(base: Component, tuned: Component) -> tuple[Pair, ...]:
    """Pair every tensor of TUNED with its tensor in BASE, in TUNED's order.

    Raises:
        FitError: the architectures or shapes differ, or one of them lacks a tensor.
    """
    _check_kind(base, tuned)
    pairs, lacking, matched = [], [], set()
    for name, tensor in tuned.tensors.items():
        source = tuned.aliases.get(name)
        if source and source in tuned.tensors and tuned.tensors[source].place == tensor.place:
            pairs.append(Pair(name, tensor, tensor, "alias", f"tied to {source}"))
            continue
        if any(f".{name}".endswith(f".{leaf}") for leaf in tuned.family.derivable):
            pairs.append(Pair(name, tensor, tensor, "derivable", "computed when the model is built"))
            continue
        source_tensor = (
            base.tensors.get(name) or base.tensors.get(base.aliases.get(name, "")) or _elsewhere(name, base, tensor)
        )
        if source_tensor is None:
            lacking.append(name)
            continue
        matched.add(source_tensor.name)
        pairs.append(Pair(name, source_tensor, tensor))
    if lacking:
        raise FitError(
            f"BASE lacks {len(lacking)} of TUNED's {len(tuned.tensors)} tensors: {listing(lacking)}",
            file=tuned.folder,
            tensor=lacking[0],
            hint=(closest(lacking[0], base.tensors) if len(lacking) == 1 else "")
            or "is this the base it was tuned from?",
        )
    missing = [
        name
        for name in base.tensors
        if name not in matched
        and name not in tuned.tensors
        and base.aliases.get(name, tuned.aliases.get(name)) not in tuned.tensors
        and not any(f".{name}".endswith(f".{leaf}") for leaf in base.family.derivable)
    ]
    if missing:
        raise FitError(
            f"TUNED lacks {len(missing)} of BASE's {len(base.tensors)} tensors: {listing(missing)}",
            file=tuned.folder,
            tensor=missing[0],
            hint=(closest(missing[0], tuned.tensors) if len(missing) == 1 else "")
            or "is this the base it was tuned from?",
        )
    mismatched = [pair for pair in pairs if pair.base.shape != pair.tuned.shape and not _may_grow(pair, tuned)]
    if mismatched:
        pair = mismatched[0]
        raise FitError(
            f"{list(pair.tuned.shape)} in TUNED, {list(pair.base.shape)} in BASE ({len(mismatched)} tensors differ in shape: "
            f"{listing(pair.name for pair in mismatched)})",
            file=pair.tuned.file.path,
            tensor=pair.name,
            hint="is this the base it was tuned from?",
        )
    for pair in pairs:
        _check_types(pair)
    return tuple(pairs)


def _check_types(pair: Pair) -> None:
    """Quantised codes cannot be subtracted from plain numbers, and no adapter can replace one by the other."""
    base_dtype, tuned_dtype = pair.base.dtype, pair.tuned.dtype
    if base_dtype is not tuned_dtype and not (base_dtype.is_float and tuned_dtype.is_float):
        raise FitError(
            f"{tuned_dtype.label} in TUNED, {base_dtype.label} in BASE, which cannot be subtracted",
            file=pair.tuned.file.path,
            tensor=pair.name,
            hint="take both in a plain floating-point type: F32, F16 or BF16",
        )


def _elsewhere(name: str, base: Component, tensor: StoredTensor) -> StoredTensor | None:
    """The same weight under another spelling: names of another era, or another prefix."""
    places = base.names.resolve(name)
    if len(places) != 1:
        return None
    stored = base.tensors.get(places[0].parameter.name)
    return stored if stored is not None and stored.shape == tensor.shape else None


def _may_grow(pair: Pair, tuned: Component) -> bool:
    """Only the embedding and the head that goes with it may have more rows than in BASE."""
    same = len(pair.base.shape) == 2 == len(pair.tuned.shape) and pair.base.shape[1] == pair.tuned.shape[1]
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
        f"'{key}' is {show(repr(tuned.config[key]), 60)} in TUNED and {show(repr(base.config[key]), 60)} in BASE, which no adapter holds"
        for key in _DECIDES
        if key in base.config and key in tuned.config and base.config[key] != tuned.config[key]
    )


BLOCK_ELEMENTS = 1 << 19
"""Elements per block, 2 MB of float32. Fixed, so that sums depend on nothing else."""


@dataclass(frozen=True, slots=True)
class Strip:
    """Rows ``[first, last)`` of a pair, seen as matrices ``(rows, cols)``."""

    base: Plain
    tuned: Plain
    first: int
    last: int


@dataclass(frozen=True, slots=True)
class Delta:
    """TUNED minus BASE as one logical matrix ``(out, in)``, stacked from strips.

    Attributes:
        strips: From top to bottom.
        transposed: Whether the stored matrix is ``(in, out)``; there is one strip then.
        names: TUNED's tensors.
    """

    strips: tuple[Strip, ...]
    transposed: bool = False
    names: tuple[str, ...] = field(default=())

    @property
    def stored_shape(self) -> tuple[int, int]:
        """``(rows of all strips, columns)``."""
        return sum(strip.last - strip.first for strip in self.strips), self.strips[0].tuned.shape[1]

    @property
    def shape(self) -> tuple[int, int]:
        """Logical ``(out, in)``."""
        rows, cols = self.stored_shape
        return (cols, rows) if self.transposed else (rows, cols)

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the subtraction: float64 if either side is stored so, else float32."""
        import torch

        wide = any(side.tensor.dtype is DType.F64 for strip in self.strips for side in (strip.base, strip.tuned))
        return torch.float64 if wide else torch.float32

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Stored rows ``[start, stop)`` of the difference, ``(stop - start, cols)``.

        Raises:
            FitError: NaN or Inf on one side.
        """
        import torch

        parts, at = [], 0
        for strip in self.strips:
            height = strip.last - strip.first
            low, high = max(start - at, 0), min(stop - at, height)
            if low < high:
                parts.append(_subtract(strip, strip.first + low, strip.first + high, self.dtype))
            at += height
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def whole(self) -> torch.Tensor:
        """The logical matrix in one piece, read now."""
        stored = self.rows(0, self.stored_shape[0])
        return stored.T.contiguous() if self.transposed else stored

    @property
    def stored(self) -> StoredDelta:
        """The difference in its stored orientation."""
        return StoredDelta(self)

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class StoredDelta:
    """A difference in its stored orientation, read again at every use; a `surgery_formats.linalg.matrix.MatrixSource`."""

    delta: Delta

    @property
    def shape(self) -> tuple[int, int]:
        """Stored ``(rows, columns)``."""
        return self.delta.stored_shape

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """See `Delta.rows`."""
        return self.delta.rows(start, stop)


def _subtract(strip: Strip, start: int, stop: int, dtype: torch.dtype) -> torch.Tensor:
    import torch

    tuned = read_values(strip.tuned, start, stop, dtype)
    difference = tuned.sub_(read_values(strip.base, start, stop, dtype))
    if difference.numel() and not bool(torch.isfinite(torch.stack(torch.aminmax(difference))).all()):
        for side in (strip.base, strip.tuned):
            if not bool(torch.isfinite(read_values(side, start, stop, dtype)).all()):
                raise FitError("holds NaN or Inf", file=side.tensor.path, tensor=side.tensor.name)
        raise FitError(
            "values or differences too large: their squares overflow float32",
            file=strip.tuned.tensor.path,
            tensor=strip.tuned.tensor.name,
        )
    return difference
