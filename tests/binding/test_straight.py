# SPDX-License-Identifier: Apache-2.0
"""Operations on a weight that is stored transposed do the same once it is turned, also in a stack of experts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest

from surgery_formats.binding.operation import Operation
from surgery_formats.binding.straight import straightened
from surgery_formats.canonical.adapter import Site
from surgery_formats.dtypes import DType
from surgery_formats.storage.base import read_block
from surgery_formats.storage.plain import Plain
from surgery_formats.tensors.apply import gather, scatter
from surgery_formats.tensors.computed import zeros
from surgery_formats.tensors.views import View, expert, permute, rows, transpose, whole


@dataclass(frozen=True)
class Stored:
    """A matrix of numbers, stored transposed."""

    sizes: tuple[int, ...]
    shape: tuple[int, int]
    values: Any
    name: str = "weight"
    transposed: bool = True

    def __getattr__(self, name: str) -> Any:
        return getattr(Plain.of(zeros("weight", DType.F32, self.shape)), name)

    def read_into(self, block: Any, start: int) -> None:
        block[...] = self.values[start : start + len(block)]


def _views() -> dict[str, tuple[tuple[int, ...], View]]:
    matrix = transpose(whole((6, 4)))  # (in, out) as stored; a weight (4, 6)
    second = expert(1, 3, (4, 5))  # each stored (out 4, in 5) where the model has (in 5, out 4)
    return {
        "a matrix": ((4, 6), matrix),
        "a part of it": ((4, 6), rows(matrix, 1, 3)),
        "in another order": ((4, 6), permute(matrix, (2, 0, 3, 1))),
        "the second of three experts": ((3, 5, 4), second),
        "the same, seen from the other side": ((3, 5, 4), transpose(second)),
    }


@pytest.mark.parametrize("name", _views())
def test_the_turned_operation_changes_the_same_elements(name: str) -> None:
    sizes, view = _views()[name]
    shape = (12, 5) if len(sizes) == 3 else (6, 4)
    values = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    stored: Any = Stored(sizes, shape, values)
    operation = Operation(None, view, Site("weight"), 0)  # type: ignore[arg-type]
    turned, (again,) = straightened(stored, [operation])

    at = view.locate(0, shape[0])
    logical = gather(values, at).copy()
    block = read_block(turned, 0, turned.shape[0])
    found = again.view.locate(0, turned.shape[0])
    assert np.array_equal(gather(block, found), logical)
    assert [*found.rows, *found.cols] == [*at.rows, *at.cols]

    scatter(block, found, -logical)
    scatter(values, at, -logical)
    assert np.array_equal(block, read_block(replace(turned, stored=replace(stored, values=values)), 0, len(block)))  # type: ignore[type-var]
