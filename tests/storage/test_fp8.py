# SPDX-License-Identifier: Apache-2.0
"""Weights in fp8 are read to the bit as the programs that wrote them read them, put back to the byte, and refused by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import MappingProxyType

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from safetensors.numpy import save_file

from surgery_formats.arrays import Array
from surgery_formats.containers.safetensors import open_safetensors
from surgery_formats.errors import MalformedError
from surgery_formats.storage.base import Storage, read_block, read_rows
from surgery_formats.storage.fp8 import FP8
from surgery_formats.storage.quantised import is_quantised, put_quantised
from surgery_formats.tensors.tensor import StoredTensor
from surgery_formats.testing.storage import QUANTISED_CHECKS, StorageCase
from tests.support.codecs import broken, check_values, conformance_case, golden_cases, survives_any_bytes

CASES = golden_cases(Path(__file__).parent / "golden" / "fp8.safetensors")
E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
TOLD = MappingProxyType({"quantization_config": {"quant_method": "fp8"}})
SCALED = {
    "block": "weight_scale_inv",
    "block of rows": "weight_scale_inv",
    "tensor": "weight_scale_inv",
    "powers of two": "weight_scale_inv",
    "uneven": "weight_scale_inv",
    "576 rows": "weight_scale_inv",
    "mistral": "weight_scale_inv",
    "modelopt": "weight_scale",
    "modelopt rows": "weight_scale",
    "comfy": "scale_weight",
    "comfy e5m2": "weight_scale",
}


def opened(tensors: dict[str, Array], folder: Path) -> dict[str, StoredTensor]:
    save_file({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}, folder / "w.safetensors")
    return {tensor.name: tensor for tensor in open_safetensors(folder / "w.safetensors").tensors}


def claimed(tensors: dict[str, Array], folder: Path, **told: object) -> list[Storage]:
    return list(FP8.claim(opened(tensors, folder), {"quantization_config": told} if told else {}))


@pytest.mark.parametrize("name", CASES)
def test_values_are_those_of_the_program_to_the_bit(name: str) -> None:
    check_values(CASES[name], FP8)


@pytest.mark.parametrize("name", SCALED)
@pytest.mark.parametrize("check", QUANTISED_CHECKS, ids=lambda check: check.__name__)
def test_golden_weights_conform(check: Callable[[StorageCase, Path], None], name: str, tmp_path: Path) -> None:
    told = {**CASES[name].config.get("quantization_config", {}), "quant_method": "fp8"}
    check(conformance_case(CASES[name], FP8, ("weight", SCALED[name]), quantization_config=told), tmp_path)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("block", "FP8 16x16"),
        ("uneven", "FP8 32x32"),
        ("tensor", "FP8"),
        ("modelopt rows", "FP8 rows"),
        ("comfy e5m2", "FP8 E5M2"),
        ("e4m3fnuz", "FP8 E4M3FNUZ"),
    ],
)
def test_reports_say_which_blocks(name: str, kind: str) -> None:
    assert CASES[name].claimed(FP8)["layer.weight"].kind == kind


@pytest.mark.parametrize("name", ["block", "experts", "tensor", "modelopt rows"])
def test_scales_and_codes_that_are_fitted_are_those_of_the_program(name: str) -> None:
    (weight,) = CASES[name].claimed(FP8).values()
    assert is_quantised(weight)
    values = read_block(weight, 0, weight.shape[0])
    grid = weight.fit(0, values)
    assert grid is not None
    for piece in weight.pack(0, grid.nearest(values), grid)[:2]:
        source = weight.sources[piece.part]
        before = np.frombuffer(source.file.read(source.offset, source.nbytes), source.dtype.numpy)
        now = np.frombuffer(piece.data, source.dtype.numpy)
        assert np.allclose(now.astype(np.float32), before.astype(np.float32), rtol=1e-6), source.name


@given(
    values=arrays(np.float32, (8, 12), elements=st.floats(-500, 500, width=32) | st.just(-0.0)),
    scale=st.floats(0.125, 8, width=32),
)
@settings(max_examples=60)
def test_no_code_is_nearer_and_none_is_nan(
    values: Array, scale: float, tmp_path_factory: pytest.TempPathFactory
) -> None:
    stored = {"w.weight": np.zeros((8, 12), E4M3), "w.weight_scale": np.array([[scale, 1]] * 2, np.float32)}
    (weight,) = claimed(stored, tmp_path_factory.mktemp("w"), quant_method="fp8", weight_block_size=[4, 6])
    assert is_quantised(weight)
    rounded, again = np.empty_like(values), np.empty_like(values)
    fast = [bytes(piece.data) for piece in weight.put(0, values, rounded)]
    assert fast == [bytes(piece.data) for piece in put_quantised(weight, 0, values, again)]
    assert np.array_equal(rounded, again)
    assert np.isfinite(rounded).all()
    numbers = np.arange(256, dtype=np.uint8).view(E4M3).astype(np.float32)
    steps = np.repeat([scale, 1.0], 6).astype(np.float32)
    possible = numbers[np.isfinite(numbers)][:, None, None] * steps
    distance = abs(possible.astype(np.float64) - values).min(axis=0)
    assert (abs(rounded.astype(np.float64) - values) <= distance + 1e-6 * abs(values)).all()  # a tie in float32


def test_a_block_of_the_configuration_wins_over_equal_parts(tmp_path: Path) -> None:
    """192 rows with two scales: 128 and 64, as DeepSeek and vLLM read them; where nothing says 128, 96 and 96."""
    stored = {"w.weight": np.ones((192, 4), E4M3), "w.weight_scale_inv": np.array([[1], [2]], np.float32)}
    for told, first in (({"quant_method": "fp8", "weight_block_size": [128, 128]}, 128), ({"quant_method": "fp8"}, 96)):
        (weight,) = claimed(stored, tmp_path, **told)
        assert (read_rows(weight)[:, 0] == 1).sum() == first
    stored = {"w.weight": np.ones((576, 4), E4M3), "w.weight_scale_inv": np.arange(1, 6, dtype=np.float32)[:, None]}
    (weight,) = claimed(stored, tmp_path, quant_method="fp8")
    assert np.bincount(read_rows(weight)[:, 0].astype(int)).tolist() == [0, 128, 128, 128, 128, 64]


def test_names_of_stacks_and_of_convolutions(tmp_path: Path) -> None:
    codes = np.ones((3, 4, 6), E4M3)
    stored = {
        "experts.gate_up_proj": codes,
        "experts.gate_up_proj_scale_inv": np.arange(6, dtype=np.float32).reshape(3, 2, 1),
        "stack.weight": codes,
        "stack.weight_scale": np.arange(1, 10, dtype=np.float32).reshape(3, 1, 3),
        "conv.weight": np.ones((2, 3, 3, 3), E4M3),
        "conv.weight_scale": np.array([1, 2], np.float32).reshape(2, 1, 1, 1),
        "conv1d.weight": codes,
        "conv1d.scale_weight": np.array(3, np.float32),
    }
    weights = {weight.name: weight for weight in claimed(stored, tmp_path)}
    assert {name: weight.shape for name, weight in weights.items()} == {
        "experts.gate_up_proj": (12, 6),
        "stack.weight": (12, 6),
        "conv.weight": (2, 27),
        "conv1d.weight": (3, 24),
    }
    assert read_block(weights["experts.gate_up_proj"], 0, 12)[:, 0].tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    assert read_block(weights["stack.weight"], 4, 5)[0].tolist() == [4, 4, 5, 5, 6, 6]
    assert read_rows(weights["conv.weight"]).max(axis=(1, 2, 3)).tolist() == [1, 2]


def test_scales_of_a_cache_and_tensors_that_are_no_weights_stay_as_they_are(tmp_path: Path) -> None:
    """A model in 16 bits with a cache in fp8, and one with codes of its own."""
    stored = {
        "layers.0.self_attn.k_proj.weight": np.ones((4, 4), np.float32),
        "layers.0.self_attn.k_scale": np.ones((), E4M3),
        "layers.0.self_attn.kv_cache.scale": np.ones(4, E4M3),
        "layers.0.self_attn.kv_cache.weight": np.ones(4, np.float32),
        "codes": np.ones((4, 4), E4M3),
        "scaled_fp8": np.ones(0, E4M3),
        "other._weight_qdata": np.ones((4, 4), E4M3),
        "packed.weight_packed": np.ones((4, 4), np.uint8),
        "packed.weight_scale": np.ones((4, 4), E4M3),
    }
    assert claimed(stored, tmp_path) == []
    stored["layers.0.self_attn.k_proj.weight"] = stored["layers.0.self_attn.k_proj.weight"].astype(E4M3)
    (weight,) = claimed(stored, tmp_path)
    assert [source.name for source in weight.sources][1:] == ["layers.0.self_attn.k_scale", "scaled_fp8"]


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"weight_scale_inv": None}, "no scale"),
        ({"weight_scale_inv": np.full((2, 3), np.nan, np.float32)}, "a scale is nan"),
        ({"weight_scale_inv": np.full((2, 3), -1, np.float32)}, "a scale is -1"),
        ({"weight_scale_inv": np.full((2, 3), np.inf, np.float32)}, "a scale is inf"),
        ({"weight_scale_inv": np.ones((5, 3), np.float32)}, r"scales \[5, 3\] for codes \[32, 48\]"),
        ({"weight_scale_inv": np.ones((2, 3), np.int32)}, "scales of type I32"),
        ({"weight_scale_inv": np.ones(48, np.float32)}, "neither one"),
        ({"weight_scale": np.ones((), np.float32)}, "two scales"),
        ({"weight_scale_2": np.ones((), np.float32)}, "a second scale"),
    ],
)
def test_what_no_program_writes_is_refused_by_name(
    changed: dict[str, Array | None], match: str, tmp_path: Path
) -> None:
    case = CASES["block"]
    tensors = broken(case, tmp_path, **changed)
    with pytest.raises(MalformedError, match=match) as caught:
        [read_rows(weight) for weight in FP8.claim(tensors, case.config)]
    assert caught.value.tensor in ("layer.weight", *(f"layer.{part}" for part in changed))


@pytest.mark.parametrize(
    "changed",
    [
        {"pre_quant_scale": np.ones(48, np.float32)},
        {"comfy_quant": np.ones(30, np.uint8), "weight_scale_inv": None, "weight_scale": np.ones((128, 4), np.uint8)},
    ],
)
def test_weights_that_are_not_read_are_left_to_be_named(changed: dict[str, Array | None], tmp_path: Path) -> None:
    assert list(FP8.claim(broken(CASES["block"], tmp_path, **changed), {})) == []


def test_a_block_whose_scale_is_zero_is_zero_and_stays_so(tmp_path: Path) -> None:
    case = CASES["block"]
    tensors = broken(case, tmp_path, weight_scale_inv=np.zeros((2, 3), np.float32))
    (weight,) = FP8.claim(tensors, case.config)
    assert not read_rows(weight).any()
    rounded = np.empty((32, 48), np.float32)
    codes = np.frombuffer(weight.put(0, np.ones((32, 48), np.float32), rounded)[0].data, np.uint8)
    assert not rounded.any()
    assert np.isfinite(codes.view(E4M3).astype(np.float32)).all()


@pytest.mark.parametrize("name", ["block", "experts", "uneven", "comfy", "fbgemm", "mistral"])
def test_any_bytes_are_read_or_refused(name: str, tmp_path: Path) -> None:
    survives_any_bytes(CASES[name], FP8, tmp_path, rounds=300)
