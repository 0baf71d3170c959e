# SPDX-License-Identifier: Apache-2.0
"""Updates without low-rank factors as one LoRA of a chosen rank, from the change they make, formed in full.

What an update adds is the same for any weight (LoHa, LoKr). What it makes of a weight only the base tells: of a DoRA
that is ``m / ||W + s B A|| * (W + s B A) - W``, of a rotation ``W R - W``. Differences that are stored in full (biases
of ``lora_bias``, LyCORIS ``diff``) are added up; they have no rank, and lose nothing.

Where one of several updates maps the weight, their sum is what a merge of them, one after the other, does to the base.
TIES, DARE and pruning are of each adapter's own change, what it does to the base alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy

from surgery.algebra.combined_update import CombinedUpdate, Solutions
from surgery.algebra.group import Contribution
from surgery.algebra.low_rank import common_rank, solved_lora
from surgery.algebra.sums import CombineOptions, DenseDelta, merged_delta
from surgery.algebra.ties_and_dare import DENSE_METHODS, merge_deltas
from surgery_formats.adapters.writing import places_of, whole_place
from surgery_formats.arrays import Array
from surgery_formats.binding.edits import prepared
from surgery_formats.binding.operation import Operation, at_weight
from surgery_formats.canonical.adapter import Site
from surgery_formats.dtypes import DType
from surgery_formats.models.checkpoint import Checkpoint
from surgery_formats.storage.parameter import Parameter
from surgery_formats.storage.plain import Plain
from surgery_formats.tensors.apply import apply_chain
from surgery_formats.tensors.computed import computed
from surgery_formats.tensors.views import rows, whole
from surgery_formats.threads import one_thread
from surgery_formats.updates import Factor, Offset, Update, in_full
from surgery_formats.updates.weights import HeldWeight

__all__ = ["ChangeTerm", "change_in_turn", "change_of_bias", "combine_changes", "combine_offsets"]

_HEIGHT = 512  # rows of a weight that are measured at a time


@dataclass(frozen=True)
class ChangeTerm:
    """A term of a sum: the change that an update makes to a weight.

    Attributes:
        update: The update.
        weight: Of the base; None for an update that adds the same to any weight.
    """

    update: Update
    weight: Parameter | None

    @property
    def shape(self) -> tuple[int, int]:
        """``(out, in)``."""
        return self.update.shape

    @property
    def rank(self) -> int:
        """Rank of the update's factors, 0 without low-rank factors; the change itself has a higher one."""
        return self.update.rank or 0

    def delta(self, dtype: DType) -> Array:
        """The change of the weight, dense."""
        values = numpy.zeros(self.shape, dtype.numpy) if self.weight is None else self.weight.get(dtype)
        apply = self.update.prepare(HeldWeight(values))
        return apply(values.copy(), range(self.shape[0]), range(self.shape[1])) - values


def change_in_turn(before: Callable[[], Array], contributions: Sequence[Contribution]) -> Array:
    """What a merge of all in their order changes of a weight; `before` gives its values, float64."""
    values = before()
    source = Plain.of(computed(str(contributions[0].site), values.shape, (), lambda: values, DType.F64))
    operations = []
    for share in contributions:
        update, part_of_way = at_weight(share.update, share.weight)
        for first, part in update.parts():
            view = rows(whole(source.shape), first, first + part.shape[0])
            operations.append(Operation(part, view, share.site, share.owner, part_of_way))
    with one_thread():
        after = values.copy()
        apply_chain(prepared(operations, source, DType.F64, _HEIGHT), after, 0, len(after))
        return after - values


def combine_changes(
    name: str,
    site: Site,
    contributions: Sequence[Contribution],
    base: Checkpoint | None,
    options: CombineOptions,
    solutions: Solutions,
) -> CombinedUpdate | None:
    """The changes of one weight as one LoRA, the best of its rank; of a bias as one offset.

    None if a change depends on the base, and there is none or it holds the weight in pieces.
    """
    updates = [share.update for share in contributions]
    weight = None
    if any(update.effect != "adds" for update in updates):
        if base is None or whole_place(places := places_of(site, base, updates[0].tensors)) is None:
            return None
        weight = places[0].parameter
    # a sum of dense deltas, where nothing drops
    dense = options if options.method in DENSE_METHODS else replace(options, method="dare-linear", density=1.0)
    if weight is not None and len(updates) > 1 and options.method not in DENSE_METHODS:
        ranks = tuple(update.rank or 0 for update in updates)
        chained = DenseDelta(
            updates[0].shape,
            ranks,
            partial(change_in_turn, partial(weight.get, DType.F64), contributions),
            options.seed,
        )
        return _as_one(name, site, chained, updates, dense, options, solutions)
    terms = tuple(
        update.low_rank() or ChangeTerm(update, weight if update.effect != "adds" else None) for update in updates
    )
    weights, owners = tuple(share.weight for share in contributions), tuple(share.owner for share in contributions)
    return _as_one(name, site, merged_delta(terms, weights, owners, dense, name), updates, dense, options, solutions)


def _as_one(
    name: str,
    site: Site,
    target: DenseDelta,
    sources: Sequence[Update],
    dense: CombineOptions,
    options: CombineOptions,
    solutions: Solutions,
) -> CombinedUpdate:
    if site.path.endswith(".bias"):
        return change_of_bias(site, target, sources)
    rank, best = common_rank((target,), dense)
    return solved_lora(name, site, target, sources, rank, best, options, solutions)


def change_of_bias(site: Site, target: DenseDelta, sources: Sequence[Update]) -> CombinedUpdate:
    """The change of a bias, which is stored in full and loses nothing."""

    def vector() -> Array:
        return target.formed()[:, 0]

    tensors = [tensor for source in sources for tensor in source.tensors]
    value = computed(f"{site}.value", target.shape[:1], tensors, vector)
    return CombinedUpdate(site, (Offset(Factor.of(value)),), "exact", vector=vector)


def combine_offsets(
    name: str, site: Site, contributions: Sequence[Contribution], options: CombineOptions
) -> CombinedUpdate:
    """The offsets of one bias or weight as one."""
    offsets = [offset for share in contributions if (offset := in_full(share.update))]
    weights = [share.weight for share in contributions]
    if len(offsets) == 1 and options.method not in DENSE_METHODS:
        return CombinedUpdate(site, (offsets[0].scaled(weights[0]),), "kept")

    def vector() -> Array:
        if options.method not in DENSE_METHODS:
            return numpy.stack([_value(o) * w for o, w in zip(offsets, weights, strict=True)]).sum(0)
        return merge_deltas(
            [partial(_value, offset) for offset in offsets],
            weights,
            method=options.method,
            density=options.density,
            seed=options.seed,
            name=name,
            owners=[share.owner for share in contributions],
            majority=options.majority,
        )

    tensors = [tensor for offset in offsets for tensor in offset.tensors]
    tensor = computed(f"combined.{site}", offsets[0].value.shape, tensors, vector)
    return CombinedUpdate(site, (Offset(Factor.of(tensor)),), "exact", vector=vector)


def _value(offset: Offset) -> Array:
    return offset.value.load(DType.F64) * offset.scale
