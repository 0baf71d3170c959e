# SPDX-License-Identifier: Apache-2.0
"""Rotary positions of every kind, straight from the papers, in float64."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from surgery_formats.models.families.recipe import Rope

__all__ = ["angles", "frequencies", "rotate"]


def frequencies(rope: Rope, length: int) -> tuple[torch.Tensor, float]:
    """Radians per position of each rotated pair, and the factor on cosine and sine.

    Args:
        rope: Its parameters.
        length: Longest sequence of the call, which ``dynamic`` and ``longrope`` depend on.

    Returns:
        ``(dims / 2,)`` in float64, and 1.0 unless the kind scales.
    """
    given = rope.parameters
    kind, theta = given["rope_type"], float(given["rope_theta"])
    pairs = torch.arange(rope.dims // 2, dtype=torch.float64) * 2 / rope.dims
    plain = torch.exp(-math.log(theta) * pairs)  # theta^(-2i/d), arXiv:2104.09864 section 3.2.2
    if kind == "default":
        return plain, 1.0
    if kind == "linear":  # arXiv:2306.15595: positions are divided
        return plain / given["factor"], 1.0
    if kind == "dynamic":
        return _dynamic(rope, pairs, theta, length), 1.0
    if kind == "llama3":
        return _llama3(given, plain), 1.0
    if kind == "yarn":
        return _yarn(rope, plain, theta), _yarn_factor(given)
    return _longrope(given, plain, length), _longrope_factor(given)


def _dynamic(rope: Rope, pairs: torch.Tensor, theta: float, length: int) -> torch.Tensor:
    """NTK-aware: the base grows with the length beyond the trained one."""
    factor, trained = rope.parameters["factor"], rope.max_positions
    stretch = factor * max(length, trained) / trained - (factor - 1)
    grown = theta * stretch ** (rope.dims / (rope.dims - 2))
    return torch.exp(-math.log(grown) * pairs)


def _llama3(given: Mapping[str, Any], plain: torch.Tensor) -> torch.Tensor:
    """arXiv:2407.21783: long waves slow down, short ones stay, those between are mixed."""
    turns = given["original_max_position_embeddings"] * plain / (2 * math.pi)  # within the trained length
    low, high = given["low_freq_factor"], given["high_freq_factor"]
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    mixed: torch.Tensor = plain * keep + plain / given["factor"] * (1 - keep)
    return mixed


def _yarn(rope: Rope, plain: torch.Tensor, theta: float) -> torch.Tensor:
    """arXiv:2309.00071 section 3.2: a ramp over the pairs between `beta_fast` and `beta_slow` turns."""
    given = rope.parameters
    trained = given["original_max_position_embeddings"]

    def pair_of(turns: float) -> float:
        return rope.dims * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(theta))

    first, last = pair_of(given["beta_fast"]), pair_of(given["beta_slow"])
    if given["truncate"]:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, rope.dims - 1)
    width = last - first or 0.001
    ramp = ((torch.arange(rope.dims // 2, dtype=torch.float64) - first) / width).clamp(0, 1)
    mixed: torch.Tensor = plain / given["factor"] * ramp + plain * (1 - ramp)
    return mixed


def _yarn_factor(given: Mapping[str, Any]) -> float:
    if "attention_factor" in given:
        return float(given["attention_factor"])

    def scale(weight: float) -> float:
        return 1.0 if given["factor"] <= 1 else 0.1 * weight * math.log(given["factor"]) + 1.0

    above, below = given.get("mscale"), given.get("mscale_all_dim")
    return scale(above) / scale(below) if above and below else scale(1.0)


def _longrope(given: Mapping[str, Any], plain: torch.Tensor, length: int) -> torch.Tensor:
    """arXiv:2402.13753: each pair has its own factor, one set up to the trained length, another beyond."""
    key = "long_factor" if length > given["original_max_position_embeddings"] else "short_factor"
    return plain / torch.tensor(given[key], dtype=torch.float64)


def _longrope_factor(given: Mapping[str, Any]) -> float:
    if "attention_factor" in given:
        return float(given["attention_factor"])
    factor = given["factor"]
    return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(given["original_max_position_embeddings"]))


def angles(rope: Rope, positions: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine ``(B, 1, S, dims / 2)`` of `positions` ``(B, S)``."""
    turns, factor = frequencies(rope, int(positions.max()) + 1)
    turned = positions[:, None, :, None].double() * turns
    return (turned.cos() * factor).to(dtype), (turned.sin() * factor).to(dtype)


def rotate(values: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn the pairs ``(x[i], x[i + dims/2])`` of `values` ``(B, H, S, head_dim)``; what lies behind ``dims`` stays."""
    half = cos.shape[-1]
    one, other, rest = values[..., :half], values[..., half : 2 * half], values[..., 2 * half :]
    return torch.cat((one * cos - other * sin, other * cos + one * sin, rest), dim=-1)
