# SPDX-License-Identifier: Apache-2.0
"""Bits of each weight within a number of bytes: where they take away most error for a byte.

The error of a weight is that of its outputs relative to them: over the inputs of a calibration, or else over inputs that are all alike
and independent, for which it is the weight's own. It is measured on some rows. Weights that graphs read as one have the same bits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from surgery.engine.arithmetic import check_finite
from surgery.onnx.export.code_inputs import moment_of
from surgery.onnx.export.weight_coding import WeightCoding
from surgery_formats.dtypes import DType
from surgery_formats.errors import FitError
from surgery_formats.storage.base import Storage, read_values
from surgery_formats.storage.block_format import BlockFormat
from surgery_formats.storage.nbits import NBits
from surgery_formats.text import nbytes as human

if TYPE_CHECKING:
    from surgery.engine.quantised.input_moment import SecondMoment
    from surgery_formats.arrays import Array

__all__ = ["BudgetedWeight", "Choice", "allocated", "choices_of"]

_BITS = (4, 8)
_ROWS = 256  # of a weight that are measured
_SHORT = 16


@dataclass(frozen=True, slots=True)
class BudgetedWeight:
    """A weight that bits are chosen for.

    Attributes:
        name: In the recipe.
        stored: In the checkpoint.
        source: Its values.
        turned: Whether rows are inputs.
        unit: What it is read together with; a name of its own otherwise.
        count: Matrices of a stack, one under the other.
    """

    name: str
    stored: str
    source: Storage
    turned: bool
    unit: str
    count: int = 1


@dataclass(frozen=True, slots=True)
class Choice:
    """What can be chosen for the weights of a unit.

    Attributes:
        names: The weights, under the recipe's names.
        options: ``(bits, bytes, error)``, bytes rising; 16 bits keep the weights, without an error.
    """

    names: tuple[str, ...]
    options: tuple[tuple[int, int, float], ...]


def choices_of(candidates: Sequence[BudgetedWeight], coding: WeightCoding, io: DType) -> list[Choice]:
    """Measure every candidate."""
    units: dict[str, list[BudgetedWeight]] = {}
    for candidate in candidates:
        units.setdefault(candidate.unit, []).append(candidate)
    found = []
    for members in units.values():
        options: dict[int, tuple[int, float]] = {}
        for member in members:
            for bits, nbytes, error in _measured(member, coding, io):
                before = options.get(bits, (0, 0.0))
                options[bits] = before[0] + nbytes, before[1] + error
        ordered = tuple((bits, *options[bits]) for bits in sorted(options))
        found.append(Choice(tuple(member.name for member in members), ordered))
    return found


def _measured(candidate: BudgetedWeight, coding: WeightCoding, io: DType) -> list[tuple[int, int, float]]:
    """Bytes and error of 4 and 8 bits, and bytes of what is kept."""
    import numpy as np

    source = candidate.source
    rows, columns = source.shape
    inputs = rows // candidate.count if candidate.turned else columns
    outputs = rows * columns // inputs
    if candidate.turned:
        picked = np.linspace(0, columns - 1, min(_ROWS, columns)).astype(np.int64)
        values = np.ascontiguousarray(read_values(source, 0, inputs, DType.F32).T[picked])
    else:
        starts = np.unique(np.linspace(0, rows - 1, min(_ROWS, rows)).astype(np.int64))
        values = np.concatenate([read_values(source, int(row), int(row) + 1, DType.F32) for row in starts])
    check_finite(values, DType.F32, candidate.name)
    moment = moment_of(candidate.stored, coding)
    whole = _size(values, moment)
    found = []
    for bits in _BITS:
        form = coding.form(f"int{bits}", io)
        rounded = _rounded(values, form)
        found.append((bits, form.nbytes(outputs, inputs), _size(rounded - values, moment) / max(whole, 1e-30)))
    return [*found, (_SHORT, outputs * inputs * source.dtype.bits // 8, 0.0)]


def _rounded(values: Array, form: BlockFormat) -> Array:
    import numpy as np

    rounded = np.empty_like(values)
    NBits(values.shape, form).put(0, values, rounded)
    return rounded


def _size(values: Array, moment: SecondMoment | None) -> float:
    """``sum_rows v H v^T``."""
    import numpy as np

    if moment is None:
        return float(np.square(values, dtype=np.float64).sum())
    heard = values @ moment.directions.T
    return float(np.square(heard).sum() + moment.rest * np.square(values, dtype=np.float64).sum())


def allocated(choices: Sequence[Choice], budget: int, fixed: int = 0) -> Mapping[str, int]:
    """Bits of each weight, by name; 0 keeps it.

    Args:
        choices: What there is to choose.
        budget: Most bytes.
        fixed: Bytes of all else.

    Raises:
        FitError: the fewest bits are too many.
    """
    level = [0] * len(choices)
    spent = fixed + sum(choice.options[0][1] for choice in choices)
    if spent > budget:
        raise FitError(
            f"with the fewest bits the weights take {human(spent)}, more than {human(budget)}",
            hint='a larger `block=` or `embeddings="int4"` takes less',
        )
    steps = []
    for number, choice in enumerate(choices):
        at = 0
        while at + 1 < len(choice.options):  # the steepest way up from here, so that gains for a byte only fall
            rates = [
                ((choice.options[at][2] - later[2]) / max(later[1] - choice.options[at][1], 1), -place)
                for place, later in enumerate(choice.options)
                if place > at
            ]
            rate, place = max(rates)
            steps.append((rate, number, at, -place))
            at = -place
    for rate, number, at, to in sorted(steps, key=lambda step: (-step[0], step[1], step[2])):
        cost = choices[number].options[to][1] - choices[number].options[at][1]
        if rate > 0 and level[number] == at and spent + cost <= budget:
            level[number], spent = to, spent + cost
    found: dict[str, int] = {}
    for choice, at in zip(choices, level, strict=True):
        bits = choice.options[at][0]
        found |= dict.fromkeys(choice.names, 0 if bits == _SHORT else bits)
    return found
