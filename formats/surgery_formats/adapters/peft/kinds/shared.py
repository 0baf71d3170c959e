# SPDX-License-Identifier: Apache-2.0
"""Random projections that all modules of a file share: stored once, or drawn again from a seed."""

from __future__ import annotations

from surgery_formats.adapters.peft.kinds.kind import Module, malformed
from surgery_formats.arrays import Array
from surgery_formats.errors import MalformedError
from surgery_formats.tensors.tensor import StoredTensor
from surgery_formats.updates import Factor

__all__ = ["shared_pair"]


def shared_pair(module: Module, names: tuple[str, str], axes: tuple[int, int]) -> tuple[Factor, Factor] | None:
    """The two projections that the file has; None where they are drawn again.

    Args:
        module: Any of the file.
        names: Of the two, after ``base_model.``.
        axes: How many axes each must have.

    Raises:
        MalformedError: one is missing, or both where ``save_projection`` says that they are there.
    """
    stored = [module.shared.get(name) for name in names]
    first, second = stored
    if first is None or second is None:
        if first is not None or second is not None or module.config.flag("save_projection", default=True):
            raise MalformedError(
                f"'base_model.{names[0]}' or 'base_model.{names[1]}' is missing",
                file=next(iter(module.parts.values())).file.path,
                hint="was the file cut down?",
            )
        return None
    for tensor, count in zip((first, second), axes, strict=True):
        if len(tensor.shape) != count or not tensor.numel:
            raise malformed(tensor, "not a matrix" if count == 2 else f"not {count} axes")
    return _factor(first), _factor(second)


def _factor(stored: StoredTensor) -> Factor:
    return Factor((stored,), stored.shape, _as_stored)


def _as_stored(stored: Array) -> Array:
    """A projection as it is. All modules share its view, so it is read once and recognised as one tensor."""
    return stored
