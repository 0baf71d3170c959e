# SPDX-License-Identifier: Apache-2.0
"""Two updates of one kind, compared by their factors: no delta is formed, and no base is needed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from surgery_formats.adapters.format import Rendering
from surgery_formats.arrays import Array, cast
from surgery_formats.canonical.adapter import Adapter, Site
from surgery_formats.dtypes import DType
from surgery_formats.errors import ProofError
from surgery_formats.updates import (
    LoRA,
    Update,
    equal_factors,
    experts_of,
    is_directed,
    noted_tensors,
    plain_form,
    settings,
    transposed,
)

__all__ = ["approximation_errors", "distance", "relative", "scale_error", "tensor_error"]


def tensor_error(update: Update, other: Update) -> float:
    """The greatest difference of their stored tensors, relative to the greatest value of each, and that of their scales.

    Where a format stores a factor in other shapes than the source did, the factors are compared that the tensors make.
    Infinite if shapes differ.
    """
    before, after = (1.0 if side.scale is None else side.scale for side in (update, other))
    scales = relative(abs(after - before), abs(before))
    noted = noted_tensors(update) | noted_tensors(other)
    mine, theirs = ([tensor for tensor in side.tensors if tensor not in noted] for side in (update, other))
    if [tensor.shape for tensor in mine] == [tensor.shape for tensor in theirs]:
        pairs = ((cast(a.read(), DType.F64), cast(b.read(), DType.F64)) for a, b in zip(mine, theirs, strict=True))
        return max((_difference(left, right) for left, right in pairs), default=0.0) + scales
    factors, twins = update.factors(), other.factors()
    shapes = [{name: factor.shape for name, factor in side.items()} for side in (factors, twins)]
    made = {tensor for factor in factors.values() for tensor in factor.tensors}
    if not factors or shapes[0] != shapes[1] or not made.issuperset(mine):
        return math.inf
    return max(_difference(factors[name].load(DType.F64), twins[name].load(DType.F64)) for name in factors) + scales


def _difference(left: Array, right: Array) -> float:
    size, difference = float(abs(left).max()), float(abs(right - left).max())
    return math.inf if math.isnan(difference) else difference / size if size else difference


def approximation_errors(rendering: Rendering, written: Adapter, tolerance: float) -> dict[Site, float]:
    """``||delta - written|| / ||delta||`` of every site that a writer approximated; of several updates, the worst.

    Args:
        rendering: What was meant, with the errors that its writer states.
        written: As read back; it has the source's sites.
        tolerance: What rounding may add to the stated error.

    Raises:
        ProofError: an update is missing, of another kind, or further away than stated.
    """
    errors: dict[Site, float] = {}
    for site, stated in rendering.stated.items():
        chain = [plain_form(update) for update in rendering.held[site]]
        twins = [plain_form(update) for update in written.updates.get(site, ())]
        if [update.kind for update in chain] != [update.kind for update in twins]:
            raise ProofError(
                "the written update is of a different kind than the source's", file=written.path, tensor=str(site)
            )
        for update, twin, allowed in zip(chain, twins, stated(), strict=True):
            error = distance(update, twin)
            if not error <= allowed * (1 + tolerance) + tolerance:
                raise ProofError(
                    f"differs from the source by {error:.2e} of its change, its writer stated {allowed:.2e}",
                    file=written.path.name,
                    tensor=str(site),
                )
            errors[site] = max(errors.get(site, 0.0), error)
    return errors


def distance(update: Update, twin: Update) -> float:
    """``||delta - delta'|| / ||delta||`` of two updates of one kind, computed from their factors.

    Infinite where anything else is not equal.
    """
    from surgery_formats.linalg.factored import relative_error

    if type(update) is not type(twin) or update.shape != twin.shape:
        return math.inf
    if is_directed(update) and is_directed(twin):
        same = update.per_row == twin.per_row and equal_factors(update.magnitude, twin.magnitude)
        return distance(update.direction, twin.direction) if same else math.inf
    if experts_of(update):
        stacks = [[experts_of(s) if s else () for s in (side, transposed(side))] for side in (update, twin)]
        return max(_of_experts(mine, theirs) for mine, theirs in zip(*stacks, strict=True))
    lora, other = update.low_rank(), twin.low_rank()
    if lora is not None and other is not None:
        return relative_error(_product(lora), _product(other))
    return 0.0 if settings(update) == settings(twin) and tensor_error(update, twin) == 0.0 else math.inf


def _of_experts(experts: Sequence[Update], twins: Sequence[Update]) -> float:
    """All experts together; of those without low rank, the worst."""
    from surgery_formats.linalg.factored import factored_norm

    if len(experts) != len(twins):
        return math.inf
    errors = [distance(expert, twin) for expert, twin in zip(experts, twins, strict=True)]
    loras = [lora for expert in experts if (lora := expert.low_rank())]
    if len(loras) < len(experts):
        return max(errors)
    norms = [factored_norm(*_product(lora)) for lora in loras]
    lost = [error * norm if norm else error for error, norm in zip(errors, norms, strict=True)]
    whole = math.hypot(*norms)
    return math.hypot(*lost) / whole if whole else max(lost, default=0.0)


def _product(lora: LoRA) -> tuple[Array, Array]:
    return lora.B.load(DType.F64) * lora.scale, lora.A.load(DType.F64)


def scale_error(update: Update, twin: Update) -> float | None:
    """The relative error of the scale of two updates that differ in nothing else; 0 where there is nothing to scale.

    None where they differ otherwise, or have no scale.
    """
    if update.rank is None or update.scale is None or twin.scale is None or _unscaled(update) != _unscaled(twin):
        return None
    pairs = [*zip(update.factors().values(), twin.factors().values(), strict=True)]
    if not all(equal_factors(factor, other) for factor, other in pairs):
        return None
    error = relative(abs(update.scale - twin.scale), abs(update.scale))
    return 0.0 if error and not all(float(abs(factor.load(DType.F64)).max()) for factor, _ in pairs) else error


def _unscaled(update: Update) -> dict[str, Any]:
    return {name: value for name, value in settings(update).items() if name != "scale"}


def relative(difference: float, size: float) -> float:
    """``difference / size``; 0 for no difference from nothing, infinite for one from nothing or one that is no finite number."""
    if not math.isfinite(difference):
        return math.inf
    return difference / size if size else (0.0 if difference == 0 else math.inf)
