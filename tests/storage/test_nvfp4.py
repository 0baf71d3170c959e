# SPDX-License-Identifier: Apache-2.0
"""NVFP4 as ModelOpt saves it is read to the bit, put back to the byte, and refused by name where it is broken."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from surgery_formats.arrays import Array
from surgery_formats.errors import MalformedError
from surgery_formats.storage.base import read_block, read_rows
from surgery_formats.storage.nvfp4 import NVFP4
from surgery_formats.storage.quantised import is_quantised, put_quantised
from surgery_formats.storage.registry import claimed_weights
from surgery_formats.testing.storage import QUANTISED_CHECKS, StorageCase
from tests.support.codecs import broken, check_values, conformance_case, golden_cases, survives_any_bytes

CASES = golden_cases(Path(__file__).parent / "golden" / "nvfp4.safetensors")
PARTS = ("weight", "weight_scale", "weight_scale_2")
LINEAR = ["linear", "odd rows", "one group"]


@pytest.mark.parametrize("name", CASES)
def test_values_are_those_of_modelopt_to_the_bit(name: str) -> None:
    check_values(CASES[name], NVFP4)


@pytest.mark.parametrize("name", LINEAR)
@pytest.mark.parametrize("check", QUANTISED_CHECKS, ids=lambda check: check.__name__)
def test_golden_weights_conform(check: Callable[[StorageCase, Path], None], name: str, tmp_path: Path) -> None:
    check(conformance_case(CASES[name], NVFP4, PARTS), tmp_path)


@pytest.mark.parametrize("name", CASES)
def test_no_other_storage_claims_its_tensors(name: str) -> None:
    owners = claimed_weights(CASES[name].tensors, CASES[name].config)
    assert owners.keys() == CASES[name].tensors.keys()
    assert {weight.kind for weight in owners.values()} == {"NVFP4"}


@pytest.mark.parametrize("name", CASES)
def test_scales_and_codes_that_are_fitted_are_those_of_modelopt(name: str) -> None:
    (weight,) = CASES[name].claimed(NVFP4).values()
    assert is_quantised(weight)
    values = read_block(weight, 0, weight.shape[0])
    grid = weight.fit(0, values)
    assert grid is not None
    for piece in weight.pack(0, grid.nearest(values), grid):
        source = weight.sources[piece.part]
        before = np.frombuffer(source.file.read(source.offset, source.nbytes), np.uint8)
        now = np.frombuffer(piece.data, np.uint8)
        if piece.part:
            assert np.array_equal(now, before), source.name
        else:  # ModelOpt gives zero both of its codes
            zero = (np.stack([now & 15, now >> 4]) | np.stack([before & 15, before >> 4])) & 7 == 0
            assert ((np.stack([now & 15, now >> 4]) == np.stack([before & 15, before >> 4])) | zero).all()


@pytest.mark.parametrize("name", ["experts", "experts each"])
def test_experts_that_are_packed_along_their_inputs_are_put_back(name: str) -> None:
    (weight,) = CASES[name].claimed(NVFP4).values()
    values = read_block(weight, 0, weight.shape[0])
    assert weight.group == 16
    data = [bytearray(part.nbytes) for part in weight.parts(weight.name)]
    for start in range(0, weight.shape[0], 32):
        rounded = np.empty((32, weight.shape[1]), np.float32)
        for piece in weight.put(start, values[start : start + 32], rounded):
            data[piece.part][piece.offset : piece.offset + len(piece.data)] = piece.data
        assert np.array_equal(rounded, values[start : start + 32])
    for source, raw in zip(weight.sources, data, strict=True):
        assert raw == source.file.read(source.offset, source.nbytes), source.name


@given(values=arrays(np.float32, (7, 48), elements=st.floats(-1, 1, width=32) | st.just(-0.0)))
@settings(max_examples=60)
def test_no_code_is_nearer(values: Array) -> None:
    weight = CASES["odd rows"].claimed(NVFP4)["layer.weight"]
    assert is_quantised(weight)
    rounded, again = np.empty_like(values), np.empty_like(values)
    fast = [bytes(piece.data) for piece in weight.put(0, values, rounded)]
    assert fast == [bytes(piece.data) for piece in put_quantised(weight, 0, values, again)]
    grid = weight.grid(0, 7)
    possible = np.stack([grid.values(np.full(values.shape, code, np.uint8)) for code in range(16)])
    distance = abs(possible.astype(np.float64) - values).min(axis=0)
    assert (abs(rounded.astype(np.float64) - values) <= distance + 1e-6 * abs(values)).all()  # a tie in float32


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"weight_scale": np.full((32, 4), 0x7F, np.uint8).view("V1")}, "a scale is nan"),
        ({"weight_scale": np.full((32, 4), 0xB8, np.uint8).view("V1")}, "a scale is -1"),
        ({"weight_scale": np.zeros((32, 2), np.uint8).view("V1")}, "not one E4M3 for every 16"),
        ({"weight_scale": np.ones((32, 4), np.float32)}, "not one E4M3 for every 16"),
        ({"weight_scale_2": np.array(np.nan, np.float32)}, "a scale is nan"),
        ({"weight_scale_2": np.array(0, np.float32)}, "the scale of scales is 0"),
        ({"weight_scale_2": np.array(-1, np.float32)}, "a scale is -1"),
        ({"weight_scale_2": np.ones(3, np.float32)}, "instead of one number"),
    ],
)
def test_what_no_program_writes_is_refused_by_name(changed: dict[str, Array], match: str, tmp_path: Path) -> None:
    import ml_dtypes

    changed = {
        part: value.view(np.uint8).view(ml_dtypes.float8_e4m3fn) if value.dtype == "V1" else value
        for part, value in changed.items()
    }
    tensors = broken(CASES["linear"], tmp_path, **changed)
    with pytest.raises(MalformedError, match=match) as caught:
        [read_rows(weight) for weight in NVFP4.claim(tensors, CASES["linear"].config)]
    assert caught.value.tensor in [f"layer.{part}" for part in changed]


@pytest.mark.parametrize("part", ["comfy_quant", "pre_quant_scale"])
def test_weights_in_other_layouts_are_left_to_be_named(part: str, tmp_path: Path) -> None:
    """ComfyUI has scales in tiles; ModelOpt's AWQ multiplies a layer's input first."""
    tensors = broken(CASES["linear"], tmp_path, **{part: np.ones(64, np.uint8)})
    assert claimed_weights(tensors, {}) == {}


@pytest.mark.parametrize("name", ["linear", "experts each", "stacked"])
def test_any_bytes_are_read_or_refused(name: str, tmp_path: Path) -> None:
    survives_any_bytes(CASES[name], NVFP4, tmp_path, rounds=300)
