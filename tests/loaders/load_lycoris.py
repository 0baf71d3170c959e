# SPDX-License-Identifier: Apache-2.0
"""lycoris-lora: its modules made of a kohya file, in the forward of diffusers' denoiser."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
from denoiser_families import given
from loading import Found, run
from lycoris import create_lycoris_from_weights
from lycoris.wrapper import LycorisNetwork
from safetensors.torch import load_file

LycorisNetwork.LORA_PREFIX = "lora_unet"  # sd-scripts', whose network module sets it too


def opened(base: Path) -> Callable[[Path | None], Found]:
    index = json.loads((base / "model_index.json").read_text())
    part = "unet" if "unet" in index else "transformer"

    def load(adapter: Path | None) -> Found:
        kind: Any = getattr(diffusers, index[part][1])
        model = kind.from_pretrained(base, subfolder=part, torch_dtype=torch.float32).eval()
        if adapter is not None:
            network, tensors = create_lycoris_from_weights(1.0, "", model, load_file(adapter))
            missing = {name.split(".")[0] for name in tensors} - {lora.lora_name for lora in network.loras}
            if missing:
                raise ValueError(f"not taken: {sorted(missing)}")
            network.apply_to()
        with torch.no_grad():
            return {"predicted": model(**given(model), return_dict=False)[0]}

    return load


if __name__ == "__main__":
    run(opened, "lycoris_lora", "diffusers")
