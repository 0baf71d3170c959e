# SPDX-License-Identifier: Apache-2.0
"""Frequencies of rotary positions, from a family's parameters."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from surgery_formats.errors import FitError
from surgery_formats.models.families.recipe import Rope

__all__ = ["Frequencies", "frequencies"]


@dataclass(frozen=True)
class Frequencies:
    """Angles per position.

    Attributes:
        usual: Radians per position, ``(dims / 2,)``, float32.
        long: The same for sequences of more than `original` tokens (LongRoPE), or None.
        original: Number of tokens up to which `usual` applies.
        scaling: Factor of cosines and sines.
    """

    usual: np.ndarray
    long: np.ndarray | None = None
    original: int = 0
    scaling: float = 1.0


def frequencies(rope: Rope) -> Frequencies:
    """Angles per position of a model's rotary embedding.

    ``default``: arXiv:2104.09864; ``linear``: arXiv:2306.15595; ``dynamic``: as default up to `Rope.max_positions`;
    ``llama3``: Llama 3.1, arXiv:2407.21783; ``yarn``: arXiv:2309.00071; ``longrope``: arXiv:2402.13753.
    """
    p = rope.parameters
    kind, base, dims = p["rope_type"], float(p["rope_theta"]), rope.dims
    plain = base ** -(np.arange(0, dims, 2, dtype=np.float64) / dims)
    if kind in ("default", "dynamic"):
        return Frequencies(plain.astype(np.float32))
    if kind == "linear":
        return Frequencies((plain / p["factor"]).astype(np.float32))
    if kind == "llama3":
        return Frequencies(_llama3(plain, p).astype(np.float32))
    if kind == "yarn":
        return Frequencies(_yarn(plain, p, dims).astype(np.float32), scaling=_yarn_scaling(p))
    if kind == "longrope":
        original = int(p["original_max_position_embeddings"])
        short, long = (plain / np.array(p[key], np.float64) for key in ("short_factor", "long_factor"))
        return Frequencies(short.astype(np.float32), long.astype(np.float32), original, _longrope_scaling(p, original))
    raise FitError(f"rotary positions of type '{kind}' are not supported", file="config.json")


def _llama3(plain: np.ndarray, p: Mapping[str, Any]) -> np.ndarray:
    """Low frequencies are divided by the factor, high ones kept, and those between blended."""
    original, low, high = (
        p[key] for key in ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor")
    )
    turns = original * plain / (2 * math.pi)
    blend = np.clip((turns - low) / (high - low), 0.0, 1.0)
    mixed: np.ndarray = (1 - blend) * plain / p["factor"] + blend * plain
    return mixed


def _yarn(plain: np.ndarray, p: Mapping[str, Any], dims: int) -> np.ndarray:
    """As Llama 3, but blended over the index of the frequency."""

    def index_of(turns: float) -> float:
        length = p["original_max_position_embeddings"] / (turns * 2 * math.pi)
        return dims * math.log(length) / (2 * math.log(p["rope_theta"]))

    low, high = index_of(p["beta_fast"]), index_of(p["beta_slow"])
    if p["truncate"]:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dims - 1)
    if low == high:
        high += 0.001
    keep = 1 - np.clip((np.arange(dims // 2) - low) / (high - low), 0, 1)
    mixed: np.ndarray = plain / p["factor"] * (1 - keep) + plain * keep
    return mixed


def _yarn_scaling(p: Mapping[str, Any]) -> float:
    if p.get("attention_factor") is not None:
        return float(p["attention_factor"])

    def magnitude(weight: float) -> float:
        return 1.0 if p["factor"] <= 1 else 0.1 * weight * math.log(p["factor"]) + 1.0

    if p.get("mscale") and p.get("mscale_all_dim"):
        return magnitude(p["mscale"]) / magnitude(p["mscale_all_dim"])
    return magnitude(1.0)


def _longrope_scaling(p: Mapping[str, Any], original: int) -> float:
    if p.get("attention_factor") is not None:
        return float(p["attention_factor"])
    return 1.0 if p["factor"] <= 1 else math.sqrt(1 + math.log(p["factor"]) / math.log(original))
