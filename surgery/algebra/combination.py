# SPDX-License-Identifier: Apache-2.0
"""A combination of adapters, weight by weight, and its rendering in a format: what `combine` and `resize` share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from surgery.algebra.combine_result import Combined, CombineResult, Source
from surgery.algebra.combined_adapter import combined_adapter
from surgery.algebra.combined_update import CombinedUpdate, Solutions, new_solutions
from surgery.algebra.group import group
from surgery.algebra.sums import CombineOptions
from surgery.algebra.weight import combine_weight
from surgery.engine.adapter_output import stored_as
from surgery.engine.input_checks import check_base_id, check_nothing_dropped
from surgery_formats.adapters.format import Coded, Format, Rendering, reader_of, what_to_tell
from surgery_formats.adapters.onnx_adapter.names import check_apart
from surgery_formats.canonical.adapter import Adapter, WeightedAdapter
from surgery_formats.canonical.consumption import check_consumed
from surgery_formats.dtypes import DType
from surgery_formats.errors import FitError, NothingChangedError
from surgery_formats.models.checkpoint import Checkpoint
from surgery_formats.text import listing
from surgery_formats.updates import is_directed

__all__ = ["Combination", "CombinationPlan", "combine_adapters", "plan_combination"]


@dataclass(frozen=True)
class Combination:
    """Several adapters as one.

    Attributes:
        terms: The adapters whose weight is not 0.
        options: How they were combined.
        updates: The combination of every weight.
        solutions: The solved factors.
        base: If one was given.
        left: Names of the sites that were left out.
        warnings: What the user should know.
    """

    terms: tuple[WeightedAdapter, ...]
    options: CombineOptions
    updates: tuple[CombinedUpdate, ...]
    solutions: Solutions
    base: Checkpoint | None
    left: tuple[str, ...]
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class CombinationPlan:
    """A combination in a format, not yet written.

    Attributes:
        combination: What was combined.
        adapter: The combination, for the writer.
        target: The format.
        dtype: Type of the stored matrices; None keeps them.
        rendering: What will be written.
        result: What a dry run reports.
    """

    combination: Combination
    adapter: Adapter
    target: Format
    dtype: DType | None
    rendering: Rendering
    result: CombineResult


def combine_adapters(
    terms: Sequence[WeightedAdapter], options: CombineOptions, base: Checkpoint | None, left: Sequence[str] = ()
) -> Combination:
    """Combine adapters weight by weight; factors are worked out when they are written.

    Args:
        terms: Adapters and their weights.
        options: How.
        base: The model they were trained on, where names differ or a delta depends on it.
        left: Names of sites that were left out of `terms`.

    Raises:
        FitError: the adapters do not fit each other, or their sum depends on the base.
        NothingChangedError: every weight is 0.
    """
    warnings = check_compatible(terms, base)
    terms = [term for term in terms if term.weight != 0.0]
    if not terms:
        raise NothingChangedError("every weight is 0: nothing is left")
    solutions = new_solutions()
    updates = tuple(
        combine_weight(key, contributions, terms, options, solutions, base)
        for key, contributions in group(terms, base).items()
    )
    if cut := sum(any(map(is_directed, one.updates)) for one in updates if one.outcome == "approximated"):
        warnings.append(
            f"{cut} DoRAs keep their magnitudes: errors are those of their factors' products; those of the weights depend on the base"
        )
    return Combination(tuple(terms), options, updates, solutions, base, tuple(left), tuple(warnings))


def plan_combination(combination: Combination, target: Format, dtype: DType | None, verb: str) -> CombinationPlan:
    """Render a combination.

    Raises:
        FitError: the format cannot hold it, or stores no such type.
    """
    terms = combination.terms
    for term in terms if target.name != "onnx-adapter" else ():
        check_apart(term.adapter)
    if dtype is not None and isinstance(target, Coded):
        raise FitError(f"{target.name} stores factors as codes: a dtype says nothing")
    adapter = combined_adapter(terms, {update.site: update.updates for update in combination.updates}, target)
    rendering = stored_as(target.render(adapter, combination.base), dtype)
    check_nothing_dropped(
        rendering, target.name, terms[0].adapter.path, "choose another format with `to=`", base=combination.base
    )
    result = CombineResult(
        None,
        verb,
        tuple(Source(term.name, term.adapter.format, term.weight) for term in terms),
        target.name,
        combination.options.method,
        (*map(_planned, combination.updates), *(Combined(name, "left out", (), 0) for name in combination.left)),
        (*combination.warnings, *what_to_tell(rendering, target)),
    )
    return CombinationPlan(combination, adapter, reader_of(rendering, target), dtype, rendering, result)


def _planned(update: CombinedUpdate) -> Combined:
    norm = error = None
    if update.best is not None:
        norm, lost = update.best
        error = lost / norm if norm else 0.0
    return Combined(str(update.site), update.outcome, update.ranks, update.rank, norm, error, error)


def check_compatible(terms: Sequence[WeightedAdapter], base: Checkpoint | None) -> list[str]:
    """Refuse adapters without deltas, or of different bases.

    Returns:
        Warnings.

    Raises:
        FitError: an adapter cannot be one of several that are added up.
    """
    warnings = []
    for term in terms:
        if not math.isfinite(term.weight):
            raise FitError(f"a weight of {term.weight}", file=term.adapter.path)
        _check_has_deltas(term.adapter)
        warnings += [f"{term.name}: {issue}" for issue in term.adapter.known_issues()]
        if term.weight == 0.0:
            warnings.append(f"{term.name}: its weight is 0, so it is left out")
    adapters = [term.adapter for term in terms]
    if len({adapter.base_id for adapter in adapters if adapter.base_id}) > 1:
        raise FitError("the adapters record different bases: their deltas cannot be added")
    if base is not None:
        check_base_id(base, adapters)
    names = sorted({adapter.base_name.rstrip("/").rpartition("/")[2] for adapter in adapters if adapter.base_name})
    if len(names) > 1:
        warnings.append(f"the adapters name different bases: {listing(names)}")
    if len({adapter.keeps_ties for adapter in adapters}) > 1:
        warnings.append(
            "mlx-lm lets a tied head follow its embedding, the other format does not: the first one's rule holds"
        )
    return warnings


def _check_has_deltas(adapter: Adapter) -> None:
    check_consumed(adapter)
    if adapter.prompt is not None:
        raise FitError(f"{adapter.kind} trains virtual tokens, not weights: there is nothing to add", file=adapter.path)
    if not adapter.updates:
        raise FitError("the adapter holds no tensors", file=adapter.path)
