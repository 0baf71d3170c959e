# SPDX-License-Identifier: Apache-2.0
"""Names of a compact adapter's files, and what tells it from other formats."""

from __future__ import annotations

__all__ = ["CONFIG_FILE", "MARK", "TENSOR_FILE", "VERSION"]

CONFIG_FILE = "compact.json"
TENSOR_FILE = "adapter.safetensors"
MARK = "surgery-compact"
VERSION = 1
