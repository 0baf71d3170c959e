# SPDX-License-Identifier: Apache-2.0
"""A block transposed by words is the block transposed."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from surgery.onnx.locate.turning import turned


@given(st.integers(1, 300), st.integers(1, 40), st.sampled_from(["u1", "f2", "f4", "f8", ml_dtypes.bfloat16]))
def test_any_size_and_type(rows: int, cols: int, dtype: object) -> None:
    block = np.random.default_rng(rows * 41 + cols).standard_normal((rows, cols)).astype(dtype)
    assert turned(block).tobytes() == np.ascontiguousarray(block.T).tobytes()


@pytest.mark.parametrize("part", [np.s_[::2], np.s_[:, 3:9], np.s_[::-1, ::-1]])
def test_a_view_of_other_memory(part: object) -> None:
    block = np.arange(400, dtype="u2").reshape(20, 20)[part]
    assert np.array_equal(turned(block), block.T)
