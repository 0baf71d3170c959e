# SPDX-License-Identifier: Apache-2.0
"""What every kind of update must do: checks for a test suite, each of which raises AssertionError.

@pytest.mark.parametrize("check", UPDATE_CHECKS, ids=lambda check: check.__name__)
def test_the_kind_conforms(check):
    check(UpdateCase(MINE))
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import get_args

import numpy

from surgery_formats.arrays import Array
from surgery_formats.tensors.views import Index
from surgery_formats.testing.promise import promised
from surgery_formats.updates import (
    Effect,
    Fit,
    Update,
    expanded,
    is_directed,
    is_in_full,
    is_invertible,
    is_linear,
    is_mixing,
    is_replacing,
    is_row_setting,
    is_unsized,
)
from surgery_formats.updates.weights import HeldWeight

__all__ = ["UPDATE_CHECKS", "UpdateCase"]

_EXACT = 1e-10  # relative, of float64
_SOLVED = 1e-6  # what a condition of ten thousand leaves of that


@dataclass(frozen=True, slots=True)
class UpdateCase:
    """An update under test.

    Attributes:
        update: As a reader makes it.
        fit: The weight it meets, for an update that does not know all sizes.
    """

    update: Update
    fit: Fit = field(default_factory=lambda: Fit((24, 40), 1, (24, 40)))

    @property
    def sized(self) -> Update:
        """The update with all sizes."""
        return self.update.fitted(self.fit) if is_unsized(self.update) else self.update

    @property
    def pieces(self) -> tuple[Update, ...]:
        """What is applied: the update's parts."""
        return tuple(part for _, part in self.sized.parts())


def answers_every_question(case: UpdateCase) -> None:
    """Members have the types that writers and reports rely on, before sizes are known and after."""
    for update in (case.update, case.sized):
        assert isinstance(update.kind, str)
        assert update.kind
        assert len(update.shape) == 2
        assert update.effect in get_args(Effect)
        assert update.rank is None or update.rank >= 0
        assert all(value is None or isinstance(value, float) for value in (update.alpha, update.scale))
        assert hash(update) == hash(update)
    assert all(case.sized.shape)


def accounts_for_its_tensors(case: UpdateCase) -> None:
    """Every tensor is in a factor or was not trained, and no factor has another."""
    update = case.update
    used = {tensor for factor in update.factors().values() for tensor in factor.tensors}
    assert used <= set(update.tensors)
    assert set(update.untrained) <= set(update.tensors)
    assert set(update.tensors) - used <= set(update.untrained)
    assert used - set(update.untrained)


def parts_cover_it(case: UpdateCase) -> None:
    """Parts lie under each other, from row 0 to the last, and have all of its tensors."""
    update, row = case.sized, 0
    for first, part in update.parts():
        assert first == row
        assert part.shape[1] == update.shape[1]
        row += part.shape[0]
    assert row == update.shape[0]
    assert {tensor for _, part in update.parts() for tensor in part.tensors} == set(update.tensors)


def any_block_is_a_part_of_the_whole(case: UpdateCase) -> None:
    """Whole rows, whole columns, and positions in any order, as transposed and permuted storage hands them over."""
    for update in case.pieces:
        weight = _weight(update.shape)
        whole = _applied(update, weight)
        rows, cols = range(update.shape[0]), range(update.shape[1])
        group = update.group if is_mixing(update) else 1
        some_rows = tuple(_random(0).permutation(len(rows))[: len(rows) // 2 + 1].tolist())
        groups = _random(0).permutation(len(cols) // group)[: len(cols) // group // 2 + 1]
        some_cols = tuple(int(g) * group + i for g in groups for i in range(group)) if group == 1 else cols
        blocks: list[tuple[Index, Index]] = [
            (rows[:1], cols),
            (rows[1:], cols),
            (rows, cols[:group]),
            (rows, cols[group:]),
            (rows[1::2], cols),
            (some_rows, some_cols),
        ]
        apply = update.prepare(HeldWeight(weight))
        for at, beside in blocks:
            if len(at) and len(beside):
                block = weight[list(at)][:, list(beside)]
                _assert_close(apply(block.copy(), at, beside), whole[list(at)][:, list(beside)], weight)


def has_the_effect_it_states(case: UpdateCase) -> None:
    """What is added is the same for every weight, what is set too; what depends on the weight is not."""
    for update in case.pieces:
        weight, other = _weight(update.shape), _weight(update.shape, seed=1)
        after, beside = _applied(update, weight), _applied(update, other)
        assert not numpy.array_equal(after, weight), "does nothing"
        if update.effect == "adds":
            _assert_close(after - weight, beside - other, weight)
        elif update.effect == "sets":
            kept = after == weight
            _assert_close(after[~kept], beside[~kept], weight)
            assert numpy.array_equal(beside[kept], other[kept])
        else:
            assert float(abs(after - weight - (beside - other)).max()) > 1e-6, "adds the same to every weight"


def is_linear_if_it_adds(case: UpdateCase) -> None:
    """What adds can be scaled, by any number; nothing else can."""
    update = case.sized
    assert is_linear(update) == (update.effect == "adds")
    if not is_linear(update):
        return
    for factor in (0.0, -0.5, 3.0):
        scaled = update.scaled(factor)
        assert (scaled.kind, scaled.shape, scaled.tensors) == (update.kind, update.shape, update.tensors)
        for (_, part), (_, twin) in zip(update.parts(), scaled.parts(), strict=True):
            weight = _weight(part.shape)
            _assert_close(_applied(twin, weight) - weight, factor * (_applied(part, weight) - weight), weight)


def is_the_lora_it_gives(case: UpdateCase) -> None:
    """``low_rank()`` and ``expanded()`` do the same to every weight, exactly, and their factors have their rank."""
    pieces = (*case.pieces, case.sized)
    for update, lora in [(u, lora) for u in pieces for lora in (u.low_rank(), expanded(u)) if lora is not None]:
        assert lora.low_rank() == lora
        assert lora.factors().keys() == {"A", "B"}
        assert update.effect == "adds"
        assert lora.shape == update.shape
        assert lora.rank <= min(lora.shape)
        weight = _weight(update.shape)
        _assert_close(_applied(lora, weight), _applied(update, weight), weight)


def does_what_its_other_members_say(case: UpdateCase) -> None:
    """Members that only some updates have agree with what is done to a weight."""
    update = case.sized
    if is_in_full(update):
        weight = _weight(update.shape)
        _assert_close(_applied(update.in_full(), weight), _applied(update, weight), weight)
    if is_replacing(update):
        weight, stored = _weight(update.shape), update.stored.read().reshape(update.shape)
        assert update.stored in update.tensors
        _assert_close(_applied(update, weight), stored.astype(weight.dtype), weight)
    if is_row_setting(update):
        weight = _weight(update.shape)
        changed = (_applied(update, weight) != weight).any(axis=1)
        assert sorted(set(update.indices)) == sorted(update.indices) == numpy.flatnonzero(changed).tolist()
    if is_directed(update):
        assert update.rebuilt(update.direction, update.magnitude) == update
        assert update.shape[0 if update.per_row else 1] % update.magnitude.shape[0] == 0


def looks_at_the_weight_only_if_it_says_so(case: UpdateCase) -> None:
    """``prepare`` reads blocks of the weight where `needs_weight` is set, and never else."""
    for update in case.pieces:
        weight = _Watched(_weight(update.shape))
        update.prepare(weight)
        assert weight.was_read == update.needs_weight


def lets_go_of_its_factors(case: UpdateCase) -> None:
    """What ``prepare`` returns is freed with its last reference: in a cycle, factors of many weights would pile up in memory."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        for update in case.pieces:
            apply = update.prepare(HeldWeight(_weight(update.shape)))
            prepared = weakref.ref(apply)
            del apply
            assert prepared() is None
    finally:
        if collecting:
            gc.enable()


def is_undone_by_its_inverse(case: UpdateCase) -> None:
    """What can be solved for the weight before gives it back, of a share too."""
    for update in case.pieces:
        if not is_invertible(update):
            continue
        weight, rows, cols = _weight(update.shape), range(update.shape[0]), range(update.shape[1])
        lost = update.lost(HeldWeight(weight))
        for share in (1.0, 0.3):
            after = weight + share * (_applied(update, weight) - weight)
            before = update.inverse(HeldWeight(after), share, lost)(after.copy(), rows, cols)
            assert before.shape == weight.shape
            assert float(abs(before - weight).max()) <= _SOLVED * float(abs(weight).max())


UPDATE_CHECKS: tuple[Callable[[UpdateCase], None], ...] = promised(
    "kind of update",
    lambda case: case.update.kind,
    (
        answers_every_question,
        accounts_for_its_tensors,
        parts_cover_it,
        any_block_is_a_part_of_the_whole,
        has_the_effect_it_states,
        is_linear_if_it_adds,
        is_the_lora_it_gives,
        does_what_its_other_members_say,
        looks_at_the_weight_only_if_it_says_so,
        lets_go_of_its_factors,
        is_undone_by_its_inverse,
    ),
)


class _Watched:
    """A weight that notes whether it was read."""

    def __init__(self, values: Array) -> None:
        self._weight = HeldWeight(values)
        self.shape, self.dtype, self.device = self._weight.shape, self._weight.dtype, self._weight.device
        self.was_read = False

    def blocks(self) -> Iterator[tuple[Array, Index, Index]]:
        self.was_read = True
        return self._weight.blocks()


def _random(seed: int) -> numpy.random.Generator:
    return numpy.random.default_rng(seed)


def _weight(shape: tuple[int, int], seed: int = 0) -> Array:
    return _random(seed).standard_normal(shape)


def _applied(update: Update, weight: Array) -> Array:
    """`weight` after `update`, all at once."""
    apply = update.prepare(HeldWeight(weight))
    return apply(weight.copy(), range(update.shape[0]), range(update.shape[1]))


def _assert_close(values: Array, expected: Array, weight: Array) -> None:
    assert values.shape == expected.shape
    largest = max(float(abs(weight).max()), float(abs(expected).max()) if expected.size else 0.0)
    assert not expected.size or float(abs(values - expected).max()) <= _EXACT * largest
