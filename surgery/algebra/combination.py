# SPDX-License-Identifier: Apache-2.0
"""A combination of adapters: weight by weight, rendered in a format, written, and proved. What `combine` and `resize` share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from surgery.algebra.combine_result import Combined, CombineResult, Source
from surgery.algebra.files import as_adapter, side_files
from surgery.algebra.group import group
from surgery.algebra.inputs import check_inputs
from surgery.algebra.parts import CombinedUpdate, Solutions
from surgery.algebra.proof import CombinationProof, prove_combination
from surgery.algebra.sums import Recipe
from surgery.algebra.task_vectors import DENSE_METHODS
from surgery.algebra.weight import make_part
from surgery.engine.adapter_output import WriteOptions, job_id, stored_as, write_adapter
from surgery.engine.checks import check_nothing_dropped
from surgery.reports.to_json import plain
from surgery_formats.adapters.format import Coded, Format, Rendering
from surgery_formats.canonical.adapter import Adapter, WeightedAdapter
from surgery_formats.dtypes import DType
from surgery_formats.errors import FitError, NothingChangedError
from surgery_formats.models.checkpoint import Checkpoint

__all__ = ["Combination", "CombinationPlan", "combine_adapters", "plan_combination", "write_combination"]

_ROUNDED = 0.02
"""Error of an exact sum above which more than the stored type is to blame: bfloat16 factors make 0.003 of it."""


@dataclass(frozen=True)
class Combination:
    """Several adapters as one.

    Attributes:
        terms: The adapters whose weight is not 0.
        recipe: How they were combined.
        parts: The combination of every weight.
        memory: The solved factors.
        base: If one was given.
        left: Names of the sites that are not wanted.
        warnings: What the user should know.
    """

    terms: tuple[WeightedAdapter, ...]
    recipe: Recipe
    parts: tuple[CombinedUpdate, ...]
    memory: Solutions
    base: Checkpoint | None
    left: tuple[str, ...]
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class CombinationPlan:
    """A combination in a format, not yet written.

    Attributes:
        combination: What was combined.
        adapter: What the writer was given.
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
    terms: Sequence[WeightedAdapter], recipe: Recipe, base: Checkpoint | None, left: Sequence[str] = ()
) -> Combination:
    """Combine adapters weight by weight; factors are worked out when they are written.

    Args:
        terms: Adapters and their weights.
        recipe: How.
        base: The model they were trained on, where names differ or a delta depends on it.
        left: Names of sites that were left out of `terms`.

    Raises:
        FitError: the adapters do not fit each other, or their sum depends on the base.
        NothingChangedError: every weight is 0.
    """
    warnings = check_inputs(terms, base)
    terms = [term for term in terms if term.weight != 0.0]
    if not terms:
        raise NothingChangedError("every weight is 0: nothing is left")
    memory = Solutions()
    parts = [make_part(key, shares, terms, recipe, memory, base) for key, shares in group(terms, base).items()]
    return Combination(tuple(terms), recipe, tuple(parts), memory, base, tuple(left), tuple(warnings))


def plan_combination(combination: Combination, target: Format, dtype: DType | None, verb: str) -> CombinationPlan:
    """Render a combination.

    Raises:
        FitError: the format cannot hold it, or stores no such type.
    """
    terms, parts = combination.terms, combination.parts
    if dtype is not None and isinstance(target, Coded):
        raise FitError(f"{target.name} stores factors as codes: a dtype says nothing")
    adapter = as_adapter(terms, parts, target.name)
    rendering = stored_as(target.render(adapter, combination.base), dtype)
    check_nothing_dropped(rendering, target.name, terms[0].adapter.path, "choose another format with --to")
    result = CombineResult(
        None,
        verb,
        tuple(Source(term.name, term.adapter.format, term.weight) for term in terms),
        target.name,
        combination.recipe.method,
        (*map(_planned, parts), *(Combined(name, "left out", (), 0) for name in combination.left)),
        combination.warnings,
    )
    return CombinationPlan(combination, adapter, target, dtype, rendering, result)


def write_combination(plan: CombinationPlan, options: WriteOptions) -> CombineResult:
    """Write a planned combination and prove it.

    Raises:
        NothingChangedError: the result would change nothing.
        ProofError: what was written does something else.
        OutputExistsError, ResourceError: see `surgery_formats.files`.
    """
    terms, base, result = plan.combination.terms, plan.combination.base, plan.result

    def prove(path: Path) -> dict[str, Any]:
        nonlocal result
        made = plan.combination
        proof = prove_combination(
            path, plan.target, plan.adapter, plan.rendering, made.parts, made.memory, base, plan.dtype
        )
        result = replace(result, modules=tuple(_proved(module, proof) for module in result.modules))
        _check_something(result)
        result = replace(result, warnings=(*result.warnings, *_cancelling(result)))
        for file in {file for term in terms for file in term.adapter.files}:
            file.check_unchanged()
        return result.as_json()

    facts = {
        "verb": result.verb,
        "recipe": plain(plan.combination.recipe),
        "sources": plain(result.sources),
        "target": plan.target.name,
    }
    job = job_id(facts, [file for term in terms for file in term.adapter.files], plan.rendering)
    inputs = (*(term.adapter.path for term in terms), *(() if base is None else (base.path,)))
    options = replace(options, inputs=inputs, side_files=side_files(terms))
    output = write_adapter(plan.rendering, plan.target, job, prove, options)
    return replace(result, output=output)


def _planned(part: CombinedUpdate) -> Combined:
    norm = error = None
    if part.best is not None:
        norm = part.best[0]
        error = part.best[1] / norm if norm else 0.0
    return Combined(str(part.site), part.outcome, part.ranks, part.rank, norm, error, error)


def _proved(module: Combined, proof: CombinationProof) -> Combined:
    if module.site in proof.approximated:
        module = replace(module, outcome="approximated")
    if module.site not in proof.errors:
        return module
    error = proof.errors[module.site]
    return replace(module, norm=error.norm, error=error.error, optimum=error.optimum)


def _cancelling(result: CombineResult) -> list[str]:
    """A sum far smaller than its terms: their factors' rounding is not small beside it."""
    errors = [module.error or 0.0 for module in result.modules if module.outcome == "exact"]
    errors = [error for error in errors if error > _ROUNDED]
    if not errors or result.method in DENSE_METHODS:
        return []
    hint = "; --method svd loses less" if result.method == "exact" else ""
    return [
        f"the adapters nearly cancel in {len(errors)} weights: rounding of the factors is up to {max(errors):.1%} of what is left{hint}"
    ]


def _check_something(result: CombineResult) -> None:
    """A sum that cancels is no adapter."""
    if all(module.norm == 0.0 for module in result.modules):
        raise NothingChangedError(
            "the result would change nothing: what was added is zero, cancels, or was dropped by the density",
            hint="check the adapters, their weights, and --density where there is one",
        )
