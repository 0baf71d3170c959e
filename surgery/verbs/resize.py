# SPDX-License-Identifier: Apache-2.0
"""Resize: lower the ranks of an adapter.

Each module gets the best factors of its new rank (Eckart and Young, by QR of the factors).
"""

from __future__ import annotations

from surgery.algebra.combination import Combination, CombinationPlan, combine_adapters, plan_combination
from surgery.algebra.combine_result import CombineResult
from surgery.algebra.output import write_combination
from surgery.algebra.sums import CombineOptions
from surgery.engine.adapter_output import WriteOptions
from surgery.engine.input_checks import float_type
from surgery.engine.inputs import AdapterLike, CheckpointLike, StrPath, as_adapter, as_checkpoint, output_path
from surgery.progress import Callback
from surgery.rank import Rank
from surgery.reports.result import timed
from surgery_formats.adapters.registry import format_to_write
from surgery_formats.canonical.adapter import WeightedAdapter
from surgery_formats.errors import FitError, NothingChangedError

__all__ = ["resize", "resized"]


@timed
def resize(
    adapter: AdapterLike,
    *,
    rank: int | Rank,
    output: StrPath | None = None,
    dtype: str = "keep",
    to: str | None = None,
    base: CheckpointLike | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    progress: Callback | None = None,
) -> CombineResult:
    """Write an adapter with lower ranks. Modules that are within what is asked for are taken over as they are.

    A DoRA keeps its magnitudes, and errors are those of its factors' product; with `base` it becomes the best LoRA for what it does.

    Args:
        adapter: File or folder, or an opened Adapter.
        rank: Greatest rank of a module; or ``Rank.energy(.99)``, ``Rank.error(.05)``, or several joined by ``&``: all
            of them hold, a number first.
        output: File or folder to make. Its parent must exist.
        dtype: ``keep`` (float32 for what was computed), ``fp32``, ``fp16``, ``bf16``.
        to: Format to write; by default the adapter's.
        base: The model it was trained on, where a format's names come from it.
        overwrite: Replace an existing output, atomically.
        dry_run: Say what ranks and errors would be, write nothing.
        progress: Called with every step.

    Raises:
        UsageError: an argument of a wrong type, or no output.
        InputError: the adapter cannot be read.
        FitError: an option is wrong, or a module is one whose rank cannot change without the base (OFT).
        NothingChangedError: no module would get a lower rank. A higher one would add zeros and nothing else.
        ProofError: what was written is further from the adapter than the best of its rank.
        OutputExistsError, ResourceError: see `surgery_formats.files`.
    """
    destination = output_path(output, dry_run=dry_run)
    plan = resized(adapter, rank=rank, dtype=dtype, to=to, base=base)
    if destination is None:
        return plan.result
    options = WriteOptions(destination, overwrite=overwrite, progress=progress)
    return write_combination(plan, options)


def resized(
    adapter: AdapterLike,
    *,
    rank: int | Rank,
    dtype: str = "keep",
    to: str | None = None,
    base: CheckpointLike | None = None,
) -> CombinationPlan:
    """The plan of `resize`: its `adapter` can be merged, too, without being written.

    Raises:
        UsageError, InputError, FitError, NothingChangedError: as `resize`.
    """
    options = CombineOptions.of("exact", Rank.of(rank))
    if not options.truncates:
        raise FitError("no size was chosen", hint="give a rank, an energy or an error")
    stored, target = float_type(dtype), None if to is None else format_to_write(to)
    source = as_adapter(adapter)
    checkpoint = None if base is None else as_checkpoint(base)
    combination = combine_adapters([WeightedAdapter(source, 1.0)], options, checkpoint)
    if all(update.outcome == "kept" for update in combination.updates):
        raise _nothing_to_lose(combination, options)
    return plan_combination(combination, target or format_to_write(source.format), stored, "resize")


def _nothing_to_lose(combination: Combination, options: CombineOptions) -> NothingChangedError:
    highest = max((update.rank for update in combination.updates), default=0)
    file = combination.terms[0].adapter.path
    if options.by_spectrum:
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
