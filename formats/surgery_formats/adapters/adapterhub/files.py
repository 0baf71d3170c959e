# SPDX-License-Identifier: Apache-2.0
"""Names of AdapterHub's files (adapters 1.3.0, ``utils.py``)."""

from __future__ import annotations

__all__ = ["CONFIG_FILE", "HEAD_CONFIG", "HEAD_FILES", "TENSOR_FILE", "WEIGHT_FILES"]

CONFIG_FILE = "adapter_config.json"
TENSOR_FILE = "adapter.safetensors"
WEIGHT_FILES = (TENSOR_FILE, "pytorch_adapter.bin")
HEAD_CONFIG = "head_config.json"
HEAD_FILES = ("model_head.safetensors", "pytorch_model_head.bin")
