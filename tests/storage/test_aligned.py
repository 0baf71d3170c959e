# SPDX-License-Identifier: Apache-2.0
"""Two storages of one weight as matrices of one shape, whichever way round either lies."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from surgery_formats.arrays import Array, empty
from surgery_formats.containers.safetensors import open_safetensors
from surgery_formats.dtypes import DType
from surgery_formats.errors import FitError
from surgery_formats.storage.aligned import Turned, aligned, release, turned, with_columns
from surgery_formats.storage.base import read_block, read_rows
from surgery_formats.storage.plain import Plain
from surgery_formats.tensors.computed import computed


@dataclass(frozen=True)
class Coded:
    """A weight of which no tensor has the values, in the matrix that it is given."""

    values: Array
    sizes: tuple[int, ...]
    transposed: bool
    reads: list[tuple[int, int]] = field(default_factory=list)

    name = "a.weight"
    kind = "CODED"
    dtype = DType.F32
    elements = None
    is_float = True
    sources = ()
    group = 1

    @property
    def shape(self) -> tuple[int, int]:
        rows, cols = self.values.shape
        return rows, cols

    def read_into(self, block: Array, start: int) -> None:
        self.reads.append((start, start + len(block)))
        block[...] = self.values[start : start + len(block)]

    def put(self, start: int, block: Array, rounded: Array) -> tuple[()]:
        rounded[...] = block
        self.values[start : start + len(block)] = block
        return ()

    def parts(self, name: str) -> tuple[()]:
        return ()


def coded(weight: Array, *, transposed: bool) -> Coded:
    """`weight` ``(out, in)`` or ``(experts, rows, cols)``, each matrix as it is or turned."""
    matrices = weight.mT if transposed else weight
    return Coded(numpy.ascontiguousarray(matrices).reshape(-1, matrices.shape[-1]), weight.shape, transposed)


def plain(weight: Array, *, stacked: bool = False) -> Plain:
    return Plain.of(computed("a.weight", weight.shape, (), lambda: weight, DType.F32), stacked=stacked)


@pytest.mark.parametrize("shape", [(5, 7), (3, 5, 7), (1, 4, 6), (5, 1), (1, 1)])
@pytest.mark.parametrize("one", [None, False, True])
@pytest.mark.parametrize("other", [None, False, True])
def test_rows_and_columns_agree(shape: tuple[int, ...], one: bool | None, other: bool | None) -> None:
    weight = numpy.arange(numpy.prod(shape), dtype=numpy.float32).reshape(shape)
    sides = [plain(weight) if turn is None else coded(weight, transposed=turn) for turn in (one, other)]
    left, right = aligned(*sides, stacked=True)
    assert left.shape == right.shape
    assert left.transposed == right.transposed
    assert numpy.array_equal(read_block(left, 0, left.shape[0]), read_block(right, 0, right.shape[0]))
    release()


@given(st.integers(1, 3), st.integers(1, 5), st.integers(1, 5), st.data())
def test_any_rows_of_a_turned_stack(count: int, rows: int, cols: int, data: st.DataObject) -> None:
    weight = numpy.random.default_rng(0).standard_normal((count, rows, cols), numpy.float32)
    stack = turned(coded(weight, transposed=False))
    whole = weight.mT.reshape(-1, rows)
    start = data.draw(st.integers(0, len(whole)))
    stop = data.draw(st.integers(start, len(whole)))
    assert numpy.array_equal(read_block(stack, start, stop), whole[start:stop])
    assert numpy.array_equal(read_rows(turned(coded(weight[0], transposed=True))), weight[0])
    release()


def test_what_was_turned_twice_is_as_it_was() -> None:
    one = coded(numpy.zeros((2, 3), numpy.float32), transposed=False)
    assert turned(turned(one)) is one


def test_a_matrix_is_read_once_while_its_rows_are_read_in_order() -> None:
    weight = numpy.arange(12, dtype=numpy.float32).reshape(3, 4)
    one, other = coded(weight, transposed=False), coded(weight + 1, transposed=False)
    for start in range(4):  # both sides of a difference, in turn
        for side in (one, other):
            read_block(turned(side), start, start + 1)
    assert one.reads == other.reads == [(0, 3)]
    release()
    read_block(turned(one), 0, 1)
    assert len(one.reads) == 2
    release()


def test_whole_matrices_are_put_back_as_they_were_read() -> None:
    weight = numpy.random.default_rng(0).standard_normal((2, 3, 4), numpy.float32)
    stack = coded(weight.copy(), transposed=False)
    flipped = turned(stack)
    assert isinstance(flipped, Turned)
    values, rounded = 2 * weight.mT.reshape(-1, 3), empty((8, 3), DType.F32)
    flipped.put(4, values[4:], rounded[4:])
    assert numpy.array_equal(stack.values, numpy.concatenate([weight[0], 2 * weight[1]]))
    assert numpy.array_equal(rounded[4:], values[4:])
    with pytest.raises(ValueError, match="whole matrices of 4"):
        flipped.put(1, values[1:5], rounded[1:5])


def test_a_shape_that_a_codec_does_not_know_is_refused(tmp_path: Path) -> None:
    save_file({"a.weight": numpy.zeros((4, 9), numpy.float32)}, tmp_path / "a.safetensors")
    (tensor,) = open_safetensors(tmp_path / "a.safetensors").tensors
    assert with_columns(Plain.of(tensor), 6).shape == (6, 6)
    with pytest.raises(FitError, match="not in rows of 6"):
        with_columns(coded(numpy.zeros((4, 9), numpy.float32), transposed=False), 6)
