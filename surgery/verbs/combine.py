# SPDX-License-Identifier: Apache-2.0
"""Combine: several adapters as one, by exact arithmetic on their files. No base is needed where the arithmetic does not need one.

The exact sum of LoRAs is their factors side by side (rank: the sum of theirs); asked for less rank, it is cut by the optimum that QR of the
factors and a small SVD give (Eckart and Young), never by averaging factors, whose products are not the sum.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from surgery.algebra.files import as_adapter, side_files
from surgery.algebra.group import group
from surgery.algebra.parts import CombinedUpdate, Solutions
from surgery.algebra.proof import TOLERANCE, SumError, prove
from surgery.algebra.selection import Selection, check_patterns
from surgery.algebra.sums import Recipe
from surgery.algebra.task_vectors import DENSE_METHODS
from surgery.algebra.weight import make_part
from surgery.engine.adapter_output import job_id, stored_as, write_adapter
from surgery.engine.inputs import (
    AdaptersLike,
    CheckpointLike,
    StrPath,
    as_checkpoint,
    as_list,
    as_weighted,
    float_type,
    output_path,
)
from surgery.engine.proof_approximate import measured as approximated
from surgery.progress import Callback
from surgery.reports.to_json import plain
from surgery_formats.adapters.format import Coded
from surgery_formats.adapters.peft.other_kinds import KINDS
from surgery_formats.adapters.registry import format_named
from surgery_formats.canonical.adapter import WeightedAdapter
from surgery_formats.errors import FitError, NothingChangedError
from surgery_formats.models.checkpoint import Checkpoint
from surgery_formats.text import listing, show

__all__ = ["METHODS", "CombineResult", "Combined", "Source", "WriteOptions", "combine", "rewrite"]

METHODS = ("exact", "svd", *DENSE_METHODS)
_ROUNDED = 0.02
"""Error of an exact sum above which more than the stored type is to blame: bfloat16 factors make 0.003 of it."""


@dataclass(frozen=True, slots=True)
class Source:
    """One adapter that went in.

    Attributes:
        name: Of its file or folder.
        format: It was read as.
        weight: On its deltas.
    """

    name: str
    format: str
    weight: float


@dataclass(frozen=True, slots=True)
class Combined:
    """One weight.

    Attributes:
        site: As the first adapter names it.
        outcome: ``exact``, ``approximated`` (directions dropped, or codes in the place of factors), ``kept`` (taken over as it was,
            perhaps with another scale) or ``left out`` (not chosen).
        ranks: Of the terms.
        rank: Of the result; 0 for what is not low-rank.
        norm: Frobenius norm of the delta that was wanted; None where it was not worked out.
        error: Relative Frobenius error of what was written, read back; for a dry run of what would be written, where it is known.
        optimum: Error of the best factors of this rank; None where it was not worked out.
    """

    site: str
    outcome: str
    ranks: tuple[int, ...]
    rank: int
    norm: float | None = None
    error: float | None = None
    optimum: float | None = None


@dataclass(frozen=True)
class CombineResult:
    """What a combination did, or (dry run) would do.

    Attributes:
        output: File or folder; None for a dry run.
        verb: ``combine`` or ``resize``.
        sources: What went in.
        target: Format it was written in.
        method: How deltas were combined.
        modules: Every weight.
        warnings: What the user should know.
    """

    output: Path | None
    verb: str
    sources: tuple[Source, ...]
    target: str
    method: str
    modules: tuple[Combined, ...]
    warnings: tuple[str, ...] = ()

    @property
    def error(self) -> float | None:
        """Relative Frobenius error over all weights together; None if none was worked out."""
        known = [(one.norm, one.error) for one in self.modules if one.norm is not None and one.error is not None]
        whole = math.hypot(*(norm for norm, _ in known))
        return math.hypot(*(norm * error for norm, error in known)) / whole if whole else None

    def as_json(self) -> dict[str, Any]:
        """For ``--json`` and the manifest; no paths."""
        found: dict[str, Any] = plain(replace(self, output=None))
        del found["output"]
        return {**found, "error": self.error}


def combine(
    adapters: AdaptersLike,
    *,
    output: StrPath | None = None,
    rank: int | None = None,
    energy: float | None = None,
    method: str = "exact",
    density: float | None = None,
    seed: int = 0,
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
        adapters: One or several, each with its weight, negative ones too, given as `surgery.merge` takes them. One alone is scaled.
        output: File or folder to make. Its parent must exist.
        rank: Greatest rank of a module; without it, and without `energy`, nothing of the sum is lost.
        energy: Share of each module's energy to keep, in (0, 1].
        method: ``exact``; ``svd`` (the exact sum in its least number of directions); ``ties`` (arXiv:2306.01708), ``dare-ties``,
            ``dare-linear`` (arXiv:2311.03099), ``magnitude-prune``: dense merges of the deltas, which need `rank` or `energy`.
        density: Share of the values that a dense method keeps, in (0, 1].
        seed: Of DARE's random drops.
        only: Patterns of modules to keep (see `surgery.algebra.selection.Selection`); all of them by default.
        without: Patterns of modules to leave out.
        dtype: ``keep`` (float32 for what was computed), ``fp32``, ``fp16``, ``bf16``.
        to: Format to write; by default the first adapter's.
        base: The model they were trained on: only where names differ, or a format's names come from it.
        overwrite: Replace an existing output, atomically.
        dry_run: Say what would be done, write nothing.
        progress: Called with every step.

    Raises:
        UsageError: an argument of a wrong type, or no output.
        InputError: an adapter or the base cannot be read.
        FitError: the adapters do not fit each other, the sum depends on the base, a format cannot hold the result, an option is wrong.
        NothingChangedError: the result would be the one adapter given, or nothing.
        ProofError: what was written does something else.
        OutputExistsError, ResourceError: see `surgery_formats.files`.
    """
    _check_options(method, density, rank, energy)
    options = WriteOptions(output_path(output, dry_run=dry_run), dtype, to, base, overwrite, progress)
    given = as_weighted(adapters)
    if not given:
        raise FitError("no adapter was named")
    given, left = _chosen(given, Selection(tuple(as_list(only)), tuple(as_list(without))))
    recipe = Recipe(method, rank, energy, None, 1.0 if density is None else density, seed)
    if len(given) == 1 and given[0].weight == 1.0 and method == "exact" and not (recipe.truncates or left):
        raise NothingChangedError("one adapter with weight 1 is what it was", file=given[0].adapter.path)
    return rewrite(given, recipe, options, "combine", left)


def _chosen(given: Sequence[WeightedAdapter], selection: Selection) -> tuple[list[WeightedAdapter], tuple[str, ...]]:
    """What is kept of every adapter, and the names of what none of them keeps."""
    check_patterns(selection, [one.adapter for one in given])
    kept: list[WeightedAdapter] = []
    left: dict[str, None] = {}
    for one in given:
        adapter, out = selection.of(one.adapter)
        left |= dict.fromkeys(map(str, out))
        if adapter.updates or not out:
            kept.append(replace(one, adapter=adapter))
    if not kept:
        raise NothingChangedError("no module is left", hint="widen the patterns")
    return kept, tuple(left)


def _check_options(method: str, density: float | None, rank: int | None, energy: float | None) -> None:
    if method not in METHODS:
        raise FitError(f"no method '{show(method)}'", hint=f"there are {listing(METHODS, 10)}")
    if rank is not None and rank < 1:
        raise FitError(f"a rank of {rank}", hint="give 1 or more")
    if energy is not None and not 0 < energy <= 1:
        raise FitError(f"an energy of {energy:g}", hint="give a share between 0 and 1")
    if density is not None and not 0 < density <= 1:
        raise FitError(f"a density of {density:g}", hint="give a share between 0 and 1")
    if method not in DENSE_METHODS:
        if density is not None:
            raise FitError(f"'{method}' drops no values, so it has no density")
        return
    if density is None:
        raise FitError(f"'{method}' needs a density", hint="TIES keeps 0.2 in its paper, DARE 0.1 to 0.5")
    if rank is None and energy is None:
        raise FitError(f"what '{method}' makes has full rank", hint="give a rank or an energy")


@dataclass(frozen=True, slots=True)
class WriteOptions:
    """How to write; none of it changes the arithmetic. Without an output it is a dry run."""

    output: Path | None
    dtype: str
    to: str | None
    base: CheckpointLike | None
    overwrite: bool
    progress: Callback | None


def rewrite(
    given: Sequence[WeightedAdapter], recipe: Recipe, options: WriteOptions, verb: str, left: Sequence[str] = ()
) -> CombineResult:
    """Combine by `recipe` and write: what `combine` and `surgery.resize` share; `left` are sites that are not wanted."""
    dtype = float_type(options.dtype)
    target = format_named(options.to or given[0].adapter.format)
    base = None if options.base is None else as_checkpoint(options.base)
    warnings = _check_inputs(given, base)
    given = [one for one in given if one.weight != 0.0]
    if not given:
        raise NothingChangedError("every weight is 0: nothing is left")
    memory = Solutions()
    parts = [make_part(key, shares, given, recipe, memory, base) for key, shares in group(given, base).items()]
    if verb == "resize" and all(part.outcome == "kept" for part in parts):
        highest = max((part.rank for part in parts), default=0)
        by_rank = not recipe.by_spectrum
        raise NothingChangedError(
            f"no module has a higher rank than asked for (the highest is {highest})"
            if by_rank
            else f"no module can lose a direction within these bounds (the highest rank is {highest})",
            file=given[0].adapter.path,
            hint="a higher rank would only add zeros" if by_rank else "allow a larger error, or ask for a rank",
        )
    result = as_adapter(given, parts, target.name)
    if dtype is not None and isinstance(target, Coded):
        raise FitError(f"{target.name} stores factors as codes: a dtype says nothing")
    rendering = stored_as(target.render(result, base), dtype)
    if dropped := [entry for entry in rendering.entries if entry.outcome == "dropped"]:
        raise FitError(
            f"{target.name} cannot hold {len(dropped)} of {len(rendering.entries)} parts: "
            + "; ".join(f"'{show(entry.site)}' ({entry.detail})" for entry in dropped[:3]),
            file=given[0].adapter.path,
            hint="choose another format with --to",
        )
    sources = tuple(Source(one.name, one.adapter.format, one.weight) for one in given)
    planned = (*(_planned(part) for part in parts), *(Combined(name, "left out", (), 0) for name in left))
    found = CombineResult(None, verb, sources, target.name, recipe.method, planned, tuple(warnings))
    if options.output is None:
        return found

    def check(path: Path) -> dict[str, Any]:
        nonlocal found
        near = approximated(rendering, target.read(path), TOLERANCE)
        measured = prove(path, target, result, parts, memory, base, dtype, near)
        coded = {str(site) for site in near}
        modules = tuple(_with(one, measured) for one in found.modules)
        found = replace(
            found, modules=tuple(replace(m, outcome="approximated") if m.site in coded else m for m in modules)
        )
        _check_something(found)
        found = replace(found, warnings=(*found.warnings, *_cancelling(found)))
        for one in given:
            for file in {tensor.file for tensor in one.adapter.tensors}:
                file.check_unchanged()
        return found.as_json()

    facts = {"verb": verb, "recipe": plain(recipe), "sources": plain(sources), "target": target.name}
    job = job_id(facts, [tensor for one in given for tensor in one.adapter.tensors], rendering)
    inputs = (*(one.adapter.path for one in given), *(() if base is None else (base.path,)))
    made = write_adapter(
        rendering,
        target,
        options.output,
        job,
        check,
        inputs=inputs,
        side_files=side_files(given),
        overwrite=options.overwrite,
        progress=options.progress,
    )
    return replace(found, output=made)


def _check_inputs(given: Sequence[WeightedAdapter], base: Checkpoint | None) -> list[str]:
    """Refuse what has no deltas; say what is worth a word."""
    warnings = []
    for one in given:
        adapter = one.adapter
        if left := adapter.unconsumed():
            raise FitError(
                f"{len(left)} tensors have no use: {listing(tensor.name for tensor in left)}", file=adapter.path
            )
        if adapter.prompt is not None or not adapter.updates:
            raise FitError(
                f"{adapter.kind} trains virtual tokens, not weights: there is nothing to add"
                if adapter.prompt is not None
                else "the adapter holds no tensors",
                file=adapter.path,
            )
        if adapter.format == "peft" and adapter.kind in KINDS:
            raise FitError(
                f"adapters of type {adapter.kind} cannot be combined: their sum is not of that type",
                file=adapter.path,
                hint="merge them into the base, and extract a LoRA from the result",
            )
        warnings += [f"{one.name}: {trap}" for trap in adapter.known_issues()]
        if one.weight == 0.0:
            warnings.append(f"{one.name}: its weight is 0, so it is left out")
    ids = {adapter.base_id for adapter in (one.adapter for one in given) if adapter.base_id}
    if len(ids) > 1:
        raise FitError("the adapters record different bases: their deltas cannot be added")
    names = sorted({one.adapter.base_name.rstrip("/").rpartition("/")[2] for one in given if one.adapter.base_name})
    if len(names) > 1:
        warnings.append(f"the adapters name different bases: {listing(names)}")
    if len({one.adapter.keeps_ties for one in given}) > 1:
        warnings.append(
            "mlx-lm lets a tied head follow its embedding, the other format does not: the first one's rule holds"
        )
    return warnings


def _planned(part: CombinedUpdate) -> Combined:
    norm = error = None
    if part.best is not None:
        norm = part.best[0]
        error = part.best[1] / norm if norm else 0.0
    return Combined(str(part.site), part.outcome, part.ranks, part.rank, norm, error, error)


def _with(one: Combined, measured: dict[str, SumError]) -> Combined:
    if one.site not in measured:
        return one
    found = measured[one.site]
    return replace(one, norm=found.norm, error=found.error, optimum=found.optimum)


def _cancelling(found: CombineResult) -> list[str]:
    """A sum far smaller than its terms: their factors' rounding is not small beside it."""
    errors = [error for one in found.modules if one.outcome == "exact" and (error := one.error or 0.0) > _ROUNDED]
    if not errors or found.method in DENSE_METHODS:
        return []
    hint = "; --method svd loses less" if found.method == "exact" else ""
    return [
        f"the adapters nearly cancel in {len(errors)} weights: rounding of the factors is up to {max(errors):.1%} of what is left{hint}"
    ]


def _check_something(found: CombineResult) -> None:
    """A sum that cancels is no adapter."""
    if all(one.norm == 0.0 for one in found.modules):
        raise NothingChangedError(
            "the result would change nothing: what was added is zero, cancels, or was dropped by the density",
            hint="check the adapters, their weights, and --density where there is one",
        )
