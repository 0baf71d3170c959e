# SPDX-License-Identifier: Apache-2.0
"""Merges into bases of GPTQ, AWQ and MLX: 16 bits by default, in the model's own order; the same format where that is wanted."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

import surgery
from surgery_formats.arrays import Array, cast
from surgery_formats.dtypes import DType
from surgery_formats.errors import FitError
from surgery_formats.models.checkpoint import open_checkpoint
from surgery_formats.storage.base import read_rows
from tests.support.kit import ROOT

BASE, LORA = ROOT / "examples" / "base", ROOT / "examples" / "lora"
DOWN = "model.layers.2.mlp.down_proj.weight"  # (128, 352)
Encoder = Callable[[str, Array], tuple[dict[str, Array], Array]]


def nibbles(codes: Array, order: tuple[int, ...] = tuple(range(8))) -> Array:
    """Eight codes of the last axis in each word."""
    words = np.zeros((*codes.shape[:-1], codes.shape[-1] // 8), np.uint32)
    for place, code in enumerate(order):
        words |= codes[..., code::8].astype(np.uint32) << (4 * place)
    return words


def signed(words: Array) -> Array:
    return np.ascontiguousarray(words).view(np.int32)


def grouped(weight: Array) -> tuple[Array, Array, Array, Array]:
    """Codes ``(out, in)``, scales and zero points ``(out, groups)`` of 32 inputs, and the values these stand for."""
    groups = weight.reshape(len(weight), -1, 32)
    low, high = np.minimum(groups.min(-1), 0), np.maximum(groups.max(-1), 0)
    scales = ((high - low) / 15).astype(np.float16)
    wide = scales.astype(np.float32)
    zeros = np.clip(np.rint(-low / wide), 1, 15)
    codes = np.clip(np.rint(groups / wide[..., None]) + zeros[..., None], 0, 15)
    values = (codes - zeros[..., None]) * wide[..., None]
    return codes.reshape(weight.shape).astype(np.uint8), scales, zeros.astype(np.uint8), values.reshape(weight.shape)


def gptq(name: str, weight: Array) -> tuple[dict[str, Array], Array]:
    stem = name.removesuffix("weight")
    codes, scales, zeros, values = grouped(weight)
    order = np.arange(weight.shape[1], dtype=np.int32) // 32
    parts = {"qweight": signed(nibbles(codes).T), "qzeros": signed(nibbles(zeros.T - 1))}
    return {stem + part: each for part, each in {**parts, "scales": scales.T, "g_idx": order}.items()}, values


def gptq_act(name: str, weight: Array) -> tuple[dict[str, Array], Array]:
    """Groups of inputs that are not together."""
    stem = name.removesuffix("weight")
    order = np.random.default_rng(0).permutation(weight.shape[1])
    codes, scales, zeros, values = grouped(weight[:, order])
    back = np.argsort(order)
    groups = (np.arange(weight.shape[1], dtype=np.int32) // 32)[back]
    parts = {"qweight": signed(nibbles(codes[:, back]).T), "qzeros": signed(nibbles(zeros.T))}
    rest = {"scales": scales.T, "g_idx": groups}
    return {stem + part: each for part, each in {**parts, **rest}.items()}, values[:, back]


def awq(name: str, weight: Array) -> tuple[dict[str, Array], Array]:
    stem, order = name.removesuffix("weight"), (0, 2, 4, 6, 1, 3, 5, 7)
    codes, scales, zeros, values = grouped(weight)
    parts = {"qweight": signed(nibbles(codes.T, order)), "qzeros": signed(nibbles(zeros.T, order)), "scales": scales.T}
    return {stem + part: tensor for part, tensor in parts.items()}, values


def mlx(name: str, weight: Array) -> tuple[dict[str, Array], Array]:
    stem = name.removesuffix("weight")
    groups = weight.reshape(len(weight), -1, 32)
    scales = cast((groups.max(-1) - groups.min(-1)) / np.float32(15), DType.BF16)
    biases = cast(groups.min(-1), DType.BF16)
    step, low = cast(scales, DType.F32)[..., None], cast(biases, DType.F32)[..., None]
    codes = np.clip(np.rint((groups - low) / step), 0, 15)
    values = (codes * step + low).reshape(weight.shape)
    words = nibbles(codes.reshape(weight.shape).astype(np.uint8))
    return {name: words, f"{stem}scales": scales, f"{stem}biases": biases}, values


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False}
FORMATS: dict[str, tuple[Encoder, str, dict[str, Any]]] = {
    "gptq": (gptq, "quantization_config", {**GPTQ, "desc_act": False, "checkpoint_format": "gptq"}),
    "gptq act": (gptq_act, "quantization_config", {**GPTQ, "desc_act": True, "checkpoint_format": "gptq_v2"}),
    "awq": (awq, "quantization_config", {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}),
    "mlx": (mlx, "quantization", {"bits": 4, "group_size": 32}),
}
KINDS = {"gptq": "GPTQ4", "gptq act": "GPTQ4", "awq": "AWQ4", "mlx": "MLX4"}


@pytest.fixture(params=FORMATS)
def base(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Path, Path]:
    """The shipped base with its projections quantised, and the same with what they stand for in float32."""
    encode, key, said = FORMATS[request.param]
    tensors = {name: tensor.read() for name, tensor in open_checkpoint(BASE).main.tensors.items()}
    plain: dict[str, Array] = {}
    for name in [name for name in tensors if "_proj" in name]:
        parts, plain[name] = encode(name, cast(tensors.pop(name), DType.F32))
        tensors |= parts
    for folder in ("coded", "plain"):
        shutil.copytree(BASE, tmp_path / folder)
    config = json.loads((BASE / "config.json").read_text())
    (tmp_path / "coded" / "config.json").write_text(json.dumps({**config, key: said}))
    kept = {name: tensor for name, tensor in tensors.items() if "_proj" not in name}
    for folder, stored in (("coded", tensors), ("plain", {**kept, **plain})):
        own = {name: np.ascontiguousarray(tensor) for name, tensor in stored.items()}
        save_file(own, tmp_path / folder / "model.safetensors", {"format": "pt"})
    return request.param, tmp_path / "coded", tmp_path / "plain"


def stored(folder: Path) -> dict[str, Array]:
    return {name: tensor.read() for name, tensor in open_checkpoint(folder).main.tensors.items()}


def test_the_base_is_read_as_what_it_stands_for(base: tuple[str, Path, Path]) -> None:
    name, coded, plain = base
    weights, wanted = (open_checkpoint(folder).main.parameters for folder in (coded, plain))
    assert set(weights) == set(wanted)
    assert weights[DOWN].storage.kind == KINDS[name]
    for each in weights:
        assert weights[each].shape == wanted[each].shape
        assert np.array_equal(weights[each].get(), wanted[each].get()), each


def test_a_merge_is_that_into_the_numbers_it_stands_for(base: tuple[str, Path, Path], tmp_path: Path) -> None:
    _, coded, plain = base
    surgery.merge(coded, LORA, output=tmp_path / "merged")
    surgery.merge(plain, LORA, output=tmp_path / "wanted", dtype="bf16")
    merged, wanted = stored(tmp_path / "merged"), stored(tmp_path / "wanted")
    assert set(merged) == set(wanted)
    for name, tensor in merged.items():
        assert tensor.dtype == wanted[name].dtype
        assert tensor.tobytes() == wanted[name].tobytes(), name
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert not config.keys() & {"quantization_config", "quantization"}


def test_a_requantised_merge_keeps_its_format(base: tuple[str, Path, Path], tmp_path: Path) -> None:
    _, coded, plain = base
    surgery.merge(coded, LORA, output=tmp_path / "merged", quantized="requantize")
    before, after = stored(coded), stored(tmp_path / "merged")
    assert {each: (tensor.dtype, tensor.shape) for each, tensor in before.items()} == {
        each: (tensor.dtype, tensor.shape) for each, tensor in after.items()
    }
    surgery.merge(plain, LORA, output=tmp_path / "wanted")
    old, new, meant = (
        read_rows(open_checkpoint(folder).main.parameters[DOWN].storage)
        for folder in (coded, tmp_path / "merged", tmp_path / "wanted")
    )
    assert not np.array_equal(old, new)
    assert np.linalg.norm(new - meant) < 1.2 * np.linalg.norm(old - meant)
    copied = [each for each in before if each.endswith(("g_idx", "layernorm.weight"))]
    assert all(np.array_equal(before[each], after[each]) for each in copied)


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, "gptq, marlin, 4 bits"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv_fast"}, "awq, gemv_fast, 4 bits"),
        ({"quant_method": "gptq", "bits": 4, "rotation": "quarot"}, "gptq, rotated, 4 bits"),
    ],
)
def test_what_is_packed_for_one_kernel_is_refused_by_name(said: dict[str, Any], words: str, tmp_path: Path) -> None:
    shutil.copytree(BASE, tmp_path / "coded")
    tensors = stored(BASE)
    for name in [name for name in tensors if "_proj" in name]:
        tensors |= awq(name, cast(tensors.pop(name), DType.F32))[0]
    config = json.loads((BASE / "config.json").read_text())
    (tmp_path / "coded" / "config.json").write_text(json.dumps({**config, "quantization_config": said}))
    own = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    save_file(own, tmp_path / "coded" / "model.safetensors", {"format": "pt"})
    assert words in str(surgery.inspect(tmp_path / "coded"))
    with pytest.raises(FitError, match=words):
        surgery.merge(tmp_path / "coded", LORA, output=tmp_path / "merged")
