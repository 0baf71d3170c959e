# SPDX-License-Identifier: Apache-2.0
"""Products of more directions than any factor has are LoRAs of the product of the ranks; `is_the_lora_it_gives` compares them."""

from __future__ import annotations

import pytest

from surgery_formats.updates import LoHa, expanded
from tests.support.updates import EVERY_KIND, made_factor

RANKS = {
    "LoHa": 2 * 2,
    "LoKr of pairs": 4 * 2,
    "LoKr of two pairs": 2 * 3,
    "LoKr of a pair and a tall matrix": 2 * 4,
    "LoKr of a Conv1d, of a pair": 2 * 6,
    "LoRA": 3,
    "LoKr": None,  # both factors are stored in full: their ranks are not in the file
    "RandLoRA": None,
    "HRA": None,
}


@pytest.mark.parametrize("kind", RANKS)
def test_a_product_has_the_product_of_the_ranks(kind: str) -> None:
    lora = expanded(EVERY_KIND[kind])
    assert (lora and lora.rank) == RANKS[kind]


def test_more_directions_than_the_weight_has_are_no_low_rank() -> None:
    sizes = ((24, 5), (5, 40), (24, 5), (5, 40))
    assert expanded(LoHa(*(made_factor(*size) for size in sizes), scale=1.0)) is None
