# SPDX-License-Identifier: Apache-2.0
"""Ranks by what is lost, and by what everything costs together."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from surgery_formats.linalg.rank_criteria import allocate, checked_rank, rank_holding


def test_a_capped_rank_comes_with_a_sentence() -> None:
    assert checked_rank(4, (8, 16)) == (4, None)
    rank, note = checked_rank(64, (8, 16))
    assert rank == 8
    assert note == "rank 64 cut to 8: a matrix of 8 x 16 has no more"
    for wrong in (0, -3, True, 2.0):
        with pytest.raises(ValueError, match="positive"):
            checked_rank(wrong, (8, 16))  # type: ignore[arg-type]


def test_the_least_rank_is_found_that_leaves_at_most_a_share() -> None:
    squares = torch.tensor([9.0, 4.0, 1.0, 0.0])
    assert [rank_holding(squares, 14, 1 - e) for e in (0.5, 9 / 14, 0.65, 13 / 14, 1.0)] == [1, 1, 2, 2, 3]
    assert rank_holding(squares, 14, 5 / 14 + 1e-12) == 1
    assert rank_holding(squares[:2], 14, 0.1) == 2
    assert rank_holding(squares[:2], 14, 0.05) is None
    assert rank_holding(torch.zeros(3), 0, 0.1) == 0


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_the_budget_is_kept_and_spent_optimally(data: st.DataObject) -> None:
    """Equal costs: exactly the optimum of all allocations."""
    spectra = [
        torch.tensor(sorted(data.draw(st.lists(st.integers(0, 9), min_size=1, max_size=4)), reverse=True)).float()
        for _ in range(data.draw(st.integers(1, 3)))
    ]
    budget = data.draw(st.integers(0, 10))
    found = allocate(spectra, [1] * len(spectra), budget)
    assert found.cost == sum(found.ranks) <= budget
    ways = [w for w in product(*(range(len(s) + 1) for s in spectra)) if sum(w) <= budget]
    best = min(sum(float(s[r:].square().sum()) for s, r in zip(spectra, way, strict=True)) for way in ways)
    assert found.lost == best


def test_expensive_directions_are_chosen_last() -> None:
    spectra = [torch.tensor([4.0, 3.0]), torch.tensor([5.0, 1.0])]
    assert allocate(spectra, [10, 30], 20).ranks == (2, 0)  # 25/30 is less than 9/10
    assert allocate(spectra, [10, 30], 50).ranks == (2, 1)
    assert allocate(spectra, [10, 30], 35).ranks == (2, 0)  # what does not fit does not stop the cheaper
    assert allocate(spectra, [10, 30], 50, most=[1, 2]).ranks == (1, 1)
    assert allocate(spectra, [10, 30], 40, least=1).ranks == (1, 1)
    with pytest.raises(ValueError, match="budget"):
        allocate(spectra, [10, 30], 39, least=1)
    with pytest.raises(ValueError, match="cost"):
        allocate(spectra, [10], 39)
