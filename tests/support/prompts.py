# SPDX-License-Identifier: Apache-2.0
"""Soft prompts as PEFT saves them, of given numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.numpy import save_file

__all__ = ["write_prompt"]


def write_prompt(
    folder: Path, table: Any, kind: str = "", prefix: tuple[int, int, int] | None = None, **config: Any
) -> Path:
    """A folder of PEFT's with the rows `table`, or with keys and values of `prefix`: layers, heads and their size."""
    folder.mkdir(parents=True)
    written = {
        "peft_type": kind or ("PREFIX_TUNING" if prefix else "PROMPT_TUNING"),
        "task_type": "CAUSAL_LM",
        "num_virtual_tokens": len(table),
        "token_dim": prefix[1] * prefix[2] if prefix else table.shape[1],
        "num_transformer_submodules": 1,
        "num_attention_heads": prefix[1] if prefix else 4,
        "num_layers": prefix[0] if prefix else 2,
        "inference_mode": True,
        **config,
    }
    (folder / "adapter_config.json").write_text(json.dumps(written))
    save_file({"prompt_embeddings": table}, folder / "adapter_model.safetensors", {"format": "pt"})
    return folder
