# SPDX-License-Identifier: Apache-2.0
"""Every kind of update passes the public conformance suite, and the suite finds an update that answers wrongly."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import ClassVar

import numpy as np
import pytest

from surgery_formats.arrays import as_torch, is_torch, to_cpu
from surgery_formats.errors import FitError
from surgery_formats.testing.update import UPDATE_CHECKS, UpdateCase
from surgery_formats.updates import LoRA, Offset
from surgery_formats.updates.weights import HeldWeight
from tests.support.updates import EVERY_KIND


def _case(name: str) -> UpdateCase:
    return UpdateCase(EVERY_KIND[name])


@pytest.mark.parametrize("check", UPDATE_CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("name", EVERY_KIND)
def test_a_built_in_kind_conforms(name: str, check: Callable[[UpdateCase], None]) -> None:
    check(_case(name))


class _SaysItMaps(LoRA):
    effect: ClassVar[str] = "maps"


class _SaysItSets(LoRA):
    effect: ClassVar[str] = "sets"


class _HidesItsB(LoRA):
    def factors(self):
        return {"A": self.A}


class _GivesAnotherLora(LoRA):
    def low_rank(self):
        return self.scaled(2.0)


class _ScalesTheWrongWay(LoRA):
    def scaled(self, weight):
        return replace(self, scale=self.scale / (weight or 1.0))


class _ForgetsARow(Offset):
    def prepare(self, weight):
        apply = super().prepare(weight)

        def changed(block, rows, cols):
            return apply(block, rows, cols) if len(rows) > 1 else block

        return changed


class _LooksSecretly(LoRA):
    def prepare(self, weight):
        next(weight.blocks())
        return super().prepare(weight)


class _CallsItself(LoRA):
    def prepare(self, weight):
        apply = super().prepare(weight)

        def again(block, rows, cols):
            return apply(block, rows, cols) if isinstance(cols, range) else again(block, rows, range(*cols))

        return again


@pytest.mark.parametrize(
    ("wrong", "check"),
    [
        (_SaysItMaps, "has_the_effect_it_states"),
        (_SaysItSets, "has_the_effect_it_states"),
        (_HidesItsB, "accounts_for_its_tensors"),
        (_GivesAnotherLora, "is_the_lora_it_gives"),
        (_ScalesTheWrongWay, "is_linear_if_it_adds"),
        (_ForgetsARow, "any_block_is_a_part_of_the_whole"),
        (_LooksSecretly, "looks_at_the_weight_only_if_it_says_so"),
        (_CallsItself, "lets_go_of_its_factors"),
    ],
)
def test_the_suite_fails_a_kind_that_answers_wrongly(wrong: type, check: str) -> None:
    like = EVERY_KIND["offset" if issubclass(wrong, Offset) else "LoRA"]
    made = {field.name: getattr(like, field.name) for field in fields(like)}
    case = UpdateCase(wrong(**made))
    (failing,) = (one for one in UPDATE_CHECKS if one.__name__ == check)
    with pytest.raises(AssertionError):
        failing(case)


@dataclass(frozen=True)
class _Elsewhere(HeldWeight):
    """A weight on a device of torch's; its own name for the CPU stands in for a GPU."""

    @property
    def device(self) -> str:
        return "cpu:0"


@pytest.mark.parametrize("name", EVERY_KIND)
def test_a_kind_does_the_same_in_both_libraries(name: str) -> None:
    for update in _case(name).pieces:
        values = np.random.default_rng(1).standard_normal(update.shape, np.float32)
        rows, cols = range(update.shape[0]), range(update.shape[1])
        order = tuple(reversed(rows))
        for at in (rows, order):
            block = values[list(at)]
            expected = update.prepare(HeldWeight(values))(block.copy(), at, cols)
            there = as_torch(values.copy())
            result = update.prepare(_Elsewhere(there))(there[list(at)], at, cols)
            assert is_torch(result)
            assert not is_torch(expected)
            np.testing.assert_allclose(to_cpu(result), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["raw PiSSA", "raw OLoRA", "KaSA", "DEFT", "PaRa", "OSF", "PEANuT", "FRoD"])
def test_a_piece_of_a_weight_is_refused_where_all_of_it_decides(name: str) -> None:
    update = _case(name).sized
    piece = HeldWeight(np.ones((update.shape[0] // 2, update.shape[1])))
    with pytest.raises(FitError, match="needs all of its weight at once"):
        update.prepare(piece)
