# SPDX-License-Identifier: Apache-2.0
"""Writes a planned combination, and puts what the proof measured into its result."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

from surgery.algebra.combination import CombinationPlan
from surgery.algebra.combine_result import Combined, CombineResult
from surgery.algebra.combined_adapter import side_files
from surgery.algebra.proof import CombinationProof, prove_combination
from surgery.algebra.ties_and_dare import DENSE_METHODS, MAJORITIES
from surgery.engine.adapter_card import with_card
from surgery.engine.adapter_output import WriteOptions, job_id, write_adapter
from surgery.reports.to_json import plain
from surgery_formats.adapters.format import Rendering
from surgery_formats.errors import NothingChangedError

__all__ = ["combination_id", "write_combination"]

_ROUNDED = 0.02
"""Error of an exact sum above which more than the stored type is to blame: bfloat16 factors make 0.003 of it."""


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
        proof = prove_combination(path, plan)
        result = replace(result, modules=tuple(_proved(module, proof) for module in result.modules))
        _check_something(result)
        result = replace(result, warnings=(*result.warnings, *_cancelling(result)))
        for file in {file for term in terms for file in term.adapter.files}:
            file.check_unchanged()
        return result.as_manifest()

    job = combination_id(plan)
    inputs = (*(term.adapter.path for term in terms), *(() if base is None else (base.path,)))
    options = replace(options, inputs=inputs, side_files=side_files(terms))
    output = write_adapter(_carded(plan), plan.target, job, prove, options)
    return replace(result, output=output)


def _carded(plan: CombinationPlan) -> Rendering:
    result = plan.result
    outcomes = Counter(module.outcome for module in result.modules)
    before = [rank for module in result.modules for rank in module.ranks]
    measured = [
        ("weights", ", ".join(f"{number} {outcome}" for outcome, number in outcomes.items())),
        ("greatest rank", f"{max(before, default=0)} before, {max((m.rank for m in result.modules), default=0)} now"),
    ]
    if result.error is not None:
        measured.append(("error of the change (relative, Frobenius norm)", f"{result.error:.2%}"))
    sources = [(term.adapter, term.weight) for term in plan.combination.terms]
    what = "resized" if result.verb == "resize" else f"combined ({result.method})"
    return with_card(plan.rendering, plan.target, sources, plan.combination.base, what, measured)


def combination_id(plan: CombinationPlan) -> str:
    """Names a combination by the contents of its sources and its options."""
    result = plan.result
    options = plain(plan.combination.options)
    if options["majority"] == MAJORITIES[0]:  # as if there were no choice: ids stay those of before there was one
        del options["majority"]
    facts = {
        "verb": result.verb,
        "recipe": options,
        "sources": plain(result.sources),
        "target": plan.target.name,
    }
    return job_id(facts, [file for term in plan.combination.terms for file in term.adapter.files], plan.rendering)


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
        f"the adapters nearly cancel in {len(errors)} weights: rounding of the factors is up to {max(errors):.1%} of "
        f"what is left{hint}"
    ]


def _check_something(result: CombineResult) -> None:
    """A sum that cancels is no adapter."""
    if all(module.norm == 0.0 for module in result.modules):
        raise NothingChangedError(
            "the result would change nothing: what was added is zero, cancels, or was dropped by the density",
            hint="check the adapters, their weights, and `density=` where there is one",
        )
