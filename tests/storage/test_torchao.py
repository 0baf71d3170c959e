# SPDX-License-Identifier: Apache-2.0
"""Layers as torchao quantises and transformers saves them are read to the bit, and put back to the byte."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from surgery_formats.arrays import Array, cast
from surgery_formats.containers.safetensors import open_safetensors
from surgery_formats.dtypes import DType
from surgery_formats.errors import FitError, MalformedError, SurgeryError
from surgery_formats.storage.base import Storage, read_block, read_rows
from surgery_formats.storage.quantised import is_quantised
from surgery_formats.storage.torchao import TORCHAO
from surgery_formats.tensors.tensor import StoredTensor
from surgery_formats.testing.storage import QUANTISED_CHECKS, StorageCase

GOLDEN = open_safetensors(Path(__file__).parent / "golden" / "torchao.safetensors")
STORED = {tensor.name: tensor for tensor in GOLDEN.tensors}
DECODED = {name.removeprefix("decoded."): tensor for name, tensor in STORED.items() if name.startswith("decoded.")}
ENCODED = {n: t for n, t in STORED.items() if not n.startswith(("decoded.", "given.", "nvfp4"))}
WEIGHTS: dict[str, Storage] = {weight.name: weight for weight in TORCHAO.claim(ENCODED, {})}
LINEAR = [name for name in WEIGHTS if name.endswith(".weight")]
NAME = "w.weight"


def encoded(name: str) -> dict[str, Array]:
    """The stored tensors of a golden weight by their names within the module."""
    stem = name.removesuffix("weight")
    return {source.name.removeprefix(stem): source.read() for source in WEIGHTS[name].sources}


def told(name: str, **changes: Any) -> dict[str, str]:
    """The metadata of a file with one such weight."""
    entry = json.loads(GOLDEN.metadata[name])
    entry["_data"] |= changes.pop("data", {})
    return {"tensor_names": json.dumps([NAME]), NAME: json.dumps({**entry, **changes})}


def claimed(folder: Path, tensors: Mapping[str, Array], metadata: dict[str, str]) -> list[Storage]:
    save_file({f"w.{n}": np.asarray(t, order="C") for n, t in tensors.items()}, folder / "w.safetensors", metadata)
    stored: dict[str, StoredTensor] = {t.name: t for t in open_safetensors(folder / "w.safetensors").tensors}
    return list(TORCHAO.claim(stored, {}))


def test_every_golden_weight_is_claimed() -> None:
    assert set(WEIGHTS) == set(DECODED)
    assert {source.name for weight in WEIGHTS.values() for source in weight.sources} == set(ENCODED)
    kinds = {name: WEIGHTS[f"{name}.weight"].kind for name in ("int8", "intx3", "float8", "float8.e5m2")}
    assert kinds == {"int8": "INT8", "intx3": "INT3", "float8": "FP8", "float8.e5m2": "FP8 E5M2"}


@pytest.mark.parametrize("name", WEIGHTS)
def test_values_are_those_of_torchao_in_float32_to_the_bit(name: str) -> None:
    weight, wanted = WEIGHTS[name], DECODED[name].read()
    assert weight.sizes == wanted.shape
    assert read_rows(weight).tobytes() == wanted.tobytes()
    rows, matrix = weight.shape[0], wanted.reshape(weight.shape)
    for start in range(rows):
        for stop in {start + 1, (start + rows + 1) // 2, rows}:
            assert np.array_equal(read_block(weight, start, stop), matrix[start:stop]), (start, stop)


@pytest.mark.parametrize("name", LINEAR)
@pytest.mark.parametrize("check", QUANTISED_CHECKS, ids=lambda check: check.__name__)
def test_golden_weights_conform(check: Callable[[StorageCase, Path], None], name: str, tmp_path: Path) -> None:
    parts = encoded(name)

    def encode(wanted: str, values: Array) -> dict[str, Array]:
        return {wanted.removesuffix("weight") + rest: tensor for rest, tensor in parts.items()}

    names = ["block.0.linear.weight", "block.1.linear.weight", "other.weight"]
    metadata = {"tensor_names": json.dumps(names), **dict.fromkeys(names, GOLDEN.metadata[name])}
    check(StorageCase(TORCHAO.claim, encode, DECODED[name].read(), metadata=metadata), tmp_path)


@pytest.mark.parametrize("name", [name for name in LINEAR if "asymmetric" not in name and "blocks" not in name])
def test_scales_that_are_fitted_are_those_of_torchao(name: str) -> None:
    weight, values = WEIGHTS[name], cast(STORED[f"given.{name}"].read(), DType.F32)
    assert is_quantised(weight)
    grid = weight.fit(0, values)
    assert grid is not None
    written = weight.pack(0, grid.nearest(values), grid)
    scales = np.frombuffer(written[1].data, weight.sources[1].dtype.numpy).astype(np.float32)
    stored = cast(weight.sources[1].read(), DType.F32).reshape(-1)
    exact = {STORED[f"given.{name}"].dtype, weight.sources[1].dtype} == {DType.F32}
    assert np.allclose(scales, stored, rtol=2e-7 if exact else 2e-2)  # torchao has them in the weight's type first
    apart = abs(grid.nearest(values).astype(int) - weight.codes(0, weight.shape[0]))
    assert apart.max() <= 1
    assert apart.mean() <= (0.02 if exact else 0.2)  # it multiplies by the reciprocal, where ties fall otherwise


@pytest.mark.parametrize("layout", ["Int4TilePackedTo4dTensor", "Int4PlainInt32Tensor", "MXTensor"])
def test_what_is_laid_out_for_a_device_is_refused_by_name(layout: str, tmp_path: Path) -> None:
    with pytest.raises(FitError, match=f"torchao's {layout}") as refused:
        claimed(tmp_path, encoded("int8.weight"), told("int8.weight", _type=layout))
    assert refused.value.tensor == "w._weight_qdata"


def test_a_golden_nvfp4_is_refused_by_name() -> None:
    with pytest.raises(FitError, match="NVFP4Tensor, with scales swizzled"):
        list(TORCHAO.claim({name: tensor for name, tensor in STORED.items() if name.startswith("nvfp4")}, {}))


def test_a_weight_behind_a_scaled_input_is_refused(tmp_path: Path) -> None:
    metadata = told("int8.weight", _tensor_data_names=["qdata", "scale", "zero_point", "act_pre_scale"])
    with pytest.raises(FitError, match="act_pre_scale"):
        claimed(tmp_path, encoded("int8.weight"), metadata)


FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "unknown class": ({"_type": "Int9Tensor"}, "Int9Tensor"),
    "no class": ({"_type": None}, "None"),
    "floats are integers": ({"_type": "Float8Tensor"}, "Float8Tensor"),
    "no block": ({"data": {"block_size": None}}, "block_size of 'None'"),
    "block of text": ({"data": {"block_size": ["1", 40]}}, "block_size"),
    "block of zero": ({"data": {"block_size": [0, 40]}}, "block_size"),
    "block of one axis": ({"data": {"block_size": [40]}}, "block_size"),
    "block that does not divide": ({"data": {"block_size": [1, 7]}}, "block_size"),
    "other block": ({"data": {"block_size": [1, 20]}}, "scales"),
    "four bits in eight": ({"_type": "Int4Tensor", "data": {"block_size": [1, 20]}}, "where there are 4 groups"),
    "four bits in blocks of rows": (
        {"_type": "Int4Tensor", "data": {"block_size": [2, 20]}},
        "not torchao's Int4Tensor",
    ),
    "no fields": ({"_data": 3}, "not what torchao writes"),
    "no parts": ({"_tensor_data_names": None}, "not what torchao writes"),
    "odd part": ({"_tensor_data_names": [3]}, "not what torchao writes"),
    "missing part": ({"_tensor_data_names": ["qdata", "scale", "zero_point", "other"]}, "no 'w._weight_other'"),
    "target of 9 bits": (
        {"_type": "IntxUnpackedToInt8Tensor", "data": {"target_dtype": {"_data": "int9"}}},
        "target_dtype",
    ),
    "no target": ({"_type": "IntxUnpackedToInt8Tensor"}, "target_dtype"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_metadata_that_is_broken_is_refused_by_name(fault: str, tmp_path: Path) -> None:
    changes, words = FAULTS[fault]
    with pytest.raises(MalformedError, match=words) as refused:
        claimed(tmp_path, encoded("int8.weight"), told("int8.weight", **changes))
    assert refused.value.file


def test_a_file_that_does_not_tell_the_class_is_refused(tmp_path: Path) -> None:
    for metadata in ({}, {"tensor_names": "[]"}, {NAME: "{}"}):
        with pytest.raises(MalformedError, match="metadata does not say"):
            claimed(tmp_path, encoded("int8.weight"), metadata)
    with pytest.raises(MalformedError, match="not JSON"):
        claimed(tmp_path, encoded("int8.weight"), {"tensor_names": "[]", NAME: "{"})


def test_a_code_beyond_the_range_is_refused(tmp_path: Path) -> None:
    tensors = encoded("intx4.weight")
    tensors["_weight_qdata"][2, 3] = 8
    (weight,) = claimed(tmp_path, tensors, told("intx4.weight"))
    with pytest.raises(MalformedError, match="more than 4 bits"):
        read_rows(weight)


@pytest.mark.parametrize(("value", "words"), [(-1, "negative scale"), (np.nan, "NaN"), (np.inf, "infinity")])
def test_scales_of_four_bits_that_cannot_be_are_refused(value: float, words: str, tmp_path: Path) -> None:
    tensors = encoded("int4.float32.weight")
    tensors["_weight_scale"][0, 1] = value
    (weight,) = claimed(tmp_path, tensors, told("int4.float32.weight"))
    with pytest.raises(MalformedError, match=words) as refused:
        read_rows(weight)
    assert refused.value.tensor == "w._weight_scale"


@pytest.mark.parametrize("name", ["intx4.weight", "int4.weight"])
def test_mutated_files_raise_nothing_but_our_errors(name: str, tmp_path: Path) -> None:
    claimed(tmp_path, encoded(name), told(name))
    path = tmp_path / "w.safetensors"
    raw, generator = bytearray(path.read_bytes()), np.random.default_rng(0)
    header = 8 + int.from_bytes(raw[:8], "little")
    refused = 0
    for _ in range(1500):
        mutated = bytearray(raw)
        for _ in range(generator.integers(1, 4)):
            last = header if generator.random() < 0.7 else len(raw)
            mutated[generator.integers(0, last)] = generator.integers(0, 256)
        path.write_bytes(mutated)
        try:
            for weight in TORCHAO.claim({t.name: t for t in open_safetensors(path).tensors}, {}):
                values = read_rows(weight).reshape(weight.shape)
                if np.isfinite(values).all():
                    weight.put(0, values * np.float32(0.5), np.empty_like(values))
        except SurgeryError:
            refused += 1
    assert refused
