# SPDX-License-Identifier: Apache-2.0
"""Checkpoints in the form in which their makers publish them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

from tests.oracles import recipes

__all__ = ["dequantised", "published_gpt_oss"]


def published_gpt_oss(folder: Path) -> Path:
    """gpt-oss with its experts in MXFP4, as OpenAI publishes it."""
    base = recipes.build("gpt_oss", folder, hidden_size=32, intermediate_size=32)
    path, generator = base / "model.safetensors", torch.Generator().manual_seed(3)
    tensors = load_file(path)
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, inputs, outputs = tensors.pop(name).shape
        shape = (experts, outputs, inputs // 32)
        codes = torch.randint(0, 256, (*shape, 16), generator=generator, dtype=torch.uint8)
        scales = torch.randint(123, 126, shape, generator=generator, dtype=torch.uint8)
        tensors |= {f"{name}_blocks": codes, f"{name}_scales": scales}
    save_file(tensors, path, {"format": "pt"})
    config = json.loads((base / "config.json").read_text())
    kept = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": kept}
    (base / "config.json").write_text(json.dumps(config))
    return base


def dequantised(base: Path) -> Any:
    """Transformers' model of the numbers of a checkpoint in MXFP4."""
    floats = transformers.Mxfp4Config(dequantize=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        base, quantization_config=floats, dtype=torch.float32, attn_implementation="eager"
    )
    return model.eval()
