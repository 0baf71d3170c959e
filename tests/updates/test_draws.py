# SPDX-License-Identifier: Apache-2.0
"""Numbers drawn without torch are torch's, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from surgery_formats.updates.draws import TorchDraws

SEEDS = st.integers(-(1 << 31), (1 << 63) - 1)


@given(
    SEEDS, st.lists(st.integers(1, 40), min_size=1, max_size=3), st.floats(-4, 4, width=32), st.floats(0, 4, width=32)
)
def test_uniform_numbers(seed: int, sizes: list[int], low: float, span: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    draws = TorchDraws(seed)
    for _ in range(2):  # the second goes on where the first ended
        drawn = torch.empty(sizes).uniform_(low, low + span, generator=generator)
        np.testing.assert_array_equal(draws.uniform(tuple(sizes), low, low + span), drawn.numpy())


@given(SEEDS, st.integers(1, 50))
def test_normal_numbers(seed: int, count: int) -> None:
    """But for the last bits, in which libraries' logarithms and cosines differ."""
    drawn = torch.empty(count).normal_(generator=torch.Generator().manual_seed(seed))
    np.testing.assert_allclose(TorchDraws(seed).normal(count), drawn.numpy(), rtol=2e-5, atol=2e-6)


@given(SEEDS, st.integers(1, 500), st.integers(0, 500))
def test_the_head_of_a_permutation(seed: int, total: int, count: int) -> None:
    count = min(count, total)
    whole = torch.randperm(total, generator=torch.Generator().manual_seed(seed))
    np.testing.assert_array_equal(TorchDraws(seed).first_of_shuffled(total, count), whole[:count].numpy())


def test_a_permutation_of_a_whole_weight() -> None:
    whole = torch.randperm(3_000_000, generator=torch.Generator().manual_seed(777))
    np.testing.assert_array_equal(TorchDraws(777).first_of_shuffled(3_000_000, 5000), whole[:5000].numpy())


@given(st.integers(0, 1000), st.integers(1, 300), st.integers(0, 300))
def test_many_things_are_shuffled_inside_out(seed: int, total: int, count: int) -> None:
    """As ``randperm_cpu`` of ATen does from 214,748,364 things on. (The head of one of 214,748,365 was compared by hand: it takes 2 GB.)"""
    words = np.random.RandomState(seed).bytes(8 * total)
    whole: list[int] = []
    for number in range(total):
        high, low = (int.from_bytes(words[8 * number + at : 8 * number + at + 4], "little") for at in (0, 4))
        place = (high << 32 | low) % (number + 1)
        whole.append(number)
        whole[number] = whole[place]
        whole[place] = number
    count = min(count, total)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("surgery_formats.updates.draws._MANY", 0)
        patch.setattr("surgery_formats.updates.draws._CHUNK", 64)
        assert TorchDraws(seed).first_of_shuffled(total, count).tolist() == whole[:count]
