# SPDX-License-Identifier: Apache-2.0
"""Tiny random models of every family with a recipe, and of every switch a recipe reads.

Norms and biases are random too: gains of one would hide a norm that is left out.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

from tests.oracles.recipes_dense import DENSE
from tests.oracles.recipes_encoders import ENCODERS
from tests.oracles.recipes_fields import VOCAB, Case
from tests.oracles.recipes_heads import HEADS
from tests.oracles.recipes_images import IMAGES, TOWERS
from tests.oracles.recipes_mixtures import MIXTURES
from tests.oracles.recipes_multimodal import MULTIMODAL
from tests.oracles.recipes_pairs import OWN_HEAD, PAIRS

__all__ = [
    "CASES",
    "DECODERS",
    "ENCODERS",
    "HEADS",
    "IMAGES",
    "MIXTURES",
    "PAIRS",
    "TOWERS",
    "VOCAB",
    "Case",
    "build",
    "load",
    "made",
]

transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

DECODERS: dict[str, Case] = {**DENSE, **MULTIMODAL, **MIXTURES}
CASES = {**DECODERS, **ENCODERS, **HEADS, **PAIRS, **IMAGES, **TOWERS}


def build(name: str, folder: Path, *, dtype: torch.dtype = torch.float32, **fields: Any) -> Path:
    """Write the random checkpoint `name` into `folder`, some fields of its configuration replaced."""
    model = made(name, **fields)
    model.to(dtype).save_pretrained(folder)
    return folder


def made(name: str, **fields: Any) -> Any:
    """The random model `name`, some fields of its configuration replaced."""
    case = CASES[name]
    config = getattr(transformers, case.config)(**{**case.fields, **fields})
    model = getattr(transformers, case.cls)(config)
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    centred = 0.0 if "gemma" in name or "nemotron" in name else 1.0  # the gain of these is 1 + g
    for key, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim >= 2 or key.endswith("bias"):
            value = 0.2 * noise
        else:
            value = centred + 0.3 * noise
        parameter.data.copy_(value)
    if name in OWN_HEAD:
        model.lm_head.weight = torch.nn.Parameter(0.2 * torch.randn(model.lm_head.weight.shape, generator=generator))
    if hasattr(model, "final_logits_bias"):
        model.final_logits_bias.copy_(torch.randn(model.final_logits_bias.shape, generator=generator))
    for key, buffer in model.named_buffers():
        if key.endswith("e_score_correction_bias"):
            buffer.copy_(0.2 * torch.randn(buffer.shape, generator=generator))
    return model


def load(name: str, folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The model of `folder` as transformers loads it, strictly, with attention spelt out.

    Spelt out, Falcon adds its bias on the scores twice: with the mask and beside it.
    """
    case = CASES[name]
    model, info = getattr(transformers, case.cls).from_pretrained(
        folder, dtype=dtype, output_loading_info=True, attn_implementation="sdpa" if name == "falcon_rw" else "eager"
    )
    wrong = {key: value for key, value in info.items() if value}
    if wrong:
        raise AssertionError(f"{name}: the checkpoint does not load cleanly: {wrong}")
    return model.eval()
