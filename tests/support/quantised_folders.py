# SPDX-License-Identifier: Apache-2.0
"""Models quantised as the formats define it, by plain torch and not by the codecs under test: one encoder per format."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

Encoder = Callable[[str, torch.Tensor], Mapping[str, torch.Tensor]]

NF4 = torch.tensor([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
])  # fmt: skip


def nf4(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """bitsandbytes, blocks of 64, scales in float32; the size must be a multiple of 64."""
    blocks = weight.float().reshape(-1, 64)
    absmax = blocks.abs().amax(1)
    codes = ((blocks / absmax.clamp(min=1e-38)[:, None])[..., None] - NF4).abs().argmin(-1).reshape(-1)
    state = {
        "quant_type": "nf4",
        "blocksize": 64,
        "dtype": "bfloat16",
        "shape": list(weight.shape),
    }
    raw = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    return {
        name: (codes[0::2] << 4 | codes[1::2]).to(torch.uint8)[:, None],
        f"{name}.absmax": absmax,
        f"{name}.quant_map": NF4.clone(),
        f"{name}.quant_state.bitsandbytes__nf4": raw,
    }


def int8(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """bitsandbytes LLM.int8: a scale per row."""
    scale = weight.float().abs().amax(1).clamp(min=1e-38)
    codes = (weight.float() * (127 / scale)[:, None]).round().to(torch.int8)
    stem = name.removesuffix(".weight")
    return {name: codes, f"{stem}.SCB": scale, f"{stem}.weight_format": torch.tensor(0, dtype=torch.uint8)}


BNB4: dict[str, Any] = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
FORMATS: dict[str, tuple[Encoder, dict[str, Any]]] = {
    "nf4": (nf4, BNB4),
    "int8": (int8, {"quant_method": "bitsandbytes", "load_in_8bit": True}),
}
"""By name: the encoder of a weight, and what config.json has of it."""


def quantise_folder(source: Path, folder: Path, format_name: str, parts: tuple[str, ...] = ("_proj",)) -> Path:
    """A copy of a model whose matrices with one of `parts` in their names are stored in a format."""
    encode, config = FORMATS[format_name]
    shutil.copytree(source, folder)
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        coded = tensor.ndim == 2 and any(part in name for part in parts)
        tensors |= encode(name, tensor) if coded else {name: tensor}
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    old = json.loads((source / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**old, "quantization_config": config}))
    return folder
