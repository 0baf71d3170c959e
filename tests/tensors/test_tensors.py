# SPDX-License-Identifier: Apache-2.0
"""Only a stored tensor has bytes in a file: the others give their own values, and are never taken for each other."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from ml_dtypes import finfo
from safetensors.numpy import save_file

from surgery_formats.arrays import Array, all_finite, as_torch
from surgery_formats.canonical.adapter import Adapter, Site
from surgery_formats.containers.safetensors import open_safetensors
from surgery_formats.dtypes import DType
from surgery_formats.models.tied_parameters import Tie, ties_by_place
from surgery_formats.storage.base import read_values
from surgery_formats.storage.plain import Plain
from surgery_formats.tensors.apply import apply_chain
from surgery_formats.tensors.computed import ComputedTensor, computed, zeros
from surgery_formats.tensors.tensor import StoredTensor, Tensor, origin
from surgery_formats.tensors.unwritten import UnwrittenTensor
from surgery_formats.tensors.views import Index, View, expert, interleaved, permute, rows, transpose, whole
from surgery_formats.updates import Factor, LoRA


@pytest.fixture
def stored(tmp_path: Path) -> StoredTensor:
    save_file({"w": np.full((4, 4), np.float32(7.0))}, tmp_path / "a.safetensors")
    return open_safetensors(tmp_path / "a.safetensors").tensors[0]


def filled(name: str, value: float, source: StoredTensor) -> ComputedTensor:
    return computed(name, (4, 4), [source], lambda: np.full((4, 4), value))


def test_a_matrix_of_computed_values_is_those_values_and_not_bytes_of_their_source(stored: StoredTensor) -> None:
    matrix = Plain.of(filled("a", 3.0, stored))
    assert read_values(matrix, 1, 3).tolist() == [[3.0] * 4] * 2
    assert matrix.sources == (stored,)


def test_a_matrix_of_zeros_reads_as_zeros_and_has_no_source() -> None:
    matrix = Plain.of(zeros("bias", DType.BF16, (5,)))
    assert read_values(matrix, 0, 5).tolist() == [[0.0]] * 5
    assert matrix.sources == ()


def test_computed_tensors_are_never_tied(stored: StoredTensor) -> None:
    one, other = filled("a", 1.0, stored), filled("b", 2.0, stored)
    assert ties_by_place({"a": one, "b": other, "w": stored, "again": stored}) == (Tie("again", "w"),)


def test_factors_cut_from_two_computed_tensors_of_one_size_keep_their_own_values(stored: StoredTensor) -> None:
    one, other = filled("a", 1.0, stored), filled("b", 2.0, stored)
    cut = [Factor((tensor,), (2, 4), lambda t: t[:2]).load(DType.F64) for tensor in (one, other)]
    assert [np.unique(values).tolist() for values in cut] == [[1.0], [2.0]]


def test_an_adapter_of_computed_tensors_knows_which_are_used(stored: StoredTensor, tmp_path: Path) -> None:
    used = [filled(name, 1.0, stored) for name in ("a0", "b0", "a1", "b1")]
    spare = filled("spare", 1.0, stored)
    chains = {Site(f"{i}.weight"): (LoRA(Factor.of(used[2 * i]), Factor.of(used[2 * i + 1]), 1.0),) for i in range(2)}
    adapter = Adapter(tmp_path, "peft", "LORA", chains, (*used, spare))
    assert adapter.unconsumed() == (spare,)
    assert [tensor.name for tensor in adapter.only([Site("1.weight")]).tensors] == ["a1", "b1", "spare"]
    assert adapter.files == (stored.file,)


def test_the_origin_tells_tensors_of_one_name_in_two_files_apart(tmp_path: Path) -> None:
    found = []
    for name in ("a", "b"):
        save_file({"w": np.zeros(1)}, tmp_path / f"{name}.safetensors")
        found.append(origin(open_safetensors(tmp_path / f"{name}.safetensors").tensors[0]))
    assert found[0] != found[1]


def test_what_is_not_written_yet_has_nothing_to_read() -> None:
    wanted = set(vars(Tensor)) & {"read", "numel", "matrix", "sources"}
    assert wanted
    assert not any(hasattr(UnwrittenTensor, name) for name in wanted)


VIEWS = {
    "whole": whole((8, 6)),
    "slice": rows(whole((8, 6)), 2, 6),
    "every second row": rows(whole((8, 6)), 1, 8, 2),
    "expert": expert(1, 2, (4, 6)),
    "transposed": transpose(whole((8, 6))),
    "permuted": permute(whole((8, 6)), interleaved(2, 4)),
    "transposed and permuted": permute(transpose(whole((8, 6))), (5, 0, 3, 1, 4, 2)),
}


@pytest.mark.parametrize("to", [np.asarray, as_torch], ids=["numpy", "torch"])
@pytest.mark.parametrize("height", [1, 3, 8])
@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_a_chain_on_blocks_of_any_height_is_the_chain_on_the_whole(
    view: View, height: int, to: Callable[[np.ndarray], Array]
) -> None:
    draw = np.random.default_rng(0)
    delta = to(draw.standard_normal(view.shape))
    matrix = to(draw.standard_normal((8, 6)))
    wanted = to(np.array(matrix))
    logical = wanted.T if view.transposed else wanted
    index = np.array(view.rows)[:, None], np.array(view.cols)
    logical[index] = (logical[index] + delta) * 2

    def add(block: Array, rows_: Index, cols: Index) -> Array:
        block += delta[list(rows_)][:, list(cols)]
        return block

    chain = [(view, add), (view, lambda block, rows_, cols: block * 2)]
    for start in range(0, 8, height):
        apply_chain(chain, matrix[start : start + height], start, min(start + height, 8))
    assert (matrix == wanted).all()


@pytest.mark.parametrize("dtype", [DType.BF16, DType.F16, DType.F32, DType.F64])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_is_found_and_a_sum_that_overflows_is_none(dtype: DType, value: float) -> None:
    assert all_finite(np.full((8, 8), finfo(dtype.numpy).max, dtype.numpy))
    assert not all_finite(np.array([1.0, value, -value, 2.0], dtype.numpy))
    assert all_finite(np.empty(0, dtype.numpy))
