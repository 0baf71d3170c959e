# SPDX-License-Identifier: Apache-2.0
"""A base of two layers, LoRAs of it, and what a merge of the checkpoint makes of both."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper
from safetensors.numpy import load_file, save_file

import surgery
from tests.support.graphs_by_value import random_weights

__all__ = ["PLACES", "SHAPES", "WEIGHTS", "lora", "merged_weights", "values_in"]

SHAPES = {
    **{f"model.layers.{n}.self_attn.{x}_proj.weight": (rows, 24) for n in range(2) for x, rows in (("q", 32), ("k", 16), ("v", 16))},
    **{f"model.layers.{n}.self_attn.o_proj.weight": (24, 32) for n in range(2)},
    **{f"model.layers.{n}.input_layernorm.weight": (24,) for n in range(2)},
}  # fmt: skip
WEIGHTS = random_weights(SHAPES)
PLACES = {short: f"model.layers.0.self_attn.{short}_proj.weight" for short in "qkvo"}


def lora(folder: Path, *shorts: str, layer: int = 0, seed: int = 1, size: float = 0.05) -> Path:
    """A LoRA of rank 2 on projections of a layer."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for short in shorts:
        name = f"model.layers.{layer}.self_attn.{short}_proj"
        rows, cols = WEIGHTS[f"{name}.weight"].shape
        tensors[f"base_model.model.{name}.lora_A.weight"] = rng.standard_normal((2, cols)).astype("f4") * size
        tensors[f"base_model.model.{name}.lora_B.weight"] = rng.standard_normal((rows, 2)).astype("f4")
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": [f"{s}_proj" for s in shorts]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def values_in(path: Path) -> dict[str, np.ndarray]:
    return {one.name: numpy_helper.to_array(one) for one in onnx.load(path).graph.initializer}


def merged_weights(base: Path, adapters: Any, folder: Path) -> dict[str, np.ndarray]:
    surgery.merge(base, adapters, output=folder)
    return load_file(folder / "model.safetensors")
