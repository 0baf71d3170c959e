# SPDX-License-Identifier: Apache-2.0
"""Names of an MLX-LM adapter's files, by which it is told from other formats."""

from __future__ import annotations

__all__ = ["TENSOR_FILE"]

TENSOR_FILE = "adapters.safetensors"
