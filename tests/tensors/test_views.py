# SPDX-License-Identifier: Apache-2.0
"""Every lens, alone and composed: what is read back after a write is what was written, and nothing else moved."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from surgery_formats.containers.safetensors import open_safetensors
from surgery_formats.dtypes import DType
from surgery_formats.models.tied_parameters import ties_by_place
from surgery_formats.storage.parameter import Parameter
from surgery_formats.storage.plain import Plain
from surgery_formats.tensors.apply import gather
from surgery_formats.tensors.tensor import StoredTensor
from surgery_formats.tensors.views import View, expert, interleaved, permute, rows, transpose, turned, whole, window


def stored(folder: Path, values: np.ndarray) -> StoredTensor:
    save_file({"w": values}, folder / "w.safetensors")
    return open_safetensors(folder / "w.safetensors").tensors[0]


@st.composite
def views(draw: st.DrawFn, shape: tuple[int, int]) -> View:
    """Any lens, or several, on a storage of `shape`."""
    view = whole(shape)
    for _ in range(draw(st.integers(0, 4))):
        kind = draw(st.sampled_from(["slice", "transpose", "permute", "window"]))
        height = view.shape[0]
        if kind == "slice" and height > 1:
            start = draw(st.integers(0, height - 1))
            view = rows(view, start, draw(st.integers(start + 1, height)), draw(st.integers(1, 3)))
        elif kind == "transpose":
            view = transpose(view)
        elif kind == "permute":
            view = permute(view, draw(st.permutations(range(height))))
        else:
            view = window(view, draw(st.integers(0, 5)), draw(st.integers(0, 5)))
    return view


@settings(max_examples=200, deadline=None)
@given(
    data=st.data(),
    height=st.integers(1, 7),
    width=st.integers(1, 7),
    dtype=st.sampled_from([DType.F32, DType.BF16, DType.F16]),
)
def test_put_after_get_is_the_identity(
    data: st.DataObject, height: int, width: int, dtype: DType, tmp_path_factory: pytest.TempPathFactory
) -> None:
    tensor = stored(
        tmp_path_factory.mktemp("w"), np.random.default_rng(0).standard_normal((height, width)).astype(dtype.numpy)
    )
    parameter = Parameter("w", Plain.of(tensor), data.draw(views((height, width))))
    before = bytes(tensor.file.read(tensor.offset, tensor.nbytes))
    weight = parameter.get()
    assert weight.shape == parameter.shape
    assert parameter.put(weight) == {tensor: before}


@settings(max_examples=200, deadline=None)
@given(data=st.data(), height=st.integers(1, 9), width=st.integers(1, 5), step=st.integers(1, 4))
def test_blocks_cover_a_view_exactly_once(
    data: st.DataObject, height: int, width: int, step: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """However the storage is cut into row blocks, every logical element turns up once, with its own value."""
    values = np.arange(height * width, dtype=np.float32).reshape(height, width)
    parameter = Parameter(
        "w", Plain.of(stored(tmp_path_factory.mktemp("w"), values)), data.draw(views((height, width)))
    )
    view, expected = parameter.view, parameter.get()
    seen = np.full(expected.shape, np.float32("nan"))
    for start in range(0, height, step):
        at = view.locate(start, min(start + step, height))
        block = values[start : start + step]
        for i, row in enumerate(at.rows):
            for j, col in enumerate(at.cols):
                stored_row, stored_col = (
                    (at.block_rows[j], at.block_cols[i]) if at.transposed else (at.block_rows[i], at.block_cols[j])
                )
                place = (row - view.row_origin, col - view.col_origin)
                assert np.isnan(seen[place])
                seen[place] = block[stored_row, stored_col]
    assert np.array_equal(seen, expected)


def test_an_expert_is_its_own_matrix(tmp_path: Path) -> None:
    values = np.random.default_rng(0).standard_normal((3, 4, 5), np.float32)
    tensor = stored(tmp_path, values)
    for number in range(3):
        parameter = Parameter("w", Plain.of(tensor, stacked=True), expert(number, 3, (4, 5)))
        assert np.array_equal(parameter.get(), values[number])
    with pytest.raises(IndexError):
        expert(3, 3, (4, 5))


def test_interleaved_is_llama_cpp_s_row_order() -> None:
    """ggml holds rotary rows as pairs: ``reshape(heads, 2, dim / 2, ...).swapaxes(1, 2)`` of the Hugging Face rows."""
    heads, dim = 3, 8
    hf = np.arange(heads * dim)
    ggml = hf.reshape(heads, 2, dim // 2).swapaxes(1, 2).reshape(-1)
    assert np.array_equal(ggml[list(interleaved(heads, dim))], hf)


def test_a_permutation_must_be_one() -> None:
    with pytest.raises(ValueError, match="permutation"):
        permute(whole((3, 2)), [0, 0, 1])


def test_ties_are_seen_by_place(tmp_path: Path) -> None:
    tensor = stored(tmp_path, np.ones((3, 2)))
    assert [(tie.alias, tie.source) for tie in ties_by_place({"a": tensor, "b": tensor})] == [("b", "a")]


@settings(max_examples=200, deadline=None)
@given(
    data=st.data(), count=st.integers(1, 3), height=st.integers(1, 6), width=st.integers(1, 6), index=st.integers(0, 2)
)
def test_a_view_of_turned_matrices_shows_the_same_elements(
    data: st.DataObject, count: int, height: int, width: int, index: int
) -> None:
    stack = np.arange(count * height * width).reshape(count, height, width)
    number = index % count
    view = data.draw(views((height, width)))
    at = (number * height, 0) if not view.transposed else (0, number * height)
    placed = replace(view, rows=tuple(v + at[0] for v in view.rows), cols=tuple(v + at[1] for v in view.cols))
    there = turned(placed, (height, width))
    one = gather(stack.reshape(-1, width), placed.locate(0, count * height))
    other = gather(stack.mT.reshape(-1, height), there.locate(0, count * width))
    assert np.array_equal(one, other)
    assert (there.row_origin, there.col_origin) == (view.row_origin, view.col_origin)


def test_a_view_over_several_matrices_cannot_be_turned() -> None:
    with pytest.raises(ValueError, match="several matrices"):
        turned(whole((6, 4)), (3, 4))
