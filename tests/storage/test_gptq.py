# SPDX-License-Identifier: Apache-2.0
"""Weights as gptqmodel, auto-gptq and auto-round encode them are read to the bit, put back to the byte, and refused by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from surgery_formats.arrays import Array, cast
from surgery_formats.containers.safetensors import open_safetensors
from surgery_formats.dtypes import DType
from surgery_formats.storage.base import read_rows
from surgery_formats.storage.gptq import GPTQ
from surgery_formats.storage.grouped_rows import GroupedRows
from surgery_formats.tensors.tensor import StoredTensor
from surgery_formats.testing.storage import QUANTISED_CHECKS, StorageCase

GOLDEN = Path(__file__).parent / "golden" / "gptq.safetensors"
STORED = {tensor.name: tensor for tensor in open_safetensors(GOLDEN).tensors}
DECODED = {name.removeprefix("decoded."): tensor for name, tensor in STORED.items() if name.startswith("decoded.")}
NAMES = [name.removesuffix(".weight") for name in DECODED]
METHODS = {
    "v1": {"quant_method": "gptq", "checkpoint_format": "gptq", "meta": {"quantizer": ["gptqmodel:7.7.0"]}},
    "v2": {"quant_method": "gptq", "checkpoint_format": "gptq_v2"},
    "old": {"quant_method": "gptq"},
    "round.v1": {"quant_method": "auto-round", "packing_format": "auto_round:auto_gptq"},
    "round.v2": {"quant_method": "auto-round", "packing_format": "auto_round"},
}
BITS = {name: next(int(part) for part in name.split(".") if part.isdigit()) for name in NAMES}
SIZES = {"v2.4": 64, "v2.4.short": 64, "v2.4.128": 128, "v1.4.all": -1, "v2.8": -1, "v2.2": 16, "v2.3": 64, "old.8": 64}
SYMMETRIC = ("v1.4", "v1.4.static", "v2.4.128", "v2.2", "v2.3", "v1.8", "old.2", "old.3")


def config(name: str, **more: Any) -> dict[str, Any]:
    method = next(METHODS[key] for key in sorted(METHODS, reverse=True) if name.startswith(key))
    acts = "act" in name or "static" in name
    said = {"bits": BITS[name], "group_size": SIZES.get(name, 32), "desc_act": acts, "sym": name in SYMMETRIC}
    return {"quantization_config": {**method, **said, **more}}


def encoded(name: str, to: str = "") -> dict[str, Array]:
    """The stored tensors of a golden weight, of another name if one is given; without a g_idx that says nothing."""
    parts = {key.removeprefix(name): tensor.read() for key, tensor in STORED.items() if key.rpartition(".")[0] == name}
    if ".g_idx" in parts and not config(name)["quantization_config"]["desc_act"]:
        del parts[".g_idx"]
    return {(to.removesuffix(".weight") or name) + ending: tensor for ending, tensor in parts.items()}


def opened(tensors: Mapping[str, Array], folder: Path) -> dict[str, StoredTensor]:
    path = folder / "weights.safetensors"
    save_file({name: np.asarray(tensor, order="C") for name, tensor in tensors.items()}, path)
    return {tensor.name: tensor for tensor in open_safetensors(path).tensors}


def claimed(tensors: Mapping[str, Array], folder: Path, name: str, **more: Any) -> GroupedRows:
    (weight,) = GPTQ.claim(opened(tensors, folder), config(name, **more))
    return weight


@pytest.mark.parametrize("name", NAMES)
def test_values_are_those_of_the_program_that_encoded_them(name: str, tmp_path: Path) -> None:
    own = {key: tensor for key, tensor in STORED.items() if key.rpartition(".")[0] == name}
    (weight,) = GPTQ.claim(own, config(name))
    wanted = DECODED[f"{name}.weight"].read()
    assert weight.kind == f"GPTQ{BITS[name]}"
    assert weight.sizes == wanted.shape[::-1]
    assert [source.name for source in weight.sources] == [
        f"{name}.{part}" for part in ("qweight", "qzeros", "scales", "g_idx") if f"{name}.{part}" in own
    ]
    values = cast(read_rows(weight), DType.of(wanted.dtype)).T
    assert np.array_equal(values, wanted)
    if wanted.dtype == np.float32:  # others are a layer's outputs, sums in which -0 becomes 0
        assert values.tobytes() == wanted.tobytes()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("check", QUANTISED_CHECKS, ids=lambda check: check.__name__)
def test_golden_weights_conform(check: Callable[[StorageCase, Path], None], name: str, tmp_path: Path) -> None:
    (weight,) = GPTQ.claim({key: STORED[key] for key in STORED if key.rpartition(".")[0] == name}, config(name))
    check(StorageCase(GPTQ.claim, lambda to, values: encoded(name, to), read_rows(weight), config(name)), tmp_path)
