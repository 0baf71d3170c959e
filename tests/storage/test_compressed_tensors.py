# SPDX-License-Identifier: Apache-2.0
"""Weights that compressed-tensors saved are read to the bit, put back to the byte, and refused by name where they are broken."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from surgery_formats.arrays import Array
from surgery_formats.errors import FitError, MalformedError
from surgery_formats.storage.base import read_block, read_rows
from surgery_formats.storage.compressed_tensors import COMPRESSED_TENSORS
from surgery_formats.storage.quantised import is_quantised, put_quantised
from surgery_formats.storage.registry import claimed_weights
from surgery_formats.testing.storage import QUANTISED_CHECKS, StorageCase
from tests.support.codecs import broken, check_values, conformance_case, golden_cases, survives_any_bytes

CASES = golden_cases(Path(__file__).parent / "golden" / "compressed_tensors.safetensors")
PARTS = (
    *("weight_packed", "weight", "weight_scale", "weight_zero_point", "weight_shape", "weight_global_scale"),
    *("weight_g_idx",),
)


def parts_of(name: str) -> tuple[str, ...]:
    return tuple(part for part in PARTS if f"layer.{part}" in CASES[name].tensors)


@pytest.mark.parametrize("name", CASES)
def test_values_are_those_of_the_package_to_the_bit(name: str) -> None:
    check_values(CASES[name], COMPRESSED_TENSORS)


@pytest.mark.parametrize("name", CASES)
def test_no_other_storage_claims_its_tensors(name: str) -> None:
    owners = claimed_weights(CASES[name].tensors, CASES[name].config)
    assert owners.keys() == CASES[name].tensors.keys()


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("check", QUANTISED_CHECKS, ids=lambda check: check.__name__)
def test_golden_weights_conform(check: Callable[[StorageCase, Path], None], name: str, tmp_path: Path) -> None:
    check(conformance_case(CASES[name], COMPRESSED_TENSORS, parts_of(name)), tmp_path)


@pytest.mark.parametrize(
    ("name", "kind", "block"),
    [
        ("int4 groups of 32", "INT4", (1, 32)),
        ("int3 asymmetric rows", "INT3", (1, 37)),
        ("int4 in bytes", "INT4", (1, 37)),
        ("int8 blocks", "INT8", (16, 16)),
        ("fp8 blocks", "FP8 16x16", (16, 16)),
        ("mxfp8", "MXFP8", (1, 32)),
        ("mxfp6", "MXFP6", (1, 32)),
        ("mxfp4", "MXFP4", (1, 32)),
        ("nvfp4", "NVFP4", (1, 16)),
    ],
)
def test_reports_say_what_it_is(name: str, kind: str, block: tuple[int, int]) -> None:
    weight = CASES[name].claimed(COMPRESSED_TENSORS)["layer.weight"]
    assert is_quantised(weight)
    assert (weight.kind, weight.block) == (kind, block)


@pytest.mark.parametrize("name", [name for name in CASES if "fp8 asymmetric" not in name])
def test_a_grid_that_is_fitted_to_its_own_values_holds_them(name: str) -> None:
    """To half a step, where zero points or the range's other end move; exactly in powers of two."""
    weight = CASES[name].claimed(COMPRESSED_TENSORS)["layer.weight"]
    assert is_quantised(weight)
    values = read_block(weight, 0, weight.shape[0])
    grid, stored = weight.fit(0, values), weight.grid(0, weight.shape[0])
    assert grid is not None
    again = grid.values(grid.nearest(values))
    if weight.kind.startswith("MX"):
        assert np.array_equal(again, values)
    steps = stored.values(np.ones_like(weight.codes(0, 1), shape=values.shape)) - stored.values(
        np.zeros_like(weight.codes(0, 1), shape=values.shape)
    )
    largest = abs(values).max()
    assert abs(again - values).max() <= max(1.01 * abs(steps).max(), 2.0**-4 * largest)


@pytest.mark.parametrize("name", ["int3 groups", "int4 asymmetric groups", "int8 asymmetric", "int4 in bytes", "mxfp6"])
@given(data=st.data())
@settings(max_examples=30)
def test_no_code_is_nearer(name: str, data: st.DataObject) -> None:
    weight = CASES[name].claimed(COMPRESSED_TENSORS)["layer.weight"]
    assert is_quantised(weight)
    values = data.draw(arrays(np.float32, weight.shape, elements=st.floats(-0.5, 0.5, width=32)))
    rounded, again = np.empty_like(values), np.empty_like(values)
    fast = [bytes(piece.data) for piece in weight.put(0, values, rounded)]
    assert fast == [bytes(piece.data) for piece in put_quantised(weight, 0, values, again)]
    grid, like = weight.grid(0, weight.shape[0]), weight.codes(0, 1)
    lowest = -(1 << (weight.bits - 1)) if like.dtype == np.int8 else 0
    codes = range(lowest, lowest + (1 << weight.bits))
    possible = np.stack([grid.values(np.full(values.shape, code, like.dtype)) for code in codes])
    distance = abs(possible.astype(np.float64) - values).min(axis=0)
    assert (abs(rounded.astype(np.float64) - values) <= distance + 1e-6 * abs(values)).all()  # a tie in float32


def test_columns_belong_to_the_groups_that_activation_order_gave_them(tmp_path: Path) -> None:
    case = CASES["int4 groups"]
    plain = read_rows(case.claimed(COMPRESSED_TENSORS)["layer.weight"])
    order = np.random.default_rng(0).permutation(np.repeat(np.arange(3), 16)).astype(np.int32)
    (weight,) = COMPRESSED_TENSORS.claim(broken(case, tmp_path, weight_g_idx=order), case.config)
    scales = case.tensors["layer.weight_scale"].read()
    codes = plain / np.repeat(scales, 16, axis=1)
    assert np.array_equal(read_rows(weight), np.rint(codes).astype(np.float32) * scales[:, order])
    for g_idx in (np.full(48, -1, np.int32), np.repeat(np.arange(3), 16).astype(np.int32)):
        (weight,) = COMPRESSED_TENSORS.claim(broken(case, tmp_path, weight_g_idx=g_idx), case.config)
        assert np.array_equal(read_rows(weight), plain)


def test_a_weight_with_an_order_conforms(tmp_path: Path) -> None:
    case = CASES["int4 groups"]
    order = np.random.default_rng(0).permutation(np.repeat(np.arange(3), 16)).astype(np.int32)
    stored = {name: tensor.read() for name, tensor in broken(case, tmp_path, weight_g_idx=order).items()}
    (weight,) = COMPRESSED_TENSORS.claim(broken(case, tmp_path, weight_g_idx=order), case.config)
    values = read_rows(weight)

    def encode(name: str, _: Array) -> dict[str, Array]:
        return {name.removesuffix("weight") + part.removeprefix("layer."): tensor for part, tensor in stored.items()}

    for number, check in enumerate(QUANTISED_CHECKS):
        if check.__name__ != "refuses_a_weight_of_which_a_tensor_is_missing":  # which the order may be
            (tmp_path / str(number)).mkdir()
            check(StorageCase(COMPRESSED_TENSORS.claim, encode, values, case.config), tmp_path / str(number))


@pytest.mark.parametrize(
    ("name", "changed", "match"),
    [
        ("int4 groups", {"weight_shape": None}, "no weight_shape"),
        ("int4 groups", {"weight_shape": np.array([11, 480])}, "of no width"),
        ("int4 groups", {"weight_shape": np.array([12, 48])}, r"I64 \[12, 48\] for codes"),
        ("int4 groups", {"weight_shape": np.array([-11, 48])}, r"I64 \[-11, 48\]"),
        ("int4 groups", {"weight_shape": np.array([11.0, 48.0])}, r"F64 \[2\]"),
        ("int4 groups", {"weight_scale": np.ones((11, 5), np.float32)}, "neither one"),
        ("int4 groups", {"weight_scale": np.full((11, 3), np.nan, np.float32)}, "a scale is nan"),
        ("int4 groups", {"weight_g_idx": np.full(48, 3, np.int32)}, "a column belongs to group 3 of 3"),
        ("int4 groups", {"weight_g_idx": np.zeros(47, np.int32)}, "for each of 48 columns"),
        ("int4 asymmetric groups", {"weight_zero_point": np.zeros((2, 4), np.int32)}, "zero points"),
        ("int4 asymmetric groups", {"weight_zero_point": np.zeros((2, 3), np.float32)}, "zero points of type F32"),
        ("int4 in bytes", {"weight": np.full((9, 37), 8, np.int8)}, "more than 4 bits"),
        ("nvfp4", {"weight_global_scale": np.zeros(1, np.float32)}, "the scale of scales is 0"),
        ("nvfp4", {"weight_global_scale": None}, "not one for every 32"),
        ("mxfp4", {"weight_scale": np.full((6, 2), 255, np.uint8)}, "a scale is nan"),
        ("mxfp4", {"weight_scale": np.ones((6, 3), np.uint8)}, "not one for every 32"),
    ],
)
def test_what_the_package_does_not_write_is_refused_by_name(
    name: str, changed: dict[str, Array | None], match: str, tmp_path: Path
) -> None:
    tensors = broken(CASES[name], tmp_path, **changed)
    with pytest.raises(MalformedError, match=match) as caught:
        [read_rows(weight) for weight in COMPRESSED_TENSORS.claim(tensors, CASES[name].config)]
    assert (caught.value.tensor or "").startswith("layer.weight")


def test_packed_weights_are_read_without_a_configuration() -> None:
    for name in ("int5 rows", "nvfp4", "mxfp4"):
        (weight,) = COMPRESSED_TENSORS.claim(CASES[name].tensors, {})
        assert np.array_equal(read_rows(weight), read_rows(CASES[name].claimed(COMPRESSED_TENSORS)["layer.weight"]))


def test_bits_that_cannot_be_told_are_refused(tmp_path: Path) -> None:
    """Integers in whole bytes, of a model with two widths."""
    case = CASES["int4 in bytes"]
    told = dict(case.config["quantization_config"])
    group = told["config_groups"]["group_0"]
    wider = {**group, "weights": {**group["weights"], "num_bits": 8}}
    told["config_groups"] = {"group_0": group, "group_1": wider}
    with pytest.raises(MalformedError, match="codes of 4, 8 bits"):
        list(COMPRESSED_TENSORS.claim(case.tensors, {"quantization_config": told}))


@pytest.mark.parametrize(
    "told",
    [{"format": "marlin-24"}, {"format": "sparse-24-bitmask"}, {"sparsity_config": {"format": "sparse-24-bitmask"}}],
)
def test_sparse_formats_that_the_package_no_longer_reads_are_not_claimed(told: dict[str, object]) -> None:
    case = CASES["int4 groups"]
    config = {"quantization_config": {**case.config["quantization_config"], **told}}
    assert list(COMPRESSED_TENSORS.claim(case.tensors, config)) == []


def test_rotated_weights_are_refused() -> None:
    case = CASES["int4 groups"]
    told = {**case.config["quantization_config"], "transform_config": {"config_groups": {"u": {"type": "hadamard"}}}}
    with pytest.raises(FitError, match="rotated"):
        list(COMPRESSED_TENSORS.claim(case.tensors, {"quantization_config": told}))


@pytest.mark.parametrize(
    "name", ["int3 asymmetric groups", "int8 asymmetric", "fp8 blocks", "mxfp6", "nvfp4", "int4 groups"]
)
def test_any_bytes_are_read_or_refused(name: str, tmp_path: Path) -> None:
    survives_any_bytes(CASES[name], COMPRESSED_TENSORS, tmp_path, rounds=300)
