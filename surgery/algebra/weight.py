# SPDX-License-Identifier: Apache-2.0
"""The combination of one weight.

Updates that add up are added; those that need a base or a rank to be combined are refused by name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from surgery.algebra.combined_update import CombinedUpdate, Solutions
from surgery.algebra.dense_change import combine_changes, combine_offsets
from surgery.algebra.experts import combine_stacks
from surgery.algebra.group import Contribution
from surgery.algebra.low_rank import combine_loras, cut_direction
from surgery.algebra.sums import CombineOptions
from surgery.algebra.ties_and_dare import DENSE_METHODS
from surgery_formats.binding.sizes import check_complete
from surgery_formats.canonical.adapter import Site, WeightedAdapter
from surgery_formats.errors import FitError
from surgery_formats.models.checkpoint import Checkpoint
from surgery_formats.text import listing, show
from surgery_formats.updates import expanded, in_full, is_directed, is_linear, is_refusing

__all__ = ["combine_weight"]


def combine_weight(
    key: tuple[str, str],
    contributions: Sequence[Contribution],
    terms: Sequence[WeightedAdapter],
    options: CombineOptions,
    solutions: Solutions,
    base: Checkpoint | None = None,
) -> CombinedUpdate:
    """The combination of one weight.

    `key`, as `group` made it, names the weight where random numbers are drawn for it. With a base and a rank, every
    change is a delta like others.

    Raises:
        FitError: what the result is depends on the base, or shapes differ.
    """
    site = next((share.site for share in contributions if share.site.module_kind), contributions[0].site)
    carried = [share for share in contributions if share.carried]
    if carried:
        _check_carried(carried, terms)
        rest = [share for share in contributions if not share.carried]
        if not rest:
            return CombinedUpdate(site, (carried[0].update,), "kept")
        combined = combine_weight(key, rest, terms, options, solutions, base)
        return replace(combined, updates=(carried[0].update, *combined.updates))
    name = f"{key[0]}:{key[1]}"
    low_rank = [share for share in contributions if share.update.low_rank()]
    stacks = [share for share in contributions if share.stack]
    full = [share for share in contributions if in_full(share.update)]
    others = [s for s in contributions if not (s.update.low_rank() or s.stack or in_full(s.update))]
    if others:
        changes = others + low_rank
        same_shape = len({share.update.shape for share in changes}) == 1
        if options.truncates and same_shape and len(changes) == len(contributions) and _all_change(others):
            combined_change = combine_changes(name, site, contributions, base, options, solutions)
            if combined_change is not None:
                return combined_change
        if (
            options.truncates
            and len(contributions) == 1
            and contributions[0].weight == 1.0
            and is_directed(others[0].update)
        ):
            return cut_direction(name, site, others[0], options, solutions)
        products = _expanded(contributions)
        if products and (len({share.owner for share in contributions}) > 1 or options.method == "svd"):
            return combine_weight(key, products, terms, options, solutions, base)
        return _kept(site, contributions, others, terms, options, base)
    _check_shapes(site, contributions, terms)
    present = [shares for shares in (low_rank, stacks, full) if shares]
    if (stacks or options.method in DENSE_METHODS) and len(present) > 1:
        raise FitError(
            f"is changed by a {present[0][0].update.kind} and by a {present[1][0].update.kind}, which "
            f"'{options.method}' does not combine",
            tensor=site.path,
        )
    combined_kinds = [
        *([combine_loras(name, site, low_rank, options, solutions)] if low_rank else []),
        *([combine_stacks(name, site, stacks, terms, options, solutions)] if stacks else []),
        *([combine_offsets(name, site, full, options)] if full else []),
    ]
    if len(combined_kinds) == 1:
        return combined_kinds[0]
    low, offset = combined_kinds  # a LoRA and a full difference of one weight add up side by side
    return replace(low, updates=(*low.updates, *offset.updates), vector=offset.vector)


def _expanded(contributions: Sequence[Contribution]) -> list[Contribution]:
    """The contributions as LoRAs, if each is one or a product of known factors; else none."""
    products = [replace(share, update=lora) for share in contributions if (lora := expanded(share.update))]
    return products if len(products) == len(contributions) else []


def _all_change(contributions: Sequence[Contribution]) -> bool:
    """Whether each is a change of the whole weight, whose sizes are known."""
    return all(share.update.effect != "sets" and all(share.update.shape) for share in contributions)


def _check_shapes(site: Site, contributions: Sequence[Contribution], terms: Sequence[WeightedAdapter]) -> None:
    if len({share.update.shape for share in contributions}) > 1:
        sizes = [f"{list(share.update.shape)} in {show(terms[share.owner].name)}" for share in contributions]
        raise FitError(f"the adapters were made for different weights: {', '.join(sizes)}", tensor=site.path)


def _check_carried(contributions: Sequence[Contribution], terms: Sequence[WeightedAdapter]) -> None:
    """The base's own values are stored once, so all who brought them must have brought the same."""
    first = contributions[0].update.tensors[0]
    for share in contributions[1:]:
        other = share.update.tensors[0]
        if first.shape != other.shape or not bool((first.read() == other.read()).all()):
            names = listing([terms[contributions[0].owner].name, terms[share.owner].name])
            raise FitError(
                f"is stored whole by {names}, with other values: they were trained on different bases",
                tensor=other.name,
            )


def _kept(
    site: Site,
    contributions: Sequence[Contribution],
    others: Sequence[Contribution],
    terms: Sequence[WeightedAdapter],
    options: CombineOptions,
    base: Checkpoint | None,
) -> CombinedUpdate:
    """Keep an update without low-rank factors.

    It survives where nothing is added to it; only an additive one can also be scaled.
    """
    update, weight = others[0].update, terms[others[0].owner].weight
    owners = sorted({share.owner for share in contributions})
    changed = f"'{show(str(site))}' is changed by"
    why = ""
    if len(owners) > 1:
        if base is None:
            for owner in owners:  # their rows or sizes are what a base would tell, whatever their rank
                check_complete(terms[owner].adapter)
        names = listing([terms[owner].name for owner in owners])
        known = update.effect == "adds" and all(update.shape)
        depends = "has no low rank" if known else "depends on the base"
        why = f"{changed} {names}, by one of them as {update.kind}: their sum {depends}"
    elif update.effect == "adds" and not options.truncates and is_linear(update) and len(contributions) == 1:
        return CombinedUpdate(site, (update if weight == 1.0 else update.scaled(weight),), "kept")
    elif weight != 1.0:
        why = f"{changed} a {update.kind}, of which {weight:g} times depends on the base"
    elif update.effect != "sets" and (options.truncates or options.method != "exact"):
        depends = "sizes only the base tells" if update.effect == "adds" else "change depends on the base"
        why = f"{changed} a {update.kind}, whose {depends}: its rank cannot change without it"
    if why:
        if is_refusing(update):  # no base and no rank would help
            update.refuse()
        raise FitError(
            why,
            file=terms[others[0].owner].adapter.path,
            hint=f"{_way_out(contributions, options, base)} them into the base and extract a LoRA from the result",
        )
    return CombinedUpdate(site, tuple(share.update for share in contributions), "kept")


def _way_out(contributions: Sequence[Contribution], options: CombineOptions, base: Checkpoint | None) -> str:
    """What makes the combination possible, up to the verb `merge`."""
    if any(share.update.effect == "sets" for share in contributions):
        return "merge"
    known = all(share.update.effect == "adds" and all(share.update.shape) for share in contributions)
    missing = ["the base (`base=`)"] if base is None and not known else []
    missing += [] if options.truncates else ["a rank (`rank=`)"]
    return f"give {' and '.join(missing)}, or merge" if missing else "merge"
