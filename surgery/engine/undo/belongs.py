# SPDX-License-Identifier: Apache-2.0
"""Whether an update is in a weight: what the files say, or else the weight in the update's own row and column space.

With D the update and W' the weight, ``t = <W', D> / <D, D>`` is 1 for a weight that D was added to and 0 for one that it
was not, up to what the base has along D by chance. For a low-rank D = U R V^T the same number comes from the small matrix
``U^T W' V``; what that has across R shows how large chance is there. Weights are pooled by it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surgery.engine.undo.restore import check_adapters
from surgery_formats.arrays import Array
from surgery_formats.binding.bind import Binding
from surgery_formats.binding.operation import Operation
from surgery_formats.canonical.adapter import Adapter
from surgery_formats.dtypes import DType
from surgery_formats.errors import FitError, SurgeryError
from surgery_formats.files.bounded_json import MANIFEST_LIMIT, read_object
from surgery_formats.files.output.manifest import MANIFEST
from surgery_formats.storage.base import Storage
from surgery_formats.tensors.views import positions
from surgery_formats.updates.weights import HeldWeight, WeightView

__all__ = ["Evidence", "check_belongs", "dequantised_weights", "grown_weights", "recorded_base", "recorded_inputs"]

_HEIGHT = 512  # rows of a block
_NEAR, _SHARP = 0.5, 0.2
"""How far from 1 the pooled share may be, and how uncertain."""
_ROUNDED, _ERRORS = 0.2, 6.0
"""How far from 1 it may be where it is certain, and in standard errors where it is not: of another weight it is farther."""


@dataclass(frozen=True, slots=True)
class Evidence:
    """How it is known that an adapter is in a model.

    Attributes:
        source: ``manifest``, or ``weights``.
        share: How much of the updates is in the weights, pooled; 1 by a manifest.
        noise: Standard error of `share`.
    """

    source: str
    share: float = 1.0
    noise: float = 0.0


def recorded_inputs(folder: Path) -> Mapping[str, Any] | None:
    """What a merge's manifest in `folder` says of its inputs; None without one.

    Raises:
        FitError: the folder is of another command, or holds a part of the update alone.
    """
    if not (folder / MANIFEST).is_file():
        return None
    manifest = read_object(folder / MANIFEST, MANIFEST_LIMIT)
    inputs, ledger = manifest.get("inputs"), manifest.get("ledger")
    if not isinstance(inputs, dict) or not isinstance(ledger, dict) or not isinstance(inputs.get("adapters"), list):
        return None
    if ledger.get("verb") != "merge":
        raise FitError("was not written by a merge", file=folder, hint="there is no update in it to take back")
    if inputs.get("quantized") == "residual":
        raise FitError(
            "its codes hold at most a part of the update: the rest is in the LoRA beside it",
            file=folder,
            hint="use the model without that LoRA if its codes were kept, else the base itself",
        )
    return inputs


def recorded_base(folder: Path, adapters: Sequence[tuple[Adapter, float]]) -> Mapping[str, Any] | None:
    """What a merge's manifest in `folder` says of its inputs, which `adapters` have to be among; None without one.

    Raises:
        FitError: it names other adapters or weights, or as `recorded_inputs`.
    """
    if (inputs := recorded_inputs(folder)) is None:
        return None
    try:
        check_adapters(inputs["adapters"], adapters, folder / MANIFEST)
    except SurgeryError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise FitError("its entry of adapters is damaged", file=folder / MANIFEST) from error
    return inputs


def dequantised_weights(recorded: Mapping[str, Any] | None) -> dict[str, str]:
    """By label: the format of every weight that a recorded merge dequantised."""
    kinds = recorded.get("dequantised") if recorded is not None else None
    return {
        label: kind
        for kind, labels in (kinds.items() if isinstance(kinds, dict) else ())
        if isinstance(labels, list)
        for label in labels
        if isinstance(label, str)
    }


def grown_weights(recorded: Mapping[str, Any] | None) -> frozenset[str]:
    """The labels of weights that got more columns in a recorded merge."""
    labels = recorded.get("grown") if recorded is not None else None
    return frozenset(label for label in labels if isinstance(label, str)) if isinstance(labels, list) else frozenset()


def check_belongs(binding: Binding) -> Evidence:
    """Refuse to take back what the weights do not hold, where no manifest tells.

    Raises:
        FitError: the updates are not in the weights, or nothing tells.
    """
    folder = binding.checkpoint.path
    found = [
        measured
        for edit in binding.edits.values()
        for operation in edit.operations
        if operation.update.effect == "adds" and (measured := _share(operation, edit.source)) is not None
    ]
    if not found:
        raise FitError(
            "nothing in the files tells whether this adapter is in these weights",
            file=folder,
            hint="an update that is not an addition leaves no trace of its own; give `base_rounding=`",
        )
    share, noise = _pooled(found)
    if not (abs(share - 1) < min(_NEAR, max(_ROUNDED, _ERRORS * noise)) and noise < _SHARP):
        raise FitError(
            f"along the adapter's own directions the weights hold {share:.2f} (+- {noise:.2f}) times its update: "
            "1 if it was merged, 0 if not",
            file=folder,
            hint="is this the adapter, with the weight it was merged with?",
        )
    return Evidence("weights", share, noise)


def _pooled(found: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """The mean by precision, and its error: by the errors of each, or by how they scatter, whichever is greater."""
    precisions = [1 / max(noise, 1e-12) ** 2 for _, noise in found]
    total = sum(precisions)
    mean = sum(share * precision for (share, _), precision in zip(found, precisions, strict=True)) / total
    scatter = sum(p * (share - mean) ** 2 for (share, _), p in zip(found, precisions, strict=True)) / total
    spread = math.sqrt(scatter / (len(found) - 1)) if len(found) > 1 else 0.0
    return mean, max(math.sqrt(1 / total), spread)


def _share(operation: Operation, after: Storage) -> tuple[float, float] | None:
    """How much of an update is in a weight, and the standard error; None for an update of zeros."""
    seen = WeightView(after, (), operation.view, DType.F64, "cpu", _HEIGHT)
    low_rank = operation.update.low_rank()
    if low_rank is None:
        return _share_in_full(operation, seen)
    import numpy

    B, A = low_rank.B.load(DType.F64) * low_rank.scale, low_rank.A.load(DType.F64)
    view = operation.view
    if view.shape != low_rank.shape:
        B = B[view.row_origin : view.row_origin + view.shape[0]]
        A = A[:, view.col_origin : view.col_origin + view.shape[1]]
    left, upper = numpy.linalg.qr(B)
    right, lower = numpy.linalg.qr(A.T)
    inside = numpy.zeros((left.shape[1], right.shape[1]))
    for block, rows, cols in seen.blocks():
        near = positions(left, 0, _from(rows, view.row_origin)).T
        inside += near @ block @ positions(right, 0, _from(cols, view.col_origin))
    update = upper @ lower.T
    return _along(inside, update, update.size)


def _from(index: Any, origin: int) -> Any:
    return (
        range(index.start - origin, index.stop - origin, index.step)
        if isinstance(index, range)
        else tuple(at - origin for at in index)
    )


def _along(inside: Array, update: Array, freedom: int) -> tuple[float, float] | None:
    energy = float((update * update).sum())
    if not energy > 0:
        return None
    share = float((inside * update).sum()) / energy
    across = max(float((inside * inside).sum()) - share**2 * energy, 0.0)
    return share, math.sqrt(across / max(freedom - 1, 1) / energy)


def _share_in_full(operation: Operation, seen: WeightView) -> tuple[float, float] | None:
    """The same for an update of full rank, whose noise is that of all values."""
    import numpy

    apply = operation.update.prepare(HeldWeight.zeros(seen.shape, DType.F64))
    along = energy = whole = 0.0
    count = 0
    for block, rows, cols in seen.blocks():
        delta = apply(numpy.zeros(block.shape), rows, cols)
        along += float((block * delta).sum())
        energy += float((delta * delta).sum())
        whole += float((block * block).sum())
        count += block.size
    if not energy > 0:
        return None
    share = along / energy
    return share, math.sqrt(max(whole - share**2 * energy, 0.0) / max(count - 1, 1) / energy)
