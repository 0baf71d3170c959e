# SPDX-License-Identifier: Apache-2.0
"""Weights that an export wrote as codes, decoded as onnxruntime's documentation says, and models that have these weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.numpy import load_file

from tests.oracles import recipes
from tests.support.sessions import open_session

__all__ = ["decoded", "with_values"]

Array = np.ndarray[Any, Any]


def _codes(raw: Array, bits: int) -> Array:
    rows = raw.reshape(len(raw), -1)
    return rows if bits == 8 else np.stack([rows & 15, rows >> 4], -1).reshape(len(raw), -1)


def _floats(folder: Path, name: str, block: int) -> Array:
    with safe_open(folder / "quantised.safetensors", "pt") as file:
        codes, scales = (file.get_tensor(f"{name}.{part}") for part in ("codes", "scales"))
    scales = scales.repeat_interleave(block, 1)[:, : codes.shape[1]] if block else scales[:, None]
    found: Array = (codes.float() * scales).numpy()
    return found


def decoded(folder: Path) -> dict[str, Array]:
    """``(out, blocks * block)`` float32 of every coded weight of an export, by its stored name."""
    _, contract = open_session(folder / "model.onnx")
    tensors = (
        {} if all("type" in entry for entry in contract.quantised) else load_file(folder / "quantised.safetensors")
    )
    values = {}
    for entry in contract.quantised:
        bits, block = entry["bits"], entry["block"]
        for name in entry["weights"]:
            if "type" in entry:
                values[name] = _floats(folder, name, block)
                continue
            codes, scales = _codes(tensors[f"{name}.codes"], bits), tensors[f"{name}.scales"]
            zeros = np.full(scales.shape, 1 << (bits - 1))
            if not entry["symmetric"]:
                zeros = _codes(tensors[f"{name}.zero_points"], bits)[:, : scales.shape[1]]
            shifted = codes.astype(np.float32) - np.repeat(zeros, block, 1).astype(np.float32)
            values[name] = shifted * np.repeat(scales.astype(np.float32), block, 1)
    return values


def with_values(name: str, base: Path, values: dict[str, Array], *, table: bool = True) -> Any:
    """Transformers' model of `base` with these weights; without `table` lookups keep the base's."""
    model = recipes.load(name, base)
    tied = model.get_output_embeddings() is not None and (
        model.get_output_embeddings().weight is model.get_input_embeddings().weight
    )
    if tied and not table:
        model.get_output_embeddings().weight = torch.nn.Parameter(model.get_input_embeddings().weight.detach().clone())
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for key, found in values.items():
        spelt = (key, key.replace("embed_out", "lm_head"), key.partition(".")[2], f"model.{key}", f"transformer.{key}")
        parameter = next((parameters[one] for one in spelt if one in parameters), None)
        assert parameter is not None, key
        if not table and parameter is model.get_input_embeddings().weight:
            parameter = model.get_output_embeddings().weight
        turned = "gpt2" in name and "wte" not in key
        matrix = found[:, : parameter.shape[0]].T if turned else found[:, : parameter.shape[1]]
        with torch.no_grad():
            parameter.copy_(torch.from_numpy(matrix.copy()))
    return model
