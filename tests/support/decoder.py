# SPDX-License-Identifier: Apache-2.0
"""LoRAs of a decoder of two layers, by the sizes of its modules."""

from __future__ import annotations

import numpy as np

from tests.support.adapter_files import draw

__all__ = ["DOWN", "MODULES", "PROJECTIONS", "ROOT", "TARGETS", "Q", "lora_of"]

ROOT = "base_model.model.model.layers"


def lora_of(seed: int, modules: dict[str, tuple[int, int]], rank: int = 2, **ranks: int) -> dict[str, np.ndarray]:
    tensors = {}
    for number, (module, (out, inputs)) in enumerate(modules.items()):
        own = ranks.get(module.rpartition(".")[2], rank)
        tensors[f"{ROOT}.{module}.lora_A.weight"] = draw(seed + number, own, inputs)
        tensors[f"{ROOT}.{module}.lora_B.weight"] = draw(seed + 50 + number, out, own)
    return tensors


Q, DOWN = "0.self_attn.q_proj", "1.mlp.down_proj"
MODULES = {Q: (6, 6), DOWN: (6, 8)}
TARGETS = ["q_proj", "down_proj"]
PROJECTIONS = {"self_attn.q_proj": (6, 6), "self_attn.k_proj": (4, 6), "mlp.down_proj": (6, 8)}
