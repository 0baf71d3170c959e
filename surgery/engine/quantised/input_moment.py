# SPDX-License-Identifier: Apache-2.0
"""The second moment of a module's inputs, as a few directions and a diagonal, for rounding with feedback."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from surgery.engine.calibration_file import raw_inputs
from surgery_formats.arrays import Array
from surgery_formats.errors import FitError
from surgery_formats.linalg.whitening import moment_of_gram, moment_of_inputs
from surgery_formats.tensors.tensor import StoredTensor

__all__ = ["SecondMoment", "second_moment"]

_MOST = 128  # directions
_DAMPING = 0.01  # of the mean of the diagonal, as GPTQ has it


@dataclass(frozen=True, slots=True)
class SecondMoment:
    """``directions^T directions + rest I`` with a diagonal of 1 in the mean.

    Attributes:
        directions: ``(k, inputs)``, float64.
        rest: What is left of the diagonal.
    """

    directions: Array
    rest: float


def second_moment(parts: Mapping[str, StoredTensor]) -> SecondMoment:
    """The moment of the inputs that a calibration file has for a module.

    Raises:
        FitError: it holds NaN or infinity, or no inputs.
    """
    try:
        if "gram" in parts:
            moment = moment_of_gram(parts["gram"].read())
        else:
            stored = parts["activations"]
            moment = moment_of_inputs(raw_inputs(stored), stored.shape[0])
    except FitError as error:
        tensor = next(iter(parts.values()))
        raise FitError(error.message, file=tensor.file.path, tensor=tensor.name) from error
    inputs = moment.basis.shape[0]
    order = (-moment.energies).argsort()[:_MOST]
    mean = float(moment.energies.sum()) / inputs
    kept = moment.energies[order] / mean
    left = max(float(moment.energies.sum()) / mean - float(kept.sum()), 0.0) / inputs
    return SecondMoment((moment.basis[:, order] * kept**0.5).T, left + _DAMPING)
