# SPDX-License-Identifier: Apache-2.0
"""The combination of one weight: what can be added is added, what depends on the base is refused by name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from surgery.algebra.dora import with_dora
from surgery.algebra.experts import stacked
from surgery.algebra.group import Contribution
from surgery.algebra.parts import CombinedUpdate, Solutions, low_rank, offset
from surgery.algebra.sums import Recipe
from surgery.algebra.task_vectors import DENSE_METHODS
from surgery_formats.canonical.adapter import Site, WeightedAdapter
from surgery_formats.errors import FitError
from surgery_formats.models.checkpoint import Checkpoint
from surgery_formats.text import listing, show
from surgery_formats.updates import DoRA, LoRA, Offset, Replacement, Stacked, TokenRows

__all__ = ["make_part"]


@dataclass
class _Group:
    """Shares of one weight, by kind."""

    loras: list[Contribution] = field(default_factory=list)
    stacks: list[Contribution] = field(default_factory=list)
    offsets: list[Contribution] = field(default_factory=list)
    others: list[Contribution] = field(default_factory=list)

    def add(self, share: Contribution) -> None:
        kinds = ((LoRA, self.loras), (Stacked, self.stacks), (Offset, self.offsets))
        next((found for kind, found in kinds if isinstance(share.update, kind)), self.others).append(share)


def make_part(
    key: tuple[str, str],
    shares: Sequence[Contribution],
    given: Sequence[WeightedAdapter],
    recipe: Recipe,
    memory: Solutions,
    base: Checkpoint | None = None,
) -> CombinedUpdate:
    """The combination of one weight.

    Args:
        key: As `group` made it; names the weight where random numbers are drawn for it.
        shares: Of this weight.
        given: All adapters, for messages.
        recipe: How.
        memory: Of the whole combination.
        base: If one was given: with it, and a rank, a DoRA is a delta like others.

    Raises:
        FitError: what the result is depends on the base, or shapes differ.
    """
    site = shares[0].site
    carried = [share for share in shares if share.carried]
    if carried:
        _check_carried(carried, given)
        rest = [share for share in shares if not share.carried]
        if not rest:
            return CombinedUpdate(site, (carried[0].update,), "kept")
        part = make_part(key, rest, given, recipe, memory, base)
        return replace(part, updates=(carried[0].update, *part.updates))
    found = _Group()
    for share in shares:
        found.add(share)
    name = f"{key[0]}:{key[1]}"
    if base is not None and recipe.truncates and _low_rank_or_dora(shares):
        made = with_dora(name, site, shares, base, recipe, memory)
        if made is not None:
            return made
    if found.others:
        return _kept(site, shares, found.others, given, recipe)
    kinds = [kind for kind in (found.loras, found.stacks, found.offsets) if kind]
    shapes = {share.update.shape for share in shares}
    if len(shapes) > 1:
        sizes = ", ".join(f"{list(share.update.shape)} in {show(given[share.owner].name)}" for share in shares)
        raise FitError(f"the adapters were made for different weights: {sizes}", tensor=site.path)
    dense = recipe.method in DENSE_METHODS
    if (found.stacks or dense) and len(kinds) > 1:
        raise FitError(
            f"is changed by a {kinds[0][0].update.kind} and by a {kinds[1][0].update.kind}, which '{recipe.method}' does not combine",
            tensor=site.path,
        )
    parts = [
        *([low_rank(name, site, found.loras, recipe, memory)] if found.loras else []),
        *([stacked(name, site, found.stacks, given, recipe, memory)] if found.stacks else []),
        *([offset(name, site, found.offsets, recipe)] if found.offsets else []),
    ]
    if len(parts) == 1:
        return parts[0]
    low, full = parts  # a LoRA and a full difference of one weight add up side by side
    return replace(low, updates=(*low.updates, *full.updates), vector=full.vector)


def _low_rank_or_dora(shares: Sequence[Contribution]) -> bool:
    """Whether there is a DoRA, beside nothing but LoRAs of the same shape."""
    updates = [share.update for share in shares]
    alike = all(isinstance(update, LoRA | DoRA) for update in updates) and len({u.shape for u in updates}) == 1
    return alike and any(isinstance(update, DoRA) for update in updates)


def _check_carried(shares: Sequence[Contribution], given: Sequence[WeightedAdapter]) -> None:
    """The base's own values are stored once, so all who brought them must have brought the same."""
    first = shares[0].update.tensors[0]
    for share in shares[1:]:
        other = share.update.tensors[0]
        if first.shape != other.shape or not bool((first.read() == other.read()).all()):
            names = listing([given[shares[0].owner].name, given[share.owner].name])
            raise FitError(
                f"is stored whole by {names}, with other values: they were trained on different bases",
                tensor=other.name,
            )


def _kept(
    site: Site,
    shares: Sequence[Contribution],
    others: Sequence[Contribution],
    given: Sequence[WeightedAdapter],
    recipe: Recipe,
) -> CombinedUpdate:
    """An update that is not an addition survives only where nothing is to be added to it, subtracted from it or scaled."""
    what = others[0].update.kind
    owners = sorted({share.owner for share in shares})
    blamed = given[others[0].owner]
    why = ""
    if len(owners) > 1:
        names = listing([given[owner].name for owner in owners])
        why = f"'{show(str(site))}' is changed by {names}, by one of them as {what}: their sum depends on the base"
    elif blamed.weight != 1.0:
        why = f"'{show(str(site))}' is changed by a {what}, of which {blamed.weight:g} times depends on the base"
    elif isinstance(others[0].update, DoRA) and (recipe.truncates or recipe.method != "exact"):
        why = f"'{show(str(site))}' is a DoRA, whose lengths hold for its own directions on its base: its rank cannot change"
    elif recipe.method in DENSE_METHODS and not isinstance(others[0].update, Replacement | TokenRows):
        why = f"'{show(str(site))}' is changed by a {what}, whose delta depends on the base"
    if why:
        dora = all(isinstance(share.update, LoRA | DoRA) for share in shares)
        hint = "give the base and a rank (--base, --rank), or merge" if dora else "merge"
        raise FitError(
            why, file=blamed.adapter.path, hint=f"{hint} them into the base and extract a LoRA from the result"
        )
    return CombinedUpdate(site, tuple(share.update for share in shares), "kept")
