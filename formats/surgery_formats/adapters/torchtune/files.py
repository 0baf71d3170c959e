# SPDX-License-Identifier: Apache-2.0
"""torchtune's files, and its names for the modules of a language model."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from surgery_formats.files.places import is_folder, names_in

__all__ = ["HEADS", "KEY", "MODULES", "TENSOR_FILE", "UNPAIRED", "own_file"]

TENSOR_FILE = "adapter_model.pt"
KEY = re.compile(r"(?P<module>(?:[^.]+\.)*?[^.]+)\.(?P<leaf>lora_a\.weight|lora_b\.weight|magnitude)")
MODULES: Mapping[str, str] = {
    "attn.q_proj": "self_attn.q_proj",
    "attn.k_proj": "self_attn.k_proj",
    "attn.v_proj": "self_attn.v_proj",
    "attn.output_proj": "self_attn.o_proj",
    "mlp.w1": "mlp.gate_proj",
    "mlp.w2": "mlp.down_proj",
    "mlp.w3": "mlp.up_proj",
}
"""Modules of a layer and transformers' names for them."""
HEADS: Mapping[str, Literal["queries", "keys"]] = {"attn.q_proj": "queries", "attn.k_proj": "keys"}
UNPAIRED = ("qwen2", "qwen3", "phi3")
"""Models whose rows torchtune leaves as transformers has them."""

_OWN = re.compile(r"adapter_(model|\d+)\.pt")
_PEFT = ("adapter_model.safetensors", "adapter_model.bin")


def own_file(path: Path) -> Path | None:
    """The file that `path` is, or torchtune's latest in a folder; None in a folder with PEFT's weights, which are as good."""
    if not is_folder(path):
        return path if path.suffix in (".pt", ".pth", ".bin", ".safetensors") else None
    try:
        names = names_in(path)
    except OSError:
        return None
    found = [name for name in names if _OWN.fullmatch(name)]
    if not found or any(name in names for name in _PEFT):
        return None
    return path / max(found, key=lambda name: (name == TENSOR_FILE, len(name), name))
