# SPDX-License-Identifier: Apache-2.0
"""Merges into bases that transformers saved with torchao, whose weights' classes are in the metadata of the file."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import surgery
from surgery_formats.arrays import Array, cast
from surgery_formats.dtypes import DType
from surgery_formats.models.checkpoint import open_checkpoint
from surgery_formats.storage.base import read_rows
from tests.support.kit import ROOT

LORA = ROOT / "examples" / "lora"
QUERY = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """The shipped base as Int8WeightOnlyConfig leaves it."""
    folder = shutil.copytree(ROOT / "examples" / "base", tmp_path / "base")
    tensors: dict[str, Array] = {n: t.read() for n, t in open_checkpoint(folder).main.tensors.items()}
    metadata = {
        "format": "pt",
        "tensor_names": json.dumps(list(tensors)),
        **dict.fromkeys(tensors, '{"_type": "Tensor"}'),
    }
    for name in [name for name in tensors if "_proj" in name]:
        values, stem = cast(tensors.pop(name), DType.F32), name.removesuffix("weight") + "_weight_"
        scales = abs(values).max(axis=1, keepdims=True) / np.float32(127.5)
        codes = np.rint(values / scales).clip(-128, 127).astype(np.int8)
        tensors |= {stem + "qdata": codes, stem + "scale": scales, stem + "zero_point": np.zeros_like(scales, np.int8)}
        dtype = {"_type": "torch.dtype", "_data": "bfloat16"}
        fields = {"act_quant_kwargs": None, "block_size": [1, values.shape[1]], "dtype": dtype}
        told = {"_type": "Int8Tensor", "_data": fields, "_tensor_data_names": ["zero_point", "qdata", "scale"]}
        metadata[name] = json.dumps(told)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "torchao",
        "quant_type": {"default": {"_type": "Int8WeightOnlyConfig"}},
    }
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", metadata)
    return folder


def metadata_of(folder: Path) -> dict[str, str]:
    with safe_open(folder / "model.safetensors", "np") as file:
        return dict(file.metadata())


def values_of(folder: Path) -> dict[str, Array]:
    return {n: cast(read_rows(p.storage), DType.F32) for n, p in open_checkpoint(folder).main.parameters.items()}


def test_a_merge_leaves_nothing_of_torchao(base: Path, tmp_path: Path) -> None:
    surgery.merge(base, LORA, output=tmp_path / "out")
    merged = open_checkpoint(tmp_path / "out").main
    assert "quantization_config" not in merged.config
    assert metadata_of(tmp_path / "out") == {"format": "pt"}
    plain = open_checkpoint(ROOT / "examples" / "base").main
    assert {n: (t.dtype, t.shape) for n, t in merged.tensors.items()} == {
        n: (t.dtype, t.shape) for n, t in plain.tensors.items()
    }


def test_a_merge_that_requantises_keeps_the_format(base: Path, tmp_path: Path) -> None:
    surgery.merge(base, LORA, output=tmp_path / "out", quantized="requantize")
    surgery.merge(base, LORA, output=tmp_path / "exact", dtype="fp32")
    assert metadata_of(tmp_path / "out") == metadata_of(base)
    before, after = open_checkpoint(base).main, open_checkpoint(tmp_path / "out").main
    assert after.config == before.config
    assert list(after.tensors) == list(before.tensors)
    step = np.repeat(before.tensors[QUERY.removesuffix("weight") + "_weight_scale"].read(), 128, axis=1)
    exact, written = values_of(tmp_path / "exact")[QUERY], values_of(tmp_path / "out")[QUERY]
    assert not np.array_equal(written, values_of(base)[QUERY])
    inside = abs(exact) <= 127 * step
    assert (abs(written - exact) <= np.where(inside, 2.5 * step, np.inf)).all()  # errors are fed back along a row


def test_a_merge_of_which_some_weights_stay_quantised_tells_the_classes_of_these(base: Path, tmp_path: Path) -> None:
    lora = shutil.copytree(LORA, tmp_path / "lora")
    factors = load_file(lora / "adapter_model.safetensors")
    save_file({n: f for n, f in factors.items() if ".layers.0." in n}, lora / "adapter_model.safetensors")
    surgery.merge(base, lora, output=tmp_path / "out", only_touched=True)
    merged = open_checkpoint(tmp_path / "out").main
    told, before = metadata_of(tmp_path / "out"), metadata_of(base)
    coded = {name for name, each in merged.parameters.items() if each.storage.elements is None}
    assert 0 < len(coded) < sum('"Int8Tensor"' in value for value in before.values())
    assert {name for name, value in told.items() if '"Int8Tensor"' in value} == coded
    assert told.keys() == before.keys()
    assert all(told[name] == before[name] for name in coded)
