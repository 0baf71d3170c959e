# SPDX-License-Identifier: Apache-2.0
"""Resize: an adapter with lower ranks, each module's factors the best of their rank (Eckart and Young, by QR of the factors)."""

from __future__ import annotations

import math

from surgery.algebra.combination import Combination, combine_adapters, plan_combination
from surgery.algebra.combine_result import CombineResult
from surgery.algebra.output import write_combination
from surgery.algebra.sums import Recipe
from surgery.engine.adapter_output import WriteOptions
from surgery.engine.checks import float_type
from surgery.engine.inputs import AdapterLike, CheckpointLike, StrPath, as_adapter, as_checkpoint, output_path
from surgery.progress import Callback
from surgery_formats.adapters.registry import format_named
from surgery_formats.canonical.adapter import WeightedAdapter
from surgery_formats.errors import FitError, NothingChangedError

__all__ = ["resize"]


def resize(
    adapter: AdapterLike,
    *,
    output: StrPath | None = None,
    rank: int | None = None,
    energy: float | None = None,
    max_error: float | None = None,
    dtype: str = "keep",
    to: str | None = None,
    base: CheckpointLike | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    progress: Callback | None = None,
) -> CombineResult:
    """Write an adapter with lower ranks. Modules that are within what is asked for are taken over as they are.

    Args:
        adapter: File or folder, or an opened Adapter.
        output: File or folder to make. Its parent must exist.
        rank: Greatest rank of a module.
        energy: Least share of each module's energy ``||.||_F^2`` to keep, in (0, 1].
        max_error: Greatest error of a module, relative, Frobenius. Of rank, energy and error all that are given hold, `rank` first.
        dtype: ``keep`` (float32 for what was computed), ``fp32``, ``fp16``, ``bf16``.
        to: Format to write; by default the adapter's.
        base: The model it was trained on, where a format's names come from it.
        overwrite: Replace an existing output, atomically.
        dry_run: Say what ranks and errors would be, write nothing.
        progress: Called with every step.

    Raises:
        UsageError: an argument of a wrong type, or no output.
        InputError: the adapter cannot be read.
        FitError: an option is wrong, or a module is one whose rank cannot change without the base (DoRA).
        NothingChangedError: no module would get a lower rank. A higher one would add zeros and nothing else.
        ProofError: what was written is further from the adapter than the best of its rank.
        OutputExistsError, ResourceError: see `surgery_formats.files`.
    """
    if rank is None and energy is None and max_error is None:
        raise FitError("no size was chosen", hint="give a rank, an energy or a max_error")
    if rank is not None and rank < 1:
        raise FitError(f"a rank of {rank}", hint="give 1 or more")
    for name, value in (("energy", energy), ("max_error", max_error)):
        if value is not None and not (math.isfinite(value) and 0 < value <= 1):
            raise FitError(f"{name} is {value:g}", hint="give a number between 0 and 1")
    recipe = Recipe("exact", rank, energy, max_error)
    stored, target = float_type(dtype), None if to is None else format_named(to)
    destination = output_path(output, dry_run=dry_run)
    source = as_adapter(adapter)
    checkpoint = None if base is None else as_checkpoint(base)
    combination = combine_adapters([WeightedAdapter(source, 1.0)], recipe, checkpoint)
    if all(update.outcome == "kept" for update in combination.updates):
        raise _nothing_to_lose(combination, recipe)
    plan = plan_combination(combination, target or format_named(source.format), stored, "resize")
    if destination is None:
        return plan.result
    options = WriteOptions(destination, overwrite=overwrite, progress=progress)
    return write_combination(plan, options)


def _nothing_to_lose(combination: Combination, recipe: Recipe) -> NothingChangedError:
    highest = max((update.rank for update in combination.updates), default=0)
    file = combination.terms[0].adapter.path
    if recipe.by_spectrum:
        return NothingChangedError(
            f"no module can lose a direction within these bounds (the highest rank is {highest})",
            file=file,
            hint="allow a larger error, or ask for a rank",
        )
    return NothingChangedError(
        f"no module has a higher rank than asked for (the highest is {highest})",
        file=file,
        hint="a higher rank would only add zeros",
    )
