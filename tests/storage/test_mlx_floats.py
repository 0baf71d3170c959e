# SPDX-License-Identifier: Apache-2.0
"""Weights in MLX's modes of small floats are read to the bit, put back to the byte, and refused by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from surgery_formats.arrays import Array
from surgery_formats.containers.safetensors import open_safetensors
from surgery_formats.errors import MalformedError
from surgery_formats.storage.base import read_block, read_rows
from surgery_formats.storage.mlx_floats import MLX_FLOATS
from surgery_formats.storage.registry import claimed_weights
from surgery_formats.storage.scaled_weight import ScaledWeight
from surgery_formats.tensors.tensor import StoredTensor
from surgery_formats.testing.storage import QUANTISED_CHECKS, StorageCase
from tests.support.mutated_bytes import count_refused

GOLDEN = Path(__file__).parent / "golden" / "mlx.safetensors"
STORED = {tensor.name: tensor for tensor in open_safetensors(GOLDEN).tensors}
NAMES = ["mxfp4", "mxfp4.experts", "mxfp8", "nvfp4", "nvfp4.experts"]


def config(name: str) -> dict[str, Any]:
    size, bits = {"mxfp4": (32, 4), "mxfp8": (32, 8), "nvfp4": (16, 4)}[name.split(".")[0]]
    return {"quantization": {"group_size": size, "bits": bits, "mode": name.split(".")[0]}}


def decoded(name: str) -> Array:
    return STORED[f"decoded.{name}.weight"].read()


def encoded(name: str, to: str = "") -> dict[str, Array]:
    """The stored tensors of a golden weight, of another name if one is given."""
    stem = to.removesuffix(".weight") or name
    return {f"{stem}.{part}": STORED[f"{name}.{part}"].read() for part in ("weight", "scales")}


def opened(tensors: Mapping[str, Array], folder: Path) -> dict[str, StoredTensor]:
    save_file(dict(tensors), folder / "weights.safetensors")
    return {tensor.name: tensor for tensor in open_safetensors(folder / "weights.safetensors").tensors}


def claimed(tensors: Mapping[str, Array], folder: Path, name: str) -> ScaledWeight:
    (weight,) = MLX_FLOATS.claim(opened(tensors, folder), config(name))
    return weight


@pytest.mark.parametrize("name", NAMES)
def test_values_are_those_of_mlx_to_the_bit(name: str, tmp_path: Path) -> None:
    weight = claimed(encoded(name), tmp_path, name)
    assert weight.kind == name.split(".")[0].upper()
    assert weight.sizes == decoded(name).shape
    assert read_rows(weight).tobytes() == decoded(name).tobytes()


@pytest.mark.parametrize("name", [name for name in NAMES if "experts" not in name])
@pytest.mark.parametrize("check", QUANTISED_CHECKS, ids=lambda check: check.__name__)
def test_golden_weights_conform(check: Callable[[StorageCase, Path], None], name: str, tmp_path: Path) -> None:
    check(StorageCase(MLX_FLOATS.claim, lambda to, _: encoded(name, to), decoded(name), config(name)), tmp_path)


def test_modes_of_layers_are_told_apart(tmp_path: Path) -> None:
    affine = {part: STORED[f"bits.4.{part}"].read() for part in ("weight", "scales", "biases")}
    tensors = {**encoded("mxfp4", "a"), **{f"b.{part}": tensor for part, tensor in affine.items()}}
    own = {"b": {"group_size": 32, "bits": 4, "mode": "affine"}}
    owners = claimed_weights(opened(tensors, tmp_path), {"quantization": {**config("mxfp4")["quantization"], **own}})
    assert {owner.name: owner.kind for owner in owners.values()} == {"a.weight": "MXFP4", "b.weight": "MLX4"}


Tensors = dict[str, Array]
FAULTS: dict[str, tuple[Callable[[Tensors], object], str]] = {
    "scales are short": (lambda t: t.update({"w.scales": t["w.scales"][1:]}), "not one for every 32 of a row"),
    "scales are narrow": (lambda t: t.update({"w.scales": t["w.scales"][:, 1:].copy()}), "not one for every 32"),
    "scales are floats": (lambda t: t.update({"w.scales": t["w.scales"].astype(np.float32)}), "not U8"),
    "codes are narrow": (lambda t: t.update({"w.weight": t["w.weight"][:, 1:].copy()}), "not one for every 32"),
    "codes are a vector": (lambda t: t.update({"w.weight": t["w.weight"].ravel()}), "not U32 of 2 or 3 axes"),
    "a scale is no number": (lambda t: t["w.scales"].__setitem__((1, 1), 255), "a scale is"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_broken_is_refused_by_name(fault: str, tmp_path: Path) -> None:
    change, words = FAULTS[fault]
    tensors = {key: tensor.copy() for key, tensor in encoded("mxfp4", "w").items()}
    change(tensors)
    with pytest.raises(MalformedError, match=words) as refused:
        read_rows(claimed(tensors, tmp_path, "mxfp4"))
    assert refused.value.file
    assert refused.value.tensor


@pytest.mark.parametrize("name", ["mxfp4", "mxfp8", "nvfp4.experts"])
def test_mutated_files_raise_nothing_but_our_errors(name: str, tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_file(encoded(name, "w"), path)

    def read(tensors: Mapping[str, StoredTensor]) -> None:
        for weight in MLX_FLOATS.claim(tensors, config(name)):
            values = read_block(weight, 0, weight.shape[0])
            if np.isfinite(values).all():
                weight.put(0, values * np.float32(0.5), np.empty_like(values))

    assert count_refused(path, 400, read)
