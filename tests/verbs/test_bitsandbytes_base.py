# SPDX-License-Identifier: Apache-2.0
"""Merges into bases that transformers saved with bitsandbytes: 16 bits by default, the same format where that is wanted."""

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
from surgery_formats.storage.bitsandbytes.four_bit import levels_of
from tests.support.kit import ROOT

LORA = ROOT / "examples" / "lora"
QUERY = "model.layers.0.self_attn.q_proj.weight"
CONFIGS = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "int8": {"load_in_8bit": True},
}


def quantised(folder: Path, kind: str, *, more: tuple[str, ...] = ()) -> Path:
    """The shipped base with its projections, and the weights called `more`, as bitsandbytes stores them."""
    shutil.copytree(ROOT / "examples" / "base", folder)
    tensors = {name: tensor.read() for name, tensor in open_checkpoint(folder).main.tensors.items()}
    for name in [name for name in tensors if "_proj" in name or name in more]:
        values = cast(tensors.pop(name), DType.F32)
        tensors |= int8(name, values) if kind == "int8" else four_bit(name, values, kind)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", **CONFIGS[kind]}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def int8(name: str, values: Array) -> dict[str, Array]:
    scales, stem = abs(values).max(axis=1), name.removesuffix("weight")
    codes = np.rint(values * (127 / scales)[:, None]).astype(np.int8)
    return {name: codes, f"{stem}SCB": scales, f"{stem}weight_format": np.zeros((), np.uint8)}


def four_bit(name: str, values: Array, kind: str) -> dict[str, Array]:
    levels, size = levels_of(kind), 64
    blocks = values.reshape(-1, size)
    scales = abs(blocks).max(axis=1)
    codes = levels.nearest(blocks / np.maximum(scales, 1e-38)[:, None]).reshape(-1)
    state = {"quant_type": kind, "blocksize": size, "dtype": "bfloat16", "shape": list(values.shape)}
    return {
        name: (codes[::2] << 4 | codes[1::2])[:, None],
        f"{name}.absmax": scales,
        f"{name}.quant_map": levels.values,
        f"{name}.quant_state.bitsandbytes__{kind}": np.frombuffer(json.dumps(state).encode(), np.uint8),
    }


def values_of(folder: Path) -> dict[str, Array]:
    parameters = open_checkpoint(folder).main.parameters
    return {name: cast(read_rows(each.storage), DType.F32) for name, each in parameters.items()}


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_merge_stores_16_bits_and_leaves_nothing_of_the_codec(kind: str, tmp_path: Path) -> None:
    base = quantised(tmp_path / "base", kind)
    surgery.merge(base, LORA, output=tmp_path / "out")
    surgery.merge(base, LORA, output=tmp_path / "exact", dtype="fp32")
    merged = open_checkpoint(tmp_path / "out").main
    assert "quantization_config" not in merged.config
    assert {tensor.dtype for tensor in merged.tensors.values()} == {DType.BF16}
    plain = open_checkpoint(ROOT / "examples" / "base").main
    assert {n: t.shape for n, t in merged.tensors.items()} == {n: t.shape for n, t in plain.tensors.items()}
    before, exact = values_of(base), values_of(tmp_path / "exact")
    assert not np.array_equal(exact[QUERY], before[QUERY])
    for name, values in values_of(tmp_path / "out").items():
        assert np.array_equal(values, cast(cast(exact[name], DType.BF16), DType.F32)), name


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_merge_that_requantises_to_nearest_takes_the_nearest_codes_on_the_scales_it_writes(
    kind: str, tmp_path: Path
) -> None:
    base = quantised(tmp_path / "base", kind)
    surgery.merge(base, LORA, output=tmp_path / "out", quantized="requantize", rounding="nearest")
    surgery.merge(base, LORA, output=tmp_path / "exact", dtype="fp32")
    before, after = open_checkpoint(base).main, open_checkpoint(tmp_path / "out").main
    assert after.config == before.config
    assert {n: (t.dtype, t.shape) for n, t in after.tensors.items()} == {
        n: (t.dtype, t.shape) for n, t in before.tensors.items()
    }
    exact, written = values_of(tmp_path / "exact"), values_of(tmp_path / "out")
    start = values_of(base)
    changed = [name for name, values in written.items() if not np.array_equal(values, start[name])]
    assert QUERY in changed
    stored = {part: tensor.read() for part, tensor in after.tensors.items()}
    for name in changed:
        every = numbers(name, kind, stored)
        best = abs(every - exact[name].reshape(-1, 1)).min(axis=1).reshape(exact[name].shape)
        assert (abs(written[name] - exact[name]) <= best + 1e-6 * abs(exact[name])).all(), name


def numbers(name: str, kind: str, stored: dict[str, Array]) -> Array:
    """Every number that a weight's elements can take, in float64."""
    if kind == "int8":
        steps = np.repeat(stored[name.removesuffix("weight") + "SCB"].astype(np.float64), stored[name].shape[1]) / 127
        return steps[:, None] * np.arange(-127, 128)
    return np.repeat(stored[f"{name}.absmax"].astype(np.float64), 64)[:, None] * levels_of(kind).values


def test_inspect_counts_weights_and_not_codes(tmp_path: Path) -> None:
    found = surgery.inspect(quantised(tmp_path / "base", "nf4"))
    assert found.components[0].parameters == surgery.inspect(ROOT / "examples" / "base").components[0].parameters
    assert "NF4" in str(found)


def test_a_head_that_is_tied_to_the_embedding_stays_so(tmp_path: Path) -> None:
    """transformers quantises neither: it leaves the head alone, and loads no tied head in 4 bits."""
    base = quantised(tmp_path / "base", "nf4")
    tensors = {name: tensor.read() for name, tensor in open_checkpoint(base).main.tensors.items()}
    save_file({n: t for n, t in tensors.items() if n != "lm_head.weight"}, base / "model.safetensors", {"format": "pt"})
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    for ways in ("dequantize", "requantize"):
        surgery.merge(base, LORA, output=tmp_path / ways, quantized=ways)
        merged = open_checkpoint(tmp_path / ways).main
        assert "lm_head.weight" not in merged.tensors
        assert merged.aliases["lm_head.weight"] == "model.embed_tokens.weight"
        same = merged.tensors["model.embed_tokens.weight"].read()
        assert same.tobytes() == tensors["model.embed_tokens.weight"].tobytes()


def test_a_head_and_an_embedding_in_4_bits_are_read_and_merged(tmp_path: Path) -> None:
    base = quantised(tmp_path / "base", "nf4", more=("lm_head.weight", "model.embed_tokens.weight"))
    found = open_checkpoint(base).main
    assert found.parameters[found.head].storage.kind == found.parameters[found.embedding].storage.kind == "NF4"
    surgery.merge(base, LORA, output=tmp_path / "out")
    merged, plain = open_checkpoint(tmp_path / "out").main, open_checkpoint(ROOT / "examples" / "base").main
    assert {n: (t.dtype, t.shape) for n, t in merged.tensors.items()} == {
        n: (t.dtype, t.shape) for n, t in plain.tensors.items()
    }
