# SPDX-License-Identifier: Apache-2.0
"""What an adapter does to one weight, as a LoRA of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from surgery.algebra.change_svd import HERE, ChangeSVD, SVDs
from surgery.algebra.combined_update import CombinedUpdate, Solutions
from surgery.algebra.dense_change import change_of_bias
from surgery.algebra.expanded import ExpandedChange, break_even, formed_change
from surgery.algebra.experts import combine_stacks
from surgery.algebra.group import Contribution
from surgery.algebra.lora_question import ChangeSpectrum
from surgery.algebra.low_rank import combine_loras, common_rank, computed_lora, solved_lora
from surgery.algebra.sums import CombineOptions, DenseDelta, LowRankSum, Solved
from surgery_formats.adapters.writing import places_of, zero_padded
from surgery_formats.arrays import Array
from surgery_formats.canonical.adapter import Adapter, Site, WeightedAdapter
from surgery_formats.errors import FitError
from surgery_formats.linalg.svd import NOTHING, truncated_svd
from surgery_formats.models.checkpoint import Checkpoint
from surgery_formats.text import show
from surgery_formats.updates import (
    Update,
    expanded,
    experts_of,
    in_full,
    is_replacing,
    plain_form,
    stack_of_loras,
)

__all__ = ["WeightForm", "is_full_matrix", "is_saved_matrix", "lora_of_saved", "lora_of_weight"]

_EXACT = 1e-7
"""Residual of a change formed in float64, relative to it, that is rounding: float32 factors differ by more."""
_PROBED = 256
"""Most directions among which a low rank is looked for where nothing but the change itself shows it."""
_ACCURACY = 1.0001  # greatest error of the factors over the best of their rank


@dataclass(frozen=True)
class WeightForm:
    """One weight.

    Attributes:
        made: The LoRA, and the change that it stands for.
        kind: What makes the change.
        error: What the LoRA leaves out, relative to the change, Frobenius; 0 where it is exact, None where the updates
            were taken over.
        taken_over: Whether the updates are the adapter's own.
        cut: Whether they were LoRAs, and lost directions.
        spectrum: Where the change has no low rank and none was chosen: what a rank would leave out.
    """

    made: CombinedUpdate
    kind: str
    error: float | None = None
    taken_over: bool = False
    cut: bool = False
    spectrum: ChangeSpectrum | None = None


def lora_of_weight(
    site: Site,
    chain: Sequence[Update],
    base: Checkpoint | None,
    options: CombineOptions,
    solutions: Solutions,
    adapter: Adapter,
    svds: SVDs = HERE,
) -> WeightForm:
    """The LoRA that does what `chain` does, or the nearest that `options` allows; `svds` has those of changes formed in full.

    A difference that is stored in full stays one where nothing may be lost.

    Raises:
        FitError: the change depends on a base, and there is none, or on values that replace the base's.
    """
    kind = "+".join(dict.fromkeys(update.kind for update in chain))
    forms = [plain_form(update) for update in chain]
    own = all(form is update for form, update in zip(forms, chain, strict=True))
    changes = [
        form
        for form in forms
        if form.effect != "sets" and ((options.truncates and is_full_matrix(site, form)) or not in_full(form))
    ]
    kept = tuple(form for form in forms if not any(form is change for change in changes))
    if all(form.low_rank() or stack_of_loras(form) for form in changes):
        if not changes or not options.truncates:
            rank = max((form.rank or 0 for form in changes), default=0)
            return WeightForm(CombinedUpdate(site, tuple(forms), "kept", rank=rank), kind, taken_over=own)
        resized = _resized(site, changes, kept, kind, options, solutions, adapter)
        kept_as_it_was = resized.made.outcome == "kept"
        return replace(resized, taken_over=own and kept_as_it_was, cut=own and not kept_as_it_was)
    change = _change(site, changes, kept, base, adapter)
    name = str(site)
    if site.path.endswith(".bias"):
        made = change_of_bias(site, change, changes)
        return WeightForm(_beside(kept, made), kind)
    loras = [lora for form in changes if (lora := expanded(form))]
    directions = sum(lora.rank for lora in loras)
    if len(loras) == len(changes) and (options.truncates or directions <= break_even(change.shape)):
        target = ExpandedChange(LowRankSum(tuple(loras)), change)
        rank, best = common_rank((target.factors,), options)
        made = solved_lora(name, site, target, changes, rank, best, options, solutions)
        error = best[1] / best[0] if best is not None and best[0] else 0.0
        return WeightForm(_beside(kept, made), kind, error)
    return _by_svd(site, change, changes, kept, kind, options, solutions, svds)


def is_full_matrix(site: Site, update: Update) -> bool:
    """Whether it is a difference of a matrix, stored in full; those of norms and biases are vectors, which no LoRA holds."""
    stored = in_full(update)
    return stored is not None and len(stored.value.shape) == 2 and site.path.endswith(".weight")


def is_saved_matrix(chain: Sequence[Update]) -> bool:
    """Whether a chain is one matrix that takes the place of the base's."""
    return len(chain) == 1 and is_replacing(chain[0]) and len(chain[0].stored.shape) == 2


def lora_of_saved(
    site: Site,
    chain: Sequence[Update],
    base: Checkpoint,
    options: CombineOptions,
    solutions: Solutions,
    svds: SVDs = HERE,
) -> WeightForm:
    """The LoRA nearest to the difference between a matrix that was trained in full and the base's."""
    change = formed_change(site, chain, places_of(site, base, chain[0].tensors))
    return _by_svd(site, change, chain, (), chain[0].kind, options, solutions, svds)


def _beside(kept: tuple[Update, ...], made: CombinedUpdate) -> CombinedUpdate:
    """A combination with what is kept beside it; values in the base's place come first."""
    if not kept:
        return made
    before = tuple(update for update in kept if is_replacing(update))
    after = tuple(update for update in kept if not is_replacing(update))
    return CombinedUpdate(
        made.site, (*before, *made.updates, *after), made.outcome, made.ranks, made.rank, made.targets,
        best=made.best, solved_as=made.solved_as,
    )  # fmt: skip


def _resized(
    site: Site,
    changes: Sequence[Update],
    kept: tuple[Update, ...],
    kind: str,
    options: CombineOptions,
    solutions: Solutions,
    adapter: Adapter,
) -> WeightForm:
    """LoRAs, and stacks of them, cut to a rank."""
    shares = [Contribution(0, site, change, 1.0) for change in changes]
    if all(change.low_rank() for change in changes):
        made = combine_loras(str(site), site, shares, options, solutions)
    elif len(changes) == 1:
        made = combine_stacks(str(site), site, shares, [WeightedAdapter(adapter, 1.0)], options, solutions)
    else:
        raise FitError(f"{kind} on one parameter: no one stack holds both", file=adapter.path, tensor=site.path)
    error = None
    if made.outcome != "kept":
        error = made.best[1] / made.best[0] if made.best is not None and made.best[0] else 0.0
    return WeightForm(_beside(kept, made), kind, error)


def _change(
    site: Site, changes: Sequence[Update], kept: Sequence[Update], base: Checkpoint | None, adapter: Adapter
) -> DenseDelta:
    """The change of a weight.

    Raises:
        FitError: it is not known.
    """
    maps = [change for change in changes if change.effect == "maps"]
    what = f"'{show(str(site))}' is changed by {changes[0].kind}"
    if stacks := [change for change in changes if experts_of(change)]:
        why = f"{what}, stacked for experts, which is no stack of LoRAs"
        raise FitError(why, file=adapter.path, tensor=stacks[0].tensors[0].name, hint="merge it into the base")
    new = [update for update in kept if is_replacing(update) and update.held != "carried"]
    if maps and (new or any(update.effect == "sets" and not is_replacing(update) for update in kept)):
        raise FitError(
            f"{what} after its values were replaced: a LoRA of that is not one of the base's",
            file=adapter.path,
            hint="merge it into the base",
        )
    if base is None and (maps or not all(size for change in changes for size in change.shape)):
        depends = "what it adds depends on the base" if maps else "its file lacks sizes that the base has"
        raise FitError(
            f"{what}: {depends}", file=adapter.path, tensor=changes[0].tensors[0].name, hint="give it with `base=`"
        )
    places = places_of(site, base, changes[0].tensors) if maps and base is not None else ()
    return formed_change(site, changes, places)


def _by_svd(
    site: Site,
    target: DenseDelta,
    changes: Sequence[Update],
    kept: tuple[Update, ...],
    kind: str,
    options: CombineOptions,
    solutions: Solutions,
    svds: SVDs,
) -> WeightForm:
    """The best factors of a change that is formed in full, of no more directions than it has."""
    name, full = str(site), min(target.shape)
    limit = options.rank if options.truncates else min(_PROBED, break_even(target.shape))
    error = min(options.max_error, 1 - _EXACT) if options.max_error is not None else None
    found: dict[str, tuple[Array, float, float]] = {}

    def worked_out() -> ChangeSVD:
        svd = truncated_svd(
            target.formed(),
            rank=limit,
            energy=options.energy,
            max_error=_EXACT if error is None and options.energy is None else error,
            accuracy=_ACCURACY if options.truncates else 1.01,
        )
        B, A = svd.factors()
        rank = max(1, svd.rank)
        return ChangeSVD(zero_padded(B, 1, rank), zero_padded(A, 0, rank), svd.S, svd.residual, svd.total)

    def solve() -> tuple[Solved, float]:
        svd = svds.of(name, target.shape, worked_out)
        found[name] = svd.values, svd.lost, svd.norm
        return Solved(svd.B, svd.A, svd.lost), svd.lost

    rank = solutions.of(name, solve).B.shape[1]
    values, lost, norm = found[name]
    relative = lost / norm if norm else 0.0
    spectrum = None
    if relative > NOTHING and not options.truncates:
        spectrum = ChangeSpectrum(name, kind, values, norm, full)
    lora = computed_lora(name, target, rank, lambda: solutions.of(name, solve), changes)
    made = CombinedUpdate(
        site,
        (lora,),
        "approximated" if relative > NOTHING else "exact",
        target.ranks,
        rank,
        (target,),
        best=(norm, lost),
        solved_as=(name,),
    )
    return WeightForm(_beside(kept, made), kind, relative if relative > NOTHING else 0.0, spectrum=spectrum)
