# SPDX-License-Identifier: Apache-2.0
"""Combine: several adapters as one, by exact arithmetic on their files.

No base is needed where the arithmetic does not need one.

The exact sum of LoRAs is their factors side by side (rank: the sum of theirs); asked for less rank, it is cut by the
optimum that QR of the factors and a small SVD give (Eckart and Young), never by averaging factors, whose products are
not the sum.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from surgery.algebra.combination import CombinationPlan, combine_adapters, plan_combination
from surgery.algebra.combine_result import CombineResult
from surgery.algebra.output import write_combination
from surgery.algebra.sums import CombineOptions
from surgery.algebra.ties_and_dare import DENSE_METHODS, MAJORITIES
from surgery.comparison.conflicts import conflicts_between
from surgery.engine.adapter_output import WriteOptions
from surgery.engine.input_checks import float_type
from surgery.engine.inputs import (
    AdaptersLike,
    CheckpointLike,
    StrPath,
    as_checkpoint,
    as_list,
    as_weighted,
    output_path,
)
from surgery.engine.selection import Selection
from surgery.progress import Callback
from surgery.rank import Rank
from surgery.reports.conflict import Conflict
from surgery.reports.result import timed
from surgery_formats.adapters.registry import format_to_write
from surgery_formats.binding.parts import in_its_part
from surgery_formats.canonical.adapter import WeightedAdapter
from surgery_formats.errors import FitError, NothingChangedError
from surgery_formats.text import listing, show

__all__ = ["METHODS", "CombineResult", "combine", "combined"]

METHODS = ("exact", "svd", *DENSE_METHODS)


@timed
def combine(
    adapters: AdaptersLike,
    *,
    output: StrPath | None = None,
    rank: int | Rank | None = None,
    method: str = "exact",
    density: float | None = None,
    seed: int = 0,
    majority: str | None = None,
    only: str | Sequence[str] = (),
    without: str | Sequence[str] = (),
    dtype: str = "keep",
    to: str | None = None,
    base: CheckpointLike | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    progress: Callback | None = None,
) -> CombineResult:
    """Write one adapter that does what several do together: ``sum_i w_i delta_i``, or a merge of the deltas.

    Args:
        adapters: One or several, each with its weight, negative ones too, given as `surgery.merge` takes them. One
            alone is scaled.
        output: File or folder to make. Its parent must exist.
        rank: Greatest rank of a module, or ``Rank.energy(.99)``, ``Rank.error(.05)``; without it nothing of the sum is
            lost.
        method: ``exact``; ``svd`` (the exact sum in its least number of directions); ``ties`` (arXiv:2306.01708),
            ``dare-ties``, ``dare-linear`` (arXiv:2311.03099), ``magnitude-prune``: dense merges of the deltas, which
            need a `rank`. ``peft-ties``, ``peft-dare-ties`` elect signs before weights, as PEFT's ``ties_svd`` does.
        density: Share of the values that a dense method keeps, in (0, 1].
        seed: Of DARE's random drops.
        majority: What elects a sign in TIES: the ``total`` of the values (the default), or the ``frequency`` of signs.
        only: Patterns of modules to keep (see `surgery.engine.selection.Selection`); all of them by default.
        without: Patterns of modules to leave out.
        dtype: ``keep`` (float32 for what was computed), ``fp32``, ``fp16``, ``bf16``.
        to: Format to write; by default the first adapter's.
        base: The model they were trained on: only where names differ, or a format's names come from it.
        overwrite: Replace an existing output, atomically.
        dry_run: Say what would be done, write nothing. Of two adapters also where they get in each other's way.
        progress: Called with every step.

    Raises:
        UsageError: an argument of a wrong type, or no output.
        InputError: an adapter or the base cannot be read.
        FitError: the adapters do not fit each other, the sum depends on the base, a format cannot hold the result, an
            option is wrong.
        NothingChangedError: the result would be the one adapter given, or nothing.
        ProofError: what was written does something else.
        OutputExistsError, ResourceError: see `surgery_formats.files`.
    """
    destination = output_path(output, dry_run=dry_run)
    plan = combined(
        adapters,
        rank=rank,
        method=method,
        density=density,
        seed=seed,
        majority=majority,
        only=only,
        without=without,
        dtype=dtype,
        to=to,
        base=base,
    )
    if destination is None:
        return replace(plan.result, conflicts=_conflicts(as_weighted(adapters), base, only, without))
    options = WriteOptions(destination, overwrite=overwrite, progress=progress)
    return write_combination(plan, options)


def _conflicts(
    asked: Sequence[WeightedAdapter],
    base: CheckpointLike | None,
    only: str | Sequence[str],
    without: str | Sequence[str],
) -> Mapping[str, Conflict]:
    """Of two adapters, on the modules that are combined."""
    terms, _ = Selection(tuple(as_list(only)), tuple(as_list(without))).chosen(asked)
    if len(terms) != 2:
        return {}
    (one, other), model = terms, None if base is None else as_checkpoint(base)
    return conflicts_between(one.adapter, other.adapter, (one.weight, other.weight), model)


def combined(
    adapters: AdaptersLike,
    *,
    rank: int | Rank | None = None,
    method: str = "exact",
    density: float | None = None,
    seed: int = 0,
    majority: str | None = None,
    only: str | Sequence[str] = (),
    without: str | Sequence[str] = (),
    dtype: str = "keep",
    to: str | None = None,
    base: CheckpointLike | None = None,
) -> CombinationPlan:
    """The plan of `combine`: its `adapter` can be merged, too, without being written.

    Raises:
        UsageError, InputError, FitError, NothingChangedError: as `combine`.
    """
    ranks = Rank() if rank is None else Rank.of(rank)
    options = CombineOptions.of(method, ranks, 1.0 if density is None else density, seed, majority or MAJORITIES[0])
    _check_options(options, density, majority)
    stored, target = float_type(dtype), None if to is None else format_to_write(to)
    terms = as_weighted(adapters)
    if not terms:
        raise FitError("no adapter was named")
    terms, left = Selection(tuple(as_list(only)), tuple(as_list(without))).chosen(terms)
    if len(terms) == 1 and terms[0].weight == 1.0 and method == "exact" and not (options.truncates or left):
        raise NothingChangedError("one adapter with weight 1 is what it was", file=terms[0].adapter.path)
    model = None if base is None else as_checkpoint(base)
    if model is not None:
        terms = [replace(term, adapter=in_its_part(term.adapter, model)) for term in terms]
    combination = combine_adapters(terms, options, model, left)
    return plan_combination(combination, target or format_to_write(terms[0].adapter.format), stored, "combine")


def _check_options(options: CombineOptions, density: float | None, majority: str | None) -> None:
    method = options.method
    if method not in METHODS:
        raise FitError(f"no method '{show(method)}'", hint=f"there are {listing(METHODS, 10)}")
    if majority is not None and majority not in MAJORITIES:
        raise FitError(f"no majority '{show(majority)}'", hint=f"there are {listing(MAJORITIES)}")
    if majority is not None and not method.endswith("ties"):
        raise FitError(f"'{method}' elects no signs, so it has no majority")
    if density is not None and not 0 < density <= 1:
        raise FitError(f"a density of {density:g}", hint="give a share between 0 and 1")
    if method not in DENSE_METHODS:
        if density is not None:
            raise FitError(f"'{method}' drops no values, so it has no density")
        return
    if density is None:
        raise FitError(f"'{method}' needs a density", hint="TIES keeps 0.2 in its paper, DARE 0.1 to 0.5")
    if not options.truncates:
        raise FitError(f"what '{method}' makes has full rank", hint="give a rank or an energy")
