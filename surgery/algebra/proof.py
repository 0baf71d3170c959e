# SPDX-License-Identifier: Apache-2.0
"""The proof of a combination.

The file is read back, and each weight's delta compared with the sum of the sources' deltas, in float64.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy

from surgery.algebra.combination import CombinationPlan
from surgery.algebra.combined_update import CombinedUpdate, Solutions
from surgery.algebra.group import key_of
from surgery.algebra.sums import DeltaTarget, stacked
from surgery.engine.factor_proof import approximation_errors
from surgery.engine.proof import check_errors, compare, read_back, restricted
from surgery_formats.arrays import Array
from surgery_formats.binding.bind import bind
from surgery_formats.binding.sizes import sized
from surgery_formats.canonical.adapter import Adapter, Site
from surgery_formats.canonical.site_names import in_component_of, same_denoiser
from surgery_formats.dtypes import DType
from surgery_formats.errors import ProofError
from surgery_formats.updates import LoRA, Update, experts_of, in_full, is_directed, is_replacing, low_rank_part

__all__ = ["CombinationProof", "SumError", "prove_combination"]

TOLERANCE = 1e-6
"""Error of a sum that is stored in full, relative to the norms of its terms: what float32 factors allow."""
OPTIMAL = 1.0001
"""Error of a sum that was cut, relative to the best of its rank."""
# Rounding both factors: relative errors of half a unit in the last place, twice, and they add up like noise, not like
# this bound.
_ROUNDING = {DType.F16: 2.0**-10, DType.BF16: 2.0**-7}
_ELEMENTS = 8  # of one element, relative to the greatest: products of few terms do not average out


@dataclass(frozen=True, slots=True)
class SumError:
    """One weight, read back.

    Attributes:
        norm: Frobenius norm of the exact delta.
        error: Relative Frobenius error; None where there was nothing to compare with.
        optimum: The error that was intended, relative.
    """

    norm: float
    error: float
    optimum: float


@dataclass(frozen=True, slots=True)
class CombinationProof:
    """A written combination, compared with what was meant.

    Attributes:
        errors: By site, for everything that is added to a weight.
        approximated: Sites that the format holds only approximately.
    """

    errors: Mapping[str, SumError]
    approximated: frozenset[str]


def prove_combination(path: Path, plan: CombinationPlan) -> CombinationProof:
    """Read back what lies at `path` and compare it with the sums it was planned to be.

    Raises:
        ProofError: something is missing, left over, or further from the sum than intended.
    """
    adapter, base, dtype = plan.adapter, plan.combination.base, plan.dtype
    updates, solutions = plan.combination.updates, plan.combination.solutions
    written = in_component_of(adapter.updates, read_back(plan.target, path), named=base is not None)
    written = written if base is None else sized(written, base)
    near = approximation_errors(plan.rendering, written, TOLERANCE)
    approximated = frozenset(map(str, near))
    tolerance = TOLERANCE if dtype is None else _ROUNDING.get(dtype, TOLERANCE)
    bound = tolerance if dtype is None else _ELEMENTS * tolerance
    matched = _matched(adapter, written)
    if matched is None:  # fused or split on the way: both are bound to the base, weight by weight
        binding = None if base is None else bind([(adapter, 1.0)], base)
        check_errors(compare(adapter, written, binding), bound, path)
        intended = {str(combined.site): error for combined in updates if (error := _intended(combined, solutions))}
        return CombinationProof(intended, approximated)
    kept = {combined.site: combined.updates for combined in updates if not (combined.targets or combined.vector)}
    if same := {site: chain for site, chain in kept.items() if site not in near}:
        there = replace(written, updates={site: matched[site] for site in same})
        check_errors(compare(restricted(adapter, same), there, None), bound, path)
    errors = {}
    for combined in updates:
        if combined.site not in kept:
            slack = near.get(combined.site, 0.0)
            errors[str(combined.site)] = _measure(
                combined, matched[combined.site], combined.lost(solutions), tolerance, slack, path
            )
    return CombinationProof(errors, approximated)


def _matched(meant: Adapter, written: Adapter) -> dict[Site, tuple[Update, ...]] | None:
    """The written updates by the sites they were meant for; None if names or kinds changed on the way."""
    flat = any(site.flat for adapter in (meant, written) for site in adapter.updates)
    called = same_denoiser(site.component for adapter in (meant, written) for site in adapter.updates)

    def key(site: Site) -> tuple[str, str]:
        return key_of(replace(site, component=called.get(site.component, site.component)), flat=flat)

    by_key = {key(site): chain for site, chain in written.updates.items()}
    keys = {site: key(site) for site in meant.updates}
    if set(keys.values()) != by_key.keys() or len(by_key) != len(written.updates):
        return None
    matched = {site: by_key[key] for site, key in keys.items()}
    alike = all([u.kind for u in chain] == [u.kind for u in matched[site]] for site, chain in meant.updates.items())
    return matched if alike else None


def _measure(
    combined: CombinedUpdate, chain: Sequence[Update], lost: float, tolerance: float, slack: float, path: Path
) -> SumError:
    """Norm and error of one weight, all its experts together.

    `slack` is what codes add to the error, relative to the values they stand for.
    """
    norms, errors, sizes = [], [], []
    for target, loras in zip(combined.targets, _loras(combined, chain), strict=True):
        compared = target.compare(*stacked(loras))
        norms.append(compared.norm)
        errors.append(compared.error)
        sizes.append(compared.size)
    if combined.vector is not None:
        value = combined.vector()
        stored = sum(o.value.load(DType.F64) * o.scale for u in chain if (o := in_full(u)))
        norms.append(float(numpy.linalg.norm(value)))
        errors.append(float(numpy.linalg.norm(value - stored)))
        sizes.append(norms[-1])
    for mine, theirs in zip(_whole(combined.updates), _whole(chain), strict=True):
        if not numpy.linalg.norm(mine - theirs) <= tolerance * numpy.linalg.norm(mine):
            raise ProofError("is not what it was, which is stored whole", file=path.name, tensor=combined.site.path)
    norm, error, size = (math.hypot(*values) for values in (norms, errors, sizes))
    if not error <= OPTIMAL * lost + tolerance * size + slack * (norm + lost):
        raise ProofError(
            f"is {error:.1e} away from the sum, {lost:.1e} was intended (its norm is {norm:.1e})",
            file=path.name,
            tensor=combined.site.path,
            hint='`dtype="fp32"` keeps more digits',
        )
    if norm <= 1e-12 * size:  # the terms cancel: relative to nothing every error is infinite
        return SumError(0.0, 0.0, 0.0)
    return SumError(norm, error / norm, lost / norm)


def _whole(chain: Sequence[Update]) -> list[Array]:
    """Values that are taken over: whole weights, and the magnitudes of a DoRA."""
    replacing = [factor for update in chain if is_replacing(update) for factor in update.factors().values()]
    magnitudes = [update.magnitude for update in chain if is_directed(update)]
    return [factor.load(DType.F64) for factor in (*replacing, *magnitudes)]


def _loras(combined: CombinedUpdate, chain: Sequence[Update]) -> list[list[LoRA]]:
    """What was written for each of ``combined.targets``."""
    stacks = [experts for update in chain if (experts := experts_of(update))] or [(update,) for update in chain]
    return [[lora for s in stacks if (lora := low_rank_part(s[e]))] for e in range(len(combined.targets))]


def _intended(combined: CombinedUpdate, solutions: Solutions) -> SumError | None:
    """What the factors leave out, where the written file can only be compared with them."""
    if not combined.targets:
        return None
    norm = math.hypot(*(_norm(target) for target in combined.targets))
    error = combined.lost(solutions) / norm if norm else 0.0
    return SumError(norm, error, error)


def _norm(target: DeltaTarget) -> float:
    out, inputs = target.shape
    return target.compare(numpy.zeros((out, 0)), numpy.zeros((0, inputs))).norm
