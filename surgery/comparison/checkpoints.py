# SPDX-License-Identifier: Apache-2.0
"""The difference of two checkpoints, tensor by tensor, in memory bounded by a block of rows whatever their size."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from surgery.comparison.results import CheckpointDiff, TensorDiff, TensorHeader, TensorStatus, Values
from surgery.progress import Callback, Progress
from surgery_formats.dtypes import DType
from surgery_formats.models.checkpoint import Checkpoint, Component
from surgery_formats.storage.base import Storage
from surgery_formats.storage.parameter import Parameter
from surgery_formats.storage.plain import Plain
from surgery_formats.tensors.tensor import StoredTensor

if TYPE_CHECKING:
    import torch

__all__ = ["CheckpointDiff", "diff_checkpoints"]

_BYTES = 8 << 20  # compared at a time where only equality is asked


@dataclass(slots=True)
class _DiffTotals:
    """Over tensors."""

    difference: float = 0.0
    norm: float = 0.0
    moved: float = 0.0
    numel: int = 0


def diff_checkpoints(
    a: Checkpoint,
    b: Checkpoint,
    *,
    header: bool,
    spectrum: bool,
    tolerance: float | None,
    progress: Callback | None = None,
) -> CheckpointDiff:
    """Compare two open checkpoints. See `surgery.verbs.diff.diff`."""
    pairs = _pairs(a, b)
    whole = sum(mine.nbytes for mine, theirs in pairs.values() if mine and theirs)
    done, totals, tensors = 0, _DiffTotals(), []
    for name, (mine, theirs) in pairs.items():
        if mine is None or theirs is None:
            tensors.append(
                TensorDiff(name, "only in B" if mine is None else "only in A", _header(mine), _header(theirs))
            )
            continue
        tensors.append(_pair(name, mine, theirs, header=header, spectrum=spectrum, tolerance=tolerance, totals=totals))
        done += mine.nbytes
        if progress is not None and not header:
            progress(Progress(done, whole, "comparing"))
    for checkpoint in (a, b):
        checkpoint.check_unchanged()
    known = totals.numel > 0
    size = math.sqrt(totals.norm)
    difference = (
        (math.sqrt(totals.difference) / size if size else (math.inf if totals.difference else 0.0)) if known else None
    )
    return CheckpointDiff(tuple(tensors), difference, totals.moved / totals.numel if known else None, header)


def _pairs(a: Checkpoint, b: Checkpoint) -> dict[str, tuple[Parameter | None, Parameter | None]]:
    pairs: dict[str, tuple[Parameter | None, Parameter | None]] = {}
    for part in sorted(a.components.keys() | b.components.keys()):
        mine, theirs = a.components.get(part), b.components.get(part)
        names = (mine.parameters.keys() if mine else set()) | (theirs.parameters.keys() if theirs else set())
        for name in sorted(names):
            pairs[f"{part}/{name}" if part else name] = _weight(mine, name), _weight(theirs, name)
    return pairs


def _weight(component: Component | None, name: str) -> Parameter | None:
    """The weight, or the one it is tied to: a head that one model stores and the other does not is no difference."""
    if component is None:
        return None
    return component.parameters.get(name) or component.parameters.get(component.aliases.get(name, ""))


def _header(weight: Parameter | None) -> TensorHeader | None:
    return None if weight is None else TensorHeader(weight.storage.kind, weight.sizes)


def _pair(
    name: str,
    mine: Parameter,
    theirs: Parameter,
    *,
    header: bool,
    spectrum: bool,
    tolerance: float | None,
    totals: _DiffTotals,
) -> TensorDiff:
    diff = TensorDiff(name, "equal", _header(mine), _header(theirs))
    if mine.sizes != theirs.sizes:
        return replace(diff, status="shape")
    status: TensorStatus = "equal" if mine.storage.kind == theirs.storage.kind else "dtype"
    if header:
        return replace(diff, status=status)
    if not (_numeric(mine) and _numeric(theirs)):
        if status == "equal" and not _same_bytes(mine, theirs):
            status = "values"
        return replace(diff, status=status, note="compared as bytes: there is no arithmetic for this type")
    if status == "equal" and _same_bytes(mine, theirs):
        if mine.storage.is_float:
            totals.numel += mine.numel
        return diff
    sides = _matrix(mine), _matrix(theirs)
    values = _measure(*sides)
    if mine.storage.is_float:
        totals.numel += mine.numel
        totals.norm += values.norm**2
        totals.difference += values.difference**2
        totals.moved += values.moved * mine.numel
    if status == "equal" and not _within(values, tolerance):
        status = "values"
    if spectrum and values.difference and min(sides[0].shape) > 1:
        from surgery.comparison.spectrum import profile_of_difference

        profile, note = profile_of_difference(*sides)
        return replace(diff, status=status, values=replace(values, profile=profile), note=note)
    return replace(diff, status=status, values=values)


def _within(values: Values, tolerance: float | None) -> bool:
    """No value moved (+0 and -0 are one value), or by no more than was allowed."""
    if values.moved == 0.0:
        return True
    return tolerance is not None and not values.not_finite and values.relative <= tolerance


def _numeric(weight: Parameter) -> bool:
    return weight.storage.dtype.torch_name is not None and weight.storage.dtype is not DType.C64


def _same_bytes(mine: Parameter, theirs: Parameter) -> bool:
    if len(mine.sources) != len(theirs.sources):
        return False
    return all(_same_tensor(own, other) for own, other in zip(mine.sources, theirs.sources, strict=True))


def _same_tensor(mine: StoredTensor, theirs: StoredTensor) -> bool:
    if mine.strides is not None or theirs.strides is not None or mine.nbytes != theirs.nbytes:
        return False
    if mine.place == theirs.place:
        return True
    for at in range(0, mine.nbytes, _BYTES):
        size = min(_BYTES, mine.nbytes - at)
        if mine.file.read(mine.offset + at, size) != theirs.file.read(theirs.offset + at, size):
            return False
    return True


def _matrix(weight: Parameter) -> Storage:
    """The weight flattened after its first axis, stacks of experts too."""
    elements = weight.storage.elements
    return weight.storage if elements is None else Plain.of(elements)


def _measure(mine: Storage, theirs: Storage) -> Values:
    """One pass over both, in float32 where that holds every value of the types, sums in float64."""
    import torch

    from surgery.comparison.spectrum import blocks

    half = (DType.BF16, DType.F16, DType.F8_E4M3, DType.F8_E5M2)
    dtype = torch.float32 if mine.dtype in half and theirs.dtype in half else torch.float64
    greatest = difference = norm = 0.0
    moved = strange = 0
    for left, right in zip(blocks(mine, dtype), blocks(theirs, dtype), strict=True):
        differs = left != right
        size = _norm(left)
        if not (math.isfinite(size) and math.isfinite(_norm(right))):
            finite = torch.isfinite(left) & torch.isfinite(right)
            differs &= ~(torch.isnan(left) & torch.isnan(right))
            strange += int((~finite).sum())
            left, right = torch.where(finite, left, 0.0), torch.where(finite, right, 0.0)
            size = _norm(left)
        moved += int(differs.sum())
        apart = right - left
        if apart.numel():
            greatest = max(greatest, float(apart.abs().max()))
        difference, norm = math.hypot(difference, _norm(apart)), math.hypot(norm, size)
    relative = difference / norm if norm else (0.0 if difference == 0 else math.inf)
    return Values(
        greatest, relative, moved / numel if (numel := math.prod(mine.shape)) else 0.0, strange, difference, norm
    )


def _norm(values: torch.Tensor) -> float:
    import torch

    return float(torch.linalg.vector_norm(values, dtype=torch.float64))
