# SPDX-License-Identifier: Apache-2.0
"""Adapters to combine, and what their sum is by dense arithmetic."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from tests.support.adapter_files import (
    draw,
    write_peft,
)

__all__ = ["Arrays", "OneLayer", "Q", "best", "lora", "simple", "total"]

Q = "base_model.model.model.layers.0.self_attn.q_proj"

Arrays = dict[str, np.ndarray]


class OneLayer(torch.nn.Module):
    """The least that PEFT can put an adapter on."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj = torch.nn.Linear(48, 40, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.q_proj(x)


def lora(folder: Path, seed: int, rank: int, shapes: dict[str, tuple[int, int]], **config: object) -> Path:
    """A PEFT LoRA on `shapes` of layer 0."""
    tensors = {}
    for number, (module, (out, inputs)) in enumerate(sorted(shapes.items())):
        stem = f"base_model.model.model.layers.0.{module}"
        tensors[f"{stem}.lora_A.weight"] = draw(seed + 2 * number, rank, inputs)
        tensors[f"{stem}.lora_B.weight"] = draw(seed + 2 * number + 1, out, rank)
    return write_peft(folder, tensors, **{"r": rank, "lora_alpha": 2 * rank, **config})


def simple(folder: Path, seed: int = 1, rank: int = 3, **config: object) -> Path:
    return lora(folder, seed, rank, {"self_attn.q_proj": (24, 32)}, **config)


def total(deltas: list[tuple[Arrays, float]]) -> tuple[Arrays, dict[str, float]]:
    """The weighted sum by module, and the norms of the terms added up."""
    names = {name for one, _ in deltas for name in one}
    wanted = {n: sum((w * one[n] for one, w in deltas if n in one), np.zeros(())) for n in names}
    sizes = {n: sum(abs(w) * float(np.linalg.norm(one[n])) for one, w in deltas if n in one) for n in names}
    return wanted, sizes


def best(wanted: np.ndarray, rank: int) -> float:
    """Error of the best approximation of a rank."""
    return float(np.linalg.norm(np.linalg.svd(wanted, compute_uv=False)[rank:]))
