# SPDX-License-Identifier: Apache-2.0
"""The difference of two checkpoints, weight by weight, in memory bounded by a block of rows whatever their size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from surgery.comparison.entries import TensorDiff, TensorHeader, TensorStatus, Values
from surgery.comparison.measure import CodeTotals, measure
from surgery.comparison.quantisation_loss import QuantisationLoss
from surgery.comparison.results import CheckpointDiff
from surgery.progress import Callback, Progress
from surgery.reports.selective import ChangedWeight, SelectiveTuning, selective_tuning
from surgery_formats.dtypes import DType
from surgery_formats.models.checkpoint import Checkpoint
from surgery_formats.models.component import Component
from surgery_formats.storage.aligned import aligned, release
from surgery_formats.storage.parameter import Parameter
from surgery_formats.storage.quantised import is_coded
from surgery_formats.tensors.tensor import StoredTensor

__all__ = ["CheckpointDiff", "diff_checkpoints"]

_BYTES = 8 << 20  # compared at a time where only equality is asked


@dataclass(slots=True)
class _DiffTotals:
    """Over tensors."""

    difference: float = 0.0
    norm: float = 0.0
    moved: float = 0.0
    numel: int = 0
    codes: dict[tuple[str, str], CodeTotals] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Codes:
    """A weight in a format that is not read: its stored tensors, which have no values to compare."""

    sources: tuple[StoredTensor, ...]

    @property
    def nbytes(self) -> int:
        return sum(source.nbytes for source in self.sources)


_Weight = Parameter | _Codes


def diff_checkpoints(
    a: Checkpoint,
    b: Checkpoint,
    *,
    header: bool,
    spectrum: bool,
    tolerance: float | None,
    intruders: bool = False,
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
        if isinstance(mine, _Codes) or isinstance(theirs, _Codes):
            tensors.append(_unread(name, mine, theirs, header=header))
        else:
            tensors.append(
                _pair(
                    name, mine, theirs, header=header, spectrum=spectrum, intruders=intruders, tolerance=tolerance,
                    totals=totals,
                )
            )  # fmt: skip
        done += mine.nbytes
        if progress is not None and not header:
            progress(Progress(done, whole, "comparing"))
    release()
    for checkpoint in (a, b):
        checkpoint.check_unchanged()
    known = totals.numel > 0 and not any(entry.status == "not compared" for entry in tensors)
    size = math.sqrt(totals.norm)
    difference = (
        (math.sqrt(totals.difference) / size if size else (math.inf if totals.difference else 0.0)) if known else None
    )
    return CheckpointDiff(
        tuple(tensors),
        difference,
        totals.moved / totals.numel if known else None,
        header,
        tuple(_error(*kinds, codes) for kinds, codes in totals.codes.items()),
        _notes(a, b),
        _tuned(a, tensors) if known else None,
    )


def _tuned(checkpoint: Checkpoint, tensors: Sequence[TensorDiff]) -> SelectiveTuning | None:
    """Which part of `checkpoint` changed, if that has a name; a tied head has its embedding's change."""
    if any(entry.status not in ("equal", "values") for entry in tensors):
        return None
    changed, names, total = [], [], 0
    for part, component in checkpoint.components.items():
        by_name = {entry.name: entry for entry in tensors}
        for name, parameter in component.parameters.without(component.aliases).items():
            entry = by_name.get(f"{part}/{name}" if part else name)
            names.append(name)
            total += parameter.numel
            if entry is None or entry.status == "equal" or entry.values is None:
                continue
            height, rows = parameter.storage.shape[0], entry.values.rows
            some = rows < height and component.role(name) in ("embedding", "head")
            numbers = rows * (parameter.numel // height) if some else parameter.numel
            changed.append(ChangedWeight(name, component.role(name), numbers, rows if some else None, height))
    found = selective_tuning(changed, names, total)
    return found if changed and found.named else None


def _error(kind: str, other: str, codes: CodeTotals) -> QuantisationLoss:
    norm = codes.norm or 1.0
    nearest = codes.nearest / codes.numel if codes.numel else 1.0
    return QuantisationLoss(kind, other, codes.weights, codes.error / norm, codes.rounding / norm, nearest)


def _notes(a: Checkpoint, b: Checkpoint) -> tuple[str, ...]:
    unread = [
        f"{side}: {component.unread.message}"
        for side, checkpoint in (("A", a), ("B", b))
        for component in checkpoint.components.values()
        if component.unread is not None
    ]
    return tuple(unread)


def _pairs(a: Checkpoint, b: Checkpoint) -> dict[str, tuple[_Weight | None, _Weight | None]]:
    pairs: dict[str, tuple[_Weight | None, _Weight | None]] = {}
    for part in sorted(a.components.keys() | b.components.keys()):
        mine, theirs = a.components.get(part), b.components.get(part)
        own, other = _Weights(mine), _Weights(theirs)
        for name in sorted(own.names | other.names):
            pairs[f"{part}/{name}" if part else name] = own.get(name), other.get(name)
    return pairs


class _Weights:
    """The weights of a component by name, those that are not read as what they are."""

    def __init__(self, component: Component | None) -> None:
        self._component = component
        unread = component.unread if component is not None else None
        self._codes = {} if unread is None else {name: _Codes(parts) for name, parts in unread.weights.items()}
        self._parts = frozenset() if unread is None else unread.tensors
        named = component.parameters.keys() if component is not None else set()
        self.names = (set(named) - self._parts) | self._codes.keys()

    def get(self, name: str) -> _Weight | None:
        """The weight, or the one it is tied to: a head that one model stores and the other does not is no difference."""
        if self._component is None:
            return None
        parameters, source = self._component.parameters, self._component.aliases.get(name, "")
        if (codes := self._codes.get(name) or self._codes.get(source)) is not None:
            return codes
        return None if name in self._parts else parameters.get(name) or parameters.get(source)


def _header(weight: _Weight | None) -> TensorHeader | None:
    if weight is None:
        return None
    if isinstance(weight, _Codes):
        largest = max(weight.sources, key=lambda tensor: tensor.nbytes)
        return TensorHeader(f"{largest.dtype.label} codes", largest.shape)
    return TensorHeader(weight.storage.kind, weight.sizes)


def _unread(name: str, mine: _Weight, theirs: _Weight, *, header: bool) -> TensorDiff:
    """A weight that one side at least stores in a format which is not read."""
    diff = TensorDiff(name, "not compared", _header(mine), _header(theirs), note="its values cannot be read")
    if isinstance(mine, _Codes) and isinstance(theirs, _Codes):
        alike = [(one.name, one.dtype, one.shape) for one in mine.sources] == [
            (one.name, one.dtype, one.shape) for one in theirs.sources
        ]
        if alike and (header or _same_bytes(mine, theirs)):
            return replace(diff, status="equal", note="" if header else "equal bytes")
    return diff


def _pair(
    name: str,
    mine: Parameter,
    theirs: Parameter,
    *,
    header: bool,
    spectrum: bool,
    intruders: bool,
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
        if _counts(mine):
            totals.numel += mine.numel
        return diff
    sides = aligned(mine.storage, theirs.storage)
    codes = CodeTotals()
    values = measure(*sides, codes)
    if _counts(mine):
        totals.numel += mine.numel
        totals.norm += values.norm**2
        totals.difference += values.difference**2
        totals.moved += values.moved * mine.numel
    if codes.numel:
        coded, other = (mine, theirs) if is_coded(mine.storage) else (theirs, mine)
        kinds = coded.storage.kind, other.storage.kind
        totals.codes[kinds] = totals.codes.get(kinds, CodeTotals()).plus(codes)
    if status == "equal" and not _within(values, tolerance):
        status = "values"
    notes = []
    if values.difference and min(sides[0].shape) > 1:
        if spectrum:
            from surgery.comparison.spectrum import profile_of_difference

            profile, note = profile_of_difference(*sides)
            values, notes = replace(values, profile=profile), [note]
        if intruders:
            from surgery.comparison.intruders import intruders_of

            count, note = intruders_of(*sides)
            values, notes = replace(values, intruders=count), [*notes, note]
    return replace(diff, status=status, values=values, note="; ".join(filter(None, notes)))


def _within(values: Values, tolerance: float | None) -> bool:
    """No value moved (+0 and -0 are one value), or by no more than was allowed."""
    if values.moved == 0.0:
        return True
    return tolerance is not None and not values.not_finite and values.relative <= tolerance


def _numeric(weight: Parameter) -> bool:
    return weight.storage.dtype.torch_name is not None and weight.storage.dtype is not DType.C64


def _counts(weight: Parameter) -> bool:
    """Whether its values are numbers that a total may hold, not indices."""
    return weight.storage.is_float or weight.storage.dtype.is_float_or_fp8


def _same_bytes(mine: _Weight, theirs: _Weight) -> bool:
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
