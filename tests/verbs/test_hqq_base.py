# SPDX-License-Identifier: Apache-2.0
"""Merges into bases that hqq quantised: 16 bits under the names of the model's code by default, or the same tensors."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

import surgery
from surgery_formats.arrays import Array, cast
from surgery_formats.dtypes import DType
from surgery_formats.models.checkpoint import open_checkpoint
from surgery_formats.storage.base import read_rows
from tests.support.kit import ROOT

LORA = ROOT / "examples" / "lora"
QUERY = "model.layers.0.self_attn.q_proj"
GROUP = 64


def hqq4(stem: str, values: Array, axis: int) -> dict[str, Array]:
    """The tensors of `HQQLinear.state_dict`, 4 bits, on scales from the least to the greatest value."""
    grouped = values.reshape((-1, GROUP) if axis == 1 else (GROUP, -1))
    least, greatest = grouped.min(axis=axis, keepdims=True), grouped.max(axis=axis, keepdims=True)
    scale = ((greatest - least) / 15).astype(np.float16)
    zero = (-least / scale).astype(np.float16)
    codes = np.rint(grouped / scale + zero).clip(0, 15).astype(np.uint8)
    half = len(codes) // 2
    settings = {"nbits": 4, "group_size": GROUP, "axis": axis}
    flags = ("view_as_float", "quant_scale", "quant_zero", "offload_meta", "encoded_state_dict")
    return {
        f"{stem}.W_q": codes[:half] << 4 | codes[half:],
        f"{stem}.scale": scale,
        f"{stem}.zero": zero,
        f"{stem}.shape": np.array(values.shape),
        f"{stem}.packing": np.frombuffer(b"4bit_u8", np.uint8),
        f"{stem}.compute_dtype": np.frombuffer(b"torch.float16", np.uint8),
        **{f"{stem}.{key}": np.array(number, np.int32) for key, number in settings.items()},
        **{f"{stem}.{key}": np.array(key == "encoded_state_dict", np.uint8) for key in flags},
    }


@pytest.fixture(params=[1, 0], ids=["axis 1", "axis 0"])
def base(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    folder = shutil.copytree(ROOT / "examples" / "base", tmp_path / "base")
    tensors: dict[str, Array] = {n: t.read() for n, t in open_checkpoint(folder).main.tensors.items()}
    for name in [name for name in tensors if "_proj" in name]:
        tensors |= hqq4(name.removesuffix(".weight"), cast(tensors.pop(name), DType.F32), request.param)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "hqq", "quant_config": {}, "skip_modules": ["lm_head"]}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_a_merge_stores_16_bits_and_leaves_nothing_of_the_codec(base: Path, tmp_path: Path) -> None:
    surgery.merge(base, LORA, output=tmp_path / "out")
    surgery.merge(base, LORA, output=tmp_path / "exact", dtype="fp32")
    merged, exact = open_checkpoint(tmp_path / "out").main, open_checkpoint(tmp_path / "exact").main
    plain = open_checkpoint(ROOT / "examples" / "base").main
    assert "quantization_config" not in merged.config
    assert {n: (t.dtype, t.shape) for n, t in merged.tensors.items()} == {
        n: (t.dtype, t.shape) for n, t in plain.tensors.items()
    }
    for name, tensor in merged.tensors.items():
        assert np.array_equal(tensor.read(), cast(exact.tensors[name].read(), DType.BF16)), name


def test_a_merge_that_requantises_keeps_every_setting(base: Path, tmp_path: Path) -> None:
    surgery.merge(base, LORA, output=tmp_path / "out", quantized="requantize")
    before, after = open_checkpoint(base).main, open_checkpoint(tmp_path / "out").main
    assert list(after.tensors) == list(before.tensors)
    moved = {n for n, t in after.tensors.items() if t.read().tobytes() != before.tensors[n].read().tobytes()}
    assert {name.rpartition(".")[2] for name in moved} <= {"W_q", "scale", "zero"}  # new ones where they are better
    assert f"{QUERY}.W_q" in moved
    values = [read_rows(each.parameters[f"{QUERY}.weight"].storage) for each in (before, after)]
    assert 0 < abs(values[1] - values[0]).max() < 0.5
