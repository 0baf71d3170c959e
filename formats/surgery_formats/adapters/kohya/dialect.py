# SPDX-License-Identifier: Apache-2.0
"""How kohya's files spell: flattened modules behind ``lora_unet_`` and the like, an alpha for each."""

from __future__ import annotations

from surgery_formats.adapters.grammar.dialect import Dialect
from surgery_formats.adapters.grammar.leaves import LORA_SPELLINGS
from surgery_formats.adapters.grammar.spelling import FLAT

__all__ = ["DIALECT"]

_DOWN, _UP = LORA_SPELLINGS["lora_down"]

DIALECT = Dialect(
    name="kohya",
    prefixes=FLAT,
    own=tuple(prefix.text for prefix in FLAT),
    # Of every denoiser, as musubi-tuner has it. Which number a text encoder has depends on the pipeline: `write` knows.
    written={"unet": "lora_unet_"},
    leaves={"down": _DOWN, "up": _UP},
)
