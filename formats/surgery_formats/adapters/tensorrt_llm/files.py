# SPDX-License-Identifier: Apache-2.0
"""TensorRT-LLM's two arrays, and its numbers for the modules of a language model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

__all__ = ["CONFIG_FILE", "MODULES", "OTHER_MODULES", "TENSOR_FILE", "own_folder"]

TENSOR_FILE, CONFIG_FILE = "model.lora_weights.npy", "model.lora_config.npy"
MODULES: Mapping[int, str] = {
    0: "self_attn.qkv_proj",
    1: "self_attn.q_proj",
    2: "self_attn.k_proj",
    3: "self_attn.v_proj",
    4: "self_attn.o_proj",
    5: "mlp.gate_proj",
    6: "mlp.down_proj",
    7: "mlp.up_proj",
}
"""``LoraManager.LORA_MODULE_IDS`` and, by ``hf_modules_to_trtllm_modules``, transformers' names for them."""
OTHER_MODULES: Mapping[int, str] = {
    **dict.fromkeys(range(8, 13), "the attention to another text"),
    **dict.fromkeys(range(13, 16), "experts, and the file does not tell which"),
    **dict.fromkeys((16, 17), "a router"),
    18: "gate and up as one, whose order the file does not tell",
}
"""What is meant by the numbers that are not read."""


def own_folder(path: Path) -> Path:
    """The folder of both arrays, of which `path` may be one."""
    return path.parent if path.name in (TENSOR_FILE, CONFIG_FILE) else path
