# SPDX-License-Identifier: Apache-2.0
"""Random soft prompts of every kind that is baked, beside what PEFT loads of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import torch

from tests.oracles import peft_oracle, recipes

__all__ = ["KINDS", "TOKENS", "attached"]

TOKENS = 5
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "prompt": ("PromptTuningConfig", {"num_virtual_tokens": TOKENS}),
    "p-tuning": ("PromptEncoderConfig", {"num_virtual_tokens": TOKENS, "encoder_hidden_size": 16}),
    "p-tuning-lstm": (
        "PromptEncoderConfig",
        {"num_virtual_tokens": TOKENS, "encoder_hidden_size": 16, "encoder_reparameterization_type": "LSTM"},
    ),
    "cpt": ("CPTConfig", {"cpt_token_ids": [3, 4, 5], "cpt_mask": [1, 1, 1], "cpt_tokens_type_mask": [1, 2, 3]}),
    "prefix": ("PrefixTuningConfig", {"num_virtual_tokens": TOKENS}),
    "prefix-projected": (
        "PrefixTuningConfig",
        {"num_virtual_tokens": TOKENS, "prefix_projection": True, "encoder_hidden_size": 16},
    ),
    "cartridge": ("CartridgeConfig", {"num_virtual_tokens": TOKENS}),
}


def attached(name: str, kind: str, folder: Path, **fields: Any) -> Any:
    """A base in ``folder/base``, a random prompt of it in ``folder/prompt``, and what PEFT loads of both."""
    (folder / "base").mkdir()
    recipes.build(name, folder / "base", **fields)
    config, options = KINDS[kind]
    with peft_oracle.quiet():
        wrapped = peft.get_peft_model(
            recipes.load(name, folder / "base"), getattr(peft, config)(task_type="CAUSAL_LM", **options)
        )
        peft_oracle.randomise(wrapped, torch.Generator().manual_seed(4))
        wrapped.save_pretrained(folder / "prompt")
        return peft.PeftModel.from_pretrained(recipes.load(name, folder / "base"), folder / "prompt").eval()
