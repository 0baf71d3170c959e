# SPDX-License-Identifier: Apache-2.0
"""BOFT of several factors, which PEFT has only with its CUDA extension: its own permutations and its own Cayley transform."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from peft.tuners.boft.layer import BOFTLayer

from surgery_formats.updates import BOFT
from surgery_formats.updates.weights import HeldWeight
from tests.support.updates import made_factor


@pytest.mark.parametrize(("factors", "blocks", "side"), [(1, 5, 4), (2, 6, 4), (3, 8, 2), (3, 4, 6), (4, 16, 2)])
def test_factors_are_shuffled_as_peft_shuffles_them(factors: int, blocks: int, side: int) -> None:
    generators, lengths = made_factor(factors, blocks, side, side), made_factor(7)
    width = blocks * side
    weight = np.random.default_rng(2).standard_normal((7, width))
    result = BOFT(generators, lengths).prepare(HeldWeight(weight))(weight.copy(), range(7), range(width))

    layer = BOFTLayer.__new__(BOFTLayer)
    total = torch.eye(width, dtype=torch.float64)
    for number, values in enumerate(generators.load(None)):
        blocks_of_it = BOFTLayer.cayley_batch(layer, torch.from_numpy(np.asarray(values, np.float64)))
        order = BOFTLayer.block_butterfly_perm(layer, width, blocks // 2**number, side // 2, factors - 1)
        P = BOFTLayer.perm2mat(layer, order).double()
        total = P @ torch.block_diag(*blocks_of_it) @ P.T @ total
    meant = (total @ torch.from_numpy(weight).T).T * torch.from_numpy(np.asarray(lengths.load(None), np.float64))[
        :, None
    ]
    np.testing.assert_allclose(result, meant.numpy(), rtol=1e-6, atol=1e-7)
