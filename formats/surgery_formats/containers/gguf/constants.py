# SPDX-License-Identifier: Apache-2.0
"""Constants of the format (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md) and of its reference reader."""

from __future__ import annotations

__all__ = ["ALIGNMENT", "ALIGNMENT_KEY", "MAGIC", "NAME_LIMIT"]

MAGIC = b"GGUF"
ALIGNMENT = 32  # of a file that does not say another
ALIGNMENT_KEY = "general.alignment"
NAME_LIMIT = 63  # bytes of a tensor's name: GGML_MAX_NAME, with its final zero
