# SPDX-License-Identifier: Apache-2.0
"""Weights as MLX and transformers' "metal" encode them are read to the bit, put back to the byte, and refused by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from surgery_formats.arrays import Array, cast
from surgery_formats.containers.safetensors import open_safetensors
from surgery_formats.dtypes import DType
from surgery_formats.errors import MalformedError
from surgery_formats.storage.base import read_block, read_rows
from surgery_formats.storage.grouped_columns import GroupedColumns
from surgery_formats.storage.mlx_affine import MLX_AFFINE
from surgery_formats.tensors.tensor import StoredTensor
from surgery_formats.testing.storage import QUANTISED_CHECKS, StorageCase
from tests.support.mutated_bytes import count_refused

GOLDEN = Path(__file__).parent / "golden" / "mlx.safetensors"
STORED = {tensor.name: tensor for tensor in open_safetensors(GOLDEN).tensors}
DECODED = {name.removeprefix("decoded."): tensor for name, tensor in STORED.items() if name.startswith("decoded.")}
NAMES = [name.removesuffix(".weight") for name in DECODED if not name.startswith(("mxfp", "nvfp"))]
SIZES = {"group.64": 64, "group.128": 128, "float32.8": 64, "experts.6": 64, "metal.4": 64}
BITS = {name: int(name[-1]) if name[-2] == "." and name.startswith(("bits", "metal")) else 4 for name in NAMES} | {
    "group.128": 3,
    "float32.8": 8,
    "experts.6": 6,
}


def config(name: str, **more: Any) -> dict[str, Any]:
    said = {"bits": BITS[name], "group_size": SIZES.get(name, 32), **more}
    if name.startswith("metal"):
        return {"quantization_config": {"quant_method": "metal", **said}}
    return {"quantization": said}


def encoded(name: str, to: str = "") -> dict[str, Array]:
    """The stored tensors of a golden weight, of another name if one is given."""
    stem = to.removesuffix(".weight") or name
    own = {key: tensor.read() for key, tensor in STORED.items() if key.rpartition(".")[0] == name}
    return {stem + key.removeprefix(name): tensor for key, tensor in own.items()}


def opened(tensors: Mapping[str, Array], folder: Path) -> dict[str, StoredTensor]:
    path = folder / "weights.safetensors"
    save_file({name: np.asarray(tensor, order="C") for name, tensor in tensors.items()}, path)
    return {tensor.name: tensor for tensor in open_safetensors(path).tensors}


def claimed(tensors: Mapping[str, Array], folder: Path, name: str, **more: Any) -> GroupedColumns:
    (weight,) = MLX_AFFINE.claim(opened(tensors, folder), config(name, **more))
    return weight


@pytest.mark.parametrize("name", NAMES)
def test_values_are_those_of_the_program_that_encoded_them(name: str, tmp_path: Path) -> None:
    weight, wanted = claimed(encoded(name), tmp_path, name), DECODED[f"{name}.weight"].read()
    assert weight.kind == f"MLX{BITS[name]}"
    assert weight.sizes == wanted.shape
    assert read_rows(weight).tobytes() == wanted.tobytes()


@pytest.mark.parametrize("name", [name for name in NAMES if f"rounded.{name}.weight" in STORED])
def test_mlx_itself_rounds_the_product_and_then_the_sum(name: str, tmp_path: Path) -> None:
    weight, rounded = claimed(encoded(name), tmp_path, name), STORED[f"rounded.{name}.weight"]
    grid, dtype = weight.grid(0, weight.shape[0]), rounded.dtype
    assert grid.biases is not None
    codes = cast(weight.codes(0, weight.shape[0]), DType.F32)
    product = cast(codes * grid.scales.repeat(weight.size, 1), dtype)
    total = cast(cast(product, DType.F32) + grid.biases.repeat(weight.size, 1), dtype)
    assert np.array_equal(total.reshape(rounded.shape), rounded.read())


@pytest.mark.parametrize("name", [name for name in NAMES if not name.startswith("experts")])
@pytest.mark.parametrize("check", QUANTISED_CHECKS, ids=lambda check: check.__name__)
def test_golden_weights_conform(check: Callable[[StorageCase, Path], None], name: str, tmp_path: Path) -> None:
    values = DECODED[f"{name}.weight"].read()
    check(StorageCase(MLX_AFFINE.claim, lambda to, _: encoded(name, to), values, config(name)), tmp_path)


@pytest.mark.parametrize("name", ["experts", "experts.6"])
def test_experts_lie_under_each_other(name: str, tmp_path: Path) -> None:
    weight, wanted = claimed(encoded(name), tmp_path, name), DECODED[f"{name}.weight"].read()
    rows, columns = weight.shape
    assert (rows, columns) == (wanted.shape[0] * wanted.shape[1], wanted.shape[2])
    assert np.array_equal(read_block(weight, 2, 5), wanted.reshape(rows, columns)[2:5])
    rounded = np.empty((rows, columns), np.float32)
    written = weight.put(0, wanted.reshape(rows, columns), rounded)
    for source, piece in zip(weight.sources, written, strict=True):
        assert bytes(piece.data) == source.file.read(source.offset, source.nbytes)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_values_become_the_nearest_codes(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    name = data.draw(st.sampled_from(NAMES))
    weight = claimed(encoded(name), tmp_path_factory.mktemp("w"), name)
    start = data.draw(st.integers(0, weight.shape[0] - 1))
    stop = data.draw(st.integers(start + 1, weight.shape[0]))
    seed, spread = data.draw(st.integers(0, 99)), data.draw(st.sampled_from([1e-6, 0.02, 1, 1e30]))
    values = np.random.default_rng(seed).normal(0, spread, (stop - start, weight.shape[1])).astype(np.float32)
    rounded = np.empty_like(values)
    weight.put(start, values, rounded)
    grid = weight.grid(start, stop)
    every = [grid.values(np.full(values.shape, code, np.uint8)) for code in range(1 << weight.bits)]
    best = np.min([abs(each.astype(np.float64) - values) for each in every], axis=0)
    assert (abs(rounded.astype(np.float64) - values) <= best + 1e-6 * abs(values)).all()


@pytest.mark.parametrize("name", [name for name in NAMES if f"given.{name}.weight" in STORED])
def test_a_fitted_grid_is_that_of_mlx(name: str, tmp_path: Path) -> None:
    weight = claimed(encoded(name), tmp_path, name)
    given = cast(STORED[f"given.{name}.weight"].read(), DType.F32).reshape(weight.shape)
    fitted, stored = weight.fit(0, given), weight.grid(0, weight.shape[0])
    assert np.array_equal(fitted.scales, stored.scales)
    assert np.array_equal(fitted.biases, stored.biases)
    # MLX divides by a scale that it has not rounded yet
    assert (fitted.nearest(given) != weight.codes(0, weight.shape[0])).mean() < (0.5 if weight.bits == 8 else 0.1)


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("metal")])
def test_a_fitted_grid_of_metal_is_that_of_transformers(name: str, tmp_path: Path) -> None:
    """Its own rule, which MLX's is not: from the least value of a group to the greatest."""
    import torch
    from transformers.integrations.metal_quantization import _affine_quantize_tensor

    weight = claimed(encoded(name), tmp_path, name)
    values = np.random.default_rng(0).normal(0, 0.02, weight.shape).astype(np.float32)
    _, scales, biases = _affine_quantize_tensor(torch.from_numpy(values), weight.size, weight.bits)
    fitted = weight.fit(0, values)
    assert np.array_equal(fitted.scales, cast(cast(scales.numpy(), DType.BF16), DType.F32))
    assert np.array_equal(fitted.biases, cast(cast(biases.numpy(), DType.BF16), DType.F32))


def test_layers_may_have_their_own_settings(tmp_path: Path) -> None:
    tensors = {**encoded("bits.4", "a.b"), **encoded("bits.8", "a.c"), **encoded("group.128", "d")}
    own = {"a.c": {"bits": 8}, "d": {"bits": 3, "group_size": 128}, "lm_head": False}
    weights = list(MLX_AFFINE.claim(opened(tensors, tmp_path), {"quantization": {"bits": 4, "group_size": 32, **own}}))
    assert {weight.name: (weight.kind, weight.size) for weight in weights} == {
        "a.b.weight": ("MLX4", 32),
        "a.c.weight": ("MLX8", 32),
        "d.weight": ("MLX3", 128),
    }


@pytest.mark.parametrize(
    "said",
    [
        {"quantization": {"bits": 4, "group_size": 32, "mode": "mxfp4"}},
        {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 32}},
        {},
    ],
)
def test_other_formats_are_left_alone(said: dict[str, Any], tmp_path: Path) -> None:
    assert list(MLX_AFFINE.claim(opened(encoded("bits.4"), tmp_path), said)) == []


Tensors = dict[str, Array]
FAULTS: dict[str, tuple[Callable[[Tensors], object], str]] = {
    "scales are gone": (lambda t: t.pop("w.scales"), r"no 'w\.scales'"),
    "biases are gone": (lambda t: t.pop("w.biases"), r"no 'w\.biases'"),
    "codes are a vector": (lambda t: t.update({"w.weight": t["w.weight"].ravel()}), "not U32 of 2 or 3 axes"),
    "codes are narrow": (lambda t: t.update({"w.weight": t["w.weight"][:, 1:]}), "are not 4 bits in groups of 64"),
    "codes are short": (lambda t: t.update({"w.weight": t["w.weight"][1:]}), "are not 4 bits in groups of 64"),
    "scales are short": (lambda t: t.update({"w.scales": t["w.scales"][1:]}), "are not 4 bits in groups of 64"),
    "biases are narrow": (lambda t: t.update({"w.biases": t["w.biases"][:, 1:]}), "are not 4 bits in groups of 64"),
    "scales are integers": (lambda t: t.update({"w.scales": t["w.scales"].astype(np.int16)}), "not F16 or BF16 or F32"),
    "scales are NaN": (lambda t: t["w.scales"].__setitem__((1, 2), np.nan), "NaN or infinite"),
    "biases are infinite": (lambda t: t["w.biases"].__setitem__((1, 2), np.inf), "NaN or infinite"),
}  # fmt: skip
SETTINGS: tuple[dict[str, Any], ...] = (
    {"bits": 7},
    {"bits": 8},
    {"group_size": 0},
    {"group_size": -64},
    {"group_size": "64"},
    {"group_size": 32},
    {"w": {"bits": [4]}},
    {"w": {"group_size": 1 << 60}},
)


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_broken_is_refused_by_name(fault: str, tmp_path: Path) -> None:
    change, words = FAULTS[fault]
    tensors = {key: tensor.copy() for key, tensor in encoded("group.64", "w").items()}
    change(tensors)
    with pytest.raises(MalformedError, match=words) as refused:
        read_rows(claimed(tensors, tmp_path, "group.64"))
    assert refused.value.file
    assert refused.value.tensor


@pytest.mark.parametrize("said", SETTINGS, ids=str)
def test_settings_that_do_not_fit_are_refused(said: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(MalformedError, match=r"are not .* bits in groups of"):
        claimed(encoded("group.64", "w"), tmp_path, "group.64", **said)


@pytest.mark.parametrize("name", ["bits.4", "bits.6", "experts", "metal.4"])
def test_mutated_files_raise_nothing_but_our_errors(name: str, tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_file(encoded(name, "w"), path)

    def read(tensors: Mapping[str, StoredTensor]) -> None:
        for weight in MLX_AFFINE.claim(tensors, config(name)):
            values = read_block(weight, 0, weight.shape[0])
            weight.put(0, values * np.float32(0.5), np.empty_like(values))

    assert count_refused(path, 600, read)
