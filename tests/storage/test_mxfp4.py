# SPDX-License-Identifier: Apache-2.0
"""MXFP4 as gpt-oss, Quark, ModelOpt and DeepSeek V4 save it is read to the bit, put back to the byte, and refused by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from surgery_formats.arrays import Array
from surgery_formats.dtypes import DType
from surgery_formats.errors import MalformedError
from surgery_formats.storage.base import Storage, read_block, read_rows
from surgery_formats.storage.mxfp4 import MXFP4
from surgery_formats.storage.quantised import is_quantised, put_quantised
from surgery_formats.storage.registry import claimed_weights
from surgery_formats.testing.storage import QUANTISED_CHECKS, StorageCase
from tests.support.codecs import GoldenCase, broken, check_values, conformance_case, golden_cases, survives_any_bytes

CASES = golden_cases(Path(__file__).parent / "golden" / "mxfp4.safetensors")
GATE = "model.layers.0.mlp.experts.gate_up_proj"
SCALES = {"linear": "weight_scale", "one group": "weight_scale", "deepseek": "scale"}


@pytest.mark.parametrize("name", CASES)
def test_values_are_those_of_the_program_to_the_bit(name: str) -> None:
    check_values(CASES[name], MXFP4)


@pytest.mark.parametrize("name", CASES)
def test_no_other_storage_claims_its_tensors(name: str) -> None:
    owners = claimed_weights(CASES[name].tensors, CASES[name].config)
    assert owners.keys() == CASES[name].tensors.keys()
    assert {weight.kind for weight in owners.values()} == {"MXFP4"}


@pytest.mark.parametrize("name", SCALES)
@pytest.mark.parametrize("check", QUANTISED_CHECKS, ids=lambda check: check.__name__)
def test_golden_weights_conform(check: Callable[[StorageCase, Path], None], name: str, tmp_path: Path) -> None:
    check(conformance_case(CASES[name], MXFP4, ("weight", SCALES[name])), tmp_path)


@pytest.mark.parametrize("name", CASES)
def test_powers_of_two_that_are_fitted_hold_the_same_values(name: str) -> None:
    for weight in CASES[name].claimed(MXFP4).values():
        assert is_quantised(weight)
        values = read_block(weight, 0, weight.shape[0])
        grid = weight.fit(0, values)
        assert grid is not None
        assert np.array_equal(grid.values(grid.nearest(values)), values)


def test_the_matrices_of_gpt_oss_are_the_transposes_of_its_experts() -> None:
    weight = CASES["gpt-oss"].claimed(MXFP4)[GATE]
    assert (weight.sizes, weight.shape, weight.transposed) == ((3, 64, 16), (48, 64), True)


def test_numbers_of_four_bits_may_be_counted_as_numbers() -> None:
    """safetensors' own type F4 has the sizes of the weight."""
    case = CASES["linear"]
    codes = case.tensors["layer.weight"]
    counted = replace(codes, dtype=DType.F4, shape=(codes.shape[0], codes.shape[1] * 2))
    (weight,) = MXFP4.claim({**case.tensors, "layer.weight": counted}, case.config)
    assert np.array_equal(read_rows(weight), case.decoded["layer.weight"].read())


@given(values=arrays(np.float32, (5, 32), elements=st.floats(-1, 1, width=32) | st.just(-0.0)))
@settings(max_examples=60)
def test_no_code_is_nearer(values: Array) -> None:
    weight = CASES["one group"].claimed(MXFP4)["layer.weight"]
    assert is_quantised(weight)
    rounded, again = np.empty_like(values), np.empty_like(values)
    fast = [bytes(piece.data) for piece in weight.put(0, values, rounded)]
    assert fast == [bytes(piece.data) for piece in put_quantised(weight, 0, values, again)]
    grid = weight.grid(0, 5)
    possible = np.stack([grid.values(np.full(values.shape, code, np.uint8)) for code in range(16)])
    distance = abs(possible.astype(np.float64) - values).min(axis=0)
    assert (abs(rounded.astype(np.float64) - values) <= distance + 1e-6 * abs(values)).all()  # a tie in float32


def test_experts_that_transformers_dequantised_and_called_blocks_are_refused(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    from surgery_formats.containers.safetensors import open_safetensors

    values = np.ones((3, 64, 16), ml_dtypes.bfloat16)
    save_file({f"{GATE}_blocks": values}, tmp_path / "w.safetensors")
    tensors = {tensor.name: tensor for tensor in open_safetensors(tmp_path / "w.safetensors").tensors}
    with pytest.raises(MalformedError, match="holds numbers in BF16") as caught:
        list(MXFP4.claim(tensors, {}))
    assert caught.value.tensor == f"{GATE}_blocks"
    others = {f"other{number}_blocks": tensor for number, tensor in enumerate(tensors.values())}
    assert list(MXFP4.claim(others, {})) == []


def test_an_exponent_that_is_no_number_is_refused(tmp_path: Path) -> None:
    tensors = broken(CASES["linear"], tmp_path, weight_scale=np.full((12, 3), 255, np.uint8))
    (weight,) = MXFP4.claim(tensors, {})
    with pytest.raises(MalformedError, match="a scale is nan") as caught:
        read_rows(weight)
    assert caught.value.tensor == "layer.weight_scale"


def test_blocks_that_are_not_those_of_gpt_oss_are_refused(tmp_path: Path) -> None:
    def claimed(blocks: tuple[int, ...], scales: tuple[int, ...]) -> list[Storage]:
        case = GoldenCase({}, {}, {})
        changed = {"a_blocks": np.ones(blocks, np.uint8), "a_scales": np.ones(scales, np.uint8)}
        return list(MXFP4.claim(broken(case, tmp_path, **changed), {}))

    assert claimed((2, 3, 4, 16), (2, 3, 4))[0].sizes == (2, 128, 3)
    for blocks, scales in (((2, 3, 4, 8), (2, 3, 4)), ((2, 3, 4, 16), (2, 3, 5)), ((2, 3, 16), (2, 3))):
        with pytest.raises(MalformedError, match="one for each"):
            claimed(blocks, scales)


@pytest.mark.parametrize("name", ["gpt-oss", "linear", "deepseek"])
def test_any_bytes_are_read_or_refused(name: str, tmp_path: Path) -> None:
    survives_any_bytes(CASES[name], MXFP4, tmp_path, rounds=300)
