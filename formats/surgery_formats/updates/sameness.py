# SPDX-License-Identifier: Apache-2.0
"""Whether two updates are the same one: equal settings, and equal factors."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import Any

from surgery_formats.arrays import to_cpu
from surgery_formats.dtypes import DType
from surgery_formats.files.equal_ranges import equal_ranges
from surgery_formats.tensors.tensor import StoredTensor, Tensor
from surgery_formats.updates.base import Factor
from surgery_formats.updates.update import Update

__all__ = ["equal_factors", "noted_tensors", "same_update", "settings"]

_AS_WRITTEN = frozenset(["alpha", "noted"])  # what a scale, a limit or a switch was read from: those are compared


def settings(update: Update) -> dict[str, Any]:
    """Everything but the trained numbers: scales, sizes, switches, and the shapes of factors."""
    names = [field.name for field in fields(update) if field.name not in _AS_WRITTEN]
    values = {name: getattr(update, name) for name in names}
    facts = {
        n: v.shape if isinstance(v, Factor) else v for n, v in values.items() if isinstance(v, Factor) or _plain(v)
    }
    return {"kind": update.kind, **facts}


def noted_tensors(update: Update) -> frozenset[Tensor]:
    """What scales, limits and switches were read from, by itself and by an update that it is made of."""
    made_of = (getattr(update, field.name) for field in fields(update))
    holders = (update, *(value for value in made_of if is_dataclass(value)))
    return frozenset(tensor for holder in holders for tensor in getattr(holder, "noted", ()))


def _plain(value: object) -> bool:
    """Whether it is made of numbers and words alone, so that nothing of it is stored in tensors."""
    if is_dataclass(value):
        return all(_plain(getattr(value, field.name)) for field in fields(value))
    if isinstance(value, tuple):
        return all(map(_plain, value))
    return value is None or isinstance(value, bool | int | float | str)


def same_update(update: Update, other: Update) -> bool:
    """Whether both do the same to every weight, as their settings and the values of their factors show."""
    if type(update) is not type(other) or settings(update) != settings(other):
        return False
    mine, theirs = update.factors(), other.factors()
    whole = (update.shape, update.scale, mine.keys()) == (other.shape, other.scale, theirs.keys())
    if not (whole and all(equal_factors(mine[name], theirs[name]) for name in mine)):
        return False
    return all(
        bool((to_cpu(a.read()) == to_cpu(b.read())).all()) for a, b in zip(_beside(update), _beside(other), strict=True)
    )


def _beside(update: Update) -> list[Tensor]:
    """Whole numbers that its equation takes from its file beside factors: indices."""
    used = {tensor for factor in update.factors().values() for tensor in factor.tensors}
    used |= noted_tensors(update)
    return [tensor for tensor in update.untrained if tensor.shape and tensor not in used and not tensor.dtype.is_float]


def equal_factors(factor: Factor, other: Factor) -> bool:
    """Whether two factors have the same shape and values, whatever types they are stored in."""
    if factor.shape != other.shape:
        return False
    if factor.view is None and other.view is None and _same_bytes(factor.tensors[0], other.tensors[0]):
        return True
    return bool((factor.load(DType.F64) == other.load(DType.F64)).all())


def _same_bytes(tensor: Tensor, other: Tensor) -> bool:
    """Whether both are stored, and as the same bytes: a copy shows it without a look at its numbers."""
    if not isinstance(tensor, StoredTensor) or not isinstance(other, StoredTensor):
        return False
    facts = [(t.dtype, t.packed_as, t.nbytes, t.strides) for t in (tensor, other)]
    if facts[0] != facts[1] or (tensor.strides is not None and tensor.shape != other.shape):
        return False
    return equal_ranges(tensor.file, tensor.offset, other.file, other.offset, tensor.nbytes)
