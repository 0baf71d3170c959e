# SPDX-License-Identifier: Apache-2.0
"""Every kind of update passes the public conformance suite, and the suite finds an update that answers wrongly."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import ClassVar

import pytest

from surgery_formats.testing.update import UPDATE_CHECKS, UpdateCase
from surgery_formats.updates import LoRA, Offset
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
    ],
)
def test_the_suite_fails_a_kind_that_answers_wrongly(wrong: type, check: str) -> None:
    like = EVERY_KIND["offset" if issubclass(wrong, Offset) else "LoRA"]
    made = {field.name: getattr(like, field.name) for field in fields(like)}
    case = UpdateCase(wrong(**made))
    (failing,) = (one for one in UPDATE_CHECKS if one.__name__ == check)
    with pytest.raises(AssertionError):
        failing(case)
