# SPDX-License-Identifier: Apache-2.0
"""An adapter of any kind as LoRAs: exactly where its changes are of low rank, else as near as a chosen rank allows.

What an update is, it says itself: a LoRA, a product of known factors, or a change that is formed from the base. Of the
last kind the least rank that loses nothing is found by an SVD; where that is no low rank, the user is asked for one.
What replaces values of the base, and what is added to biases, stays as it is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from surgery.algebra.change_svd import HERE, SVDs
from surgery.algebra.combined_adapter import combined_adapter
from surgery.algebra.combined_update import CombinedUpdate, Solutions, new_solutions
from surgery.algebra.group import applicable_updates
from surgery.algebra.lora_of_weight import (
    WeightForm,
    is_full_matrix,
    is_saved_matrix,
    lora_of_saved,
    lora_of_weight,
)
from surgery.algebra.lora_question import no_low_rank
from surgery.algebra.proof import OPTIMAL, TOLERANCE
from surgery.algebra.sums import CombineOptions, stacked
from surgery.engine.execute import default_workers
from surgery.rank import Rank
from surgery_formats.adapters.format import Entry, Format
from surgery_formats.canonical.adapter import Adapter, Site, WeightedAdapter
from surgery_formats.errors import FitError, ProofError
from surgery_formats.models.checkpoint import Checkpoint
from surgery_formats.text import show
from surgery_formats.threads import one_thread
from surgery_formats.updates import LoRA, Update, experts_of

__all__ = ["LoraForm", "lora_form", "prove_lora_form"]

_ASKED = 8
"""Weights of no low rank that are measured before the user is asked: enough to show what a rank costs."""
_FORMED = 2 << 30  # bytes of changes that are formed at once
_COPIES = 32  # bytes for each of their elements: the change in float64, what it was made of, and what the SVD leaves


@dataclass(frozen=True)
class LoraForm:
    """An adapter as LoRAs.

    Attributes:
        adapter: The LoRAs, for a writer, and what was kept.
        weights: What became of every weight, by site.
        solutions: The solved factors.
    """

    adapter: Adapter
    weights: Mapping[str, WeightForm]
    solutions: Solutions

    def restated(self, entries: Sequence[Entry]) -> tuple[Entry, ...]:
        """The writer's entries, with what became of the updates before it saw them."""
        return tuple(self._restated(entry) for entry in entries)

    def _restated(self, entry: Entry) -> Entry:
        weight = self.weights.get(entry.site)
        rank = 0 if weight is None else weight.made.rank
        if weight is None or weight.taken_over or entry.outcome == "dropped" or not rank:
            return entry
        detail = f"cut to rank {rank}" if weight.cut else f"{weight.kind} as LoRA of rank {rank}"
        if entry.outcome == "approximated":
            detail = f"{detail}, {entry.detail}"
        if weight.error:
            return replace(entry, outcome="approximated", detail=detail, error=weight.error)
        return replace(entry, outcome="folded" if entry.outcome == "exact" else entry.outcome, detail=detail)


def lora_form(
    adapter: Adapter,
    base: Checkpoint | None,
    target: Format,
    rank: Rank | None,
    *,
    saved: bool = False,
    svds: SVDs = HERE,
) -> LoraForm:
    """An adapter as LoRAs, whose factors are worked out when they are written.

    Args:
        adapter: What to convert.
        base: The model it was trained on; needed where a change depends on it.
        target: The format it will be written in.
        rank: Directions of each weight; None loses nothing.
        saved: Whether matrices trained in full become LoRAs too, of their differences to the base, which is needed then.
        svds: Where SVDs of changes that are formed in full come from.

    Raises:
        FitError: a change depends on the base and there is none, has no low rank and no rank was chosen, or no update
            changes a matrix.
    """
    if adapter.prompt is not None:
        raise FitError(f"{adapter.kind} trains virtual tokens: they are no change of a weight", file=adapter.path)
    options, solutions = CombineOptions.of("exact", rank or Rank()), new_solutions(while_planning=True)
    updates = adapter.updates if base is None else applicable_updates(adapter, base)

    def formed_as(item: tuple[Site, tuple[Update, ...]]) -> WeightForm:
        site, chain = item
        if saved and base is not None and is_saved_matrix(chain):
            return lora_of_saved(site, chain, base, options, solutions, svds)
        return lora_of_weight(site, chain, base, options, solutions, adapter, svds)

    weights: dict[str, WeightForm] = {}
    high = []
    # One thread inside linear algebra, as when factors are written: the same factors may be worked out twice.
    with one_thread(), ThreadPoolExecutor(_workers(updates), "surgery-lora") as pool:
        for site, form in zip(updates, pool.map(formed_as, updates.items()), strict=True):
            weights[str(site)] = form
            if form.spectrum is not None:
                high.append(form.spectrum)
                if len(high) == _ASKED:
                    pool.shutdown(cancel_futures=True)
                    break
    if high:
        raise no_low_rank(high, len(updates), adapter)
    if not any(form.made.rank for form in weights.values()):
        if not options.truncates and any(is_full_matrix(site, one) for site, chain in updates.items() for one in chain):
            raise FitError(
                "its changes of matrices are stored in full: a LoRA of them has a rank that is chosen",
                file=adapter.path,
                hint="give a rank (`rank=`)",
            )
        kinds = sorted({update.kind for chain in updates.values() for update in chain})
        raise FitError(
            f"it changes no matrix ({', '.join(map(show, kinds))}): a LoRA could hold nothing of it",
            file=adapter.path,
            hint="merge it into the base",
        )
    made = {form.made.site: form.made.updates for form in weights.values()}
    formed = combined_adapter([WeightedAdapter(adapter, 1.0)], made, target)
    optional = frozenset(site for site in adapter.optional if site in made)
    return LoraForm(replace(formed, kind="LORA", optional=optional), weights, solutions)


def _workers(updates: Mapping[Site, Sequence[Update]]) -> int:
    """Threads, each of which may form the largest change."""
    largest = max((math.prod(update.shape) for chain in updates.values() for update in chain), default=1)
    return max(1, min(default_workers(), _FORMED // (_COPIES * max(largest, 1))))


def prove_lora_form(path: Path, form: LoraForm) -> dict[str, float]:
    """Compare every LoRA with the change that its updates' own equations make, in float64.

    What lies at `path` was proved to be these LoRAs. Returns no errors of its own: those of approximated weights were
    measured as they were solved for.

    Raises:
        ProofError: a LoRA is further from the change than intended.
    """
    for site, weight in form.weights.items():
        made = weight.made
        if not made.solved_as:
            continue
        for target, lora, key in zip(made.targets, _loras(made), made.solved_as, strict=True):
            compared = target.compare(*stacked([lora]))
            lost = form.solutions.errors[key]
            if not compared.error <= OPTIMAL * lost + TOLERANCE * compared.size:
                raise ProofError(
                    f"is {compared.error:.1e} away from what {weight.kind} does, {lost:.1e} was intended "
                    f"(its norm is {compared.norm:.1e})",
                    file=path.name,
                    tensor=site,
                )
    return {}


def _loras(made: CombinedUpdate) -> list[LoRA]:
    """The LoRA that was made for each of its targets."""
    parts = [part for update in made.updates for part in (experts_of(update) or (update,))]
    return [lora for part in parts if (lora := part.low_rank())]
