# SPDX-License-Identifier: Apache-2.0
"""Tiny files that hold several networks, LoRAs for them, and merges of the two."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from surgery import merge
from tests.support.adapter_files import Arrays, draw

__all__ = ["UNET", "G", "L", "bfl", "delta", "loras", "merge_arrays", "merge_files", "sdxl"]

UNET = "model.diffusion_model."
G = "conditioner.embedders.1.model.transformer.resblocks.0."
L = "conditioner.embedders.0.transformer.text_model.encoder.layers.0."


def sdxl() -> Arrays:
    """Blocks, levels and text encoders of Stable Diffusion XL, each with a module or two."""
    blocks = [f"input_blocks.{n}.0.in_layers.2" for n in (1, 2, 4, 5)] + ["input_blocks.0.0", "input_blocks.3.0.op"]
    blocks += ["input_blocks.4.1.proj_in", "input_blocks.5.1.proj_in", "middle_block.1.proj_in", "label_emb.0.0"]
    tensors = {f"{UNET}{name}.weight": draw(at, 6, 4) for at, name in enumerate(blocks)}
    tensors[f"{L}mlp.fc1.weight"] = draw(20, 6, 4)
    tensors |= {f"{G}attn.in_proj_weight": draw(21, 12, 4), f"{G}mlp.c_fc.weight": draw(22, 6, 4)}
    tensors |= {"conditioner.embedders.1.model.text_projection": draw(23, 4, 6)}
    return tensors | {"first_stage_model.quant_conv.weight": draw(24, 2, 2), "alphas_cumprod": draw(25, 3)}


def loras(*modules: tuple[str, int, int]) -> Arrays:
    """A LoRA of rank 2 and alpha 1 on each ``(module, rows, columns)``, as kohya writes it."""
    found: Arrays = {}
    for at, (module, rows, columns) in enumerate(modules):
        found |= {f"{module}.lora_down.weight": draw(40 + at, 2, columns), f"{module}.alpha": np.ones((), np.float32)}
        found[f"{module}.lora_up.weight"] = draw(60 + at, rows, 2)
    return found


def delta(lora: Arrays, module: str) -> np.ndarray:
    """What `loras` adds to the weight of a module, ``(rows, columns)``."""
    change: np.ndarray = lora[f"{module}.lora_up.weight"] @ lora[f"{module}.lora_down.weight"] / 2
    return change


def merge_arrays(base: Arrays, lora: Arrays, folder: Path) -> Arrays:
    """Write both into the folder and merge them: the tensors of the output."""
    save_file(base, folder / "base.safetensors")
    save_file(lora, folder / "lora.safetensors")
    merge(folder / "base.safetensors", folder / "lora.safetensors", output=folder / "out")
    return load_file(folder / "out" / "base.safetensors")


def bfl() -> Arrays:
    """Blocks of Flux in Black Forest Labs' names, with a text encoder beside."""
    shapes = {"double_blocks.0.img_attn.qkv": 12, "double_blocks.0.img_attn.proj": 4, "single_blocks.0.linear1": 28}
    base = {f"{UNET}{name}.weight": draw(at, rows, 4) for at, (name, rows) in enumerate(shapes.items())}
    return base | {"text_encoders.clip_l.transformer.text_model.encoder.layers.0.mlp.fc1.weight": draw(9, 6, 4)}


def merge_files(folder: Path, adapter: str, out: str) -> Arrays:
    """Merge a file of the folder into its ``base.safetensors``: the tensors of the output."""
    merge(folder / "base.safetensors", folder / adapter, output=folder / out)
    return load_file(folder / out / "base.safetensors")
