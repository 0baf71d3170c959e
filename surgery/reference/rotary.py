# SPDX-License-Identifier: Apache-2.0
"""Rotary positions of every kind, written from the papers, in float64."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from surgery_formats.models.families.recipe import Rope

__all__ = ["angles", "angles_on_grid", "frequencies", "rotate"]


def frequencies(rope: Rope, length: int) -> tuple[torch.Tensor, float]:
    """Radians per position of each rotated pair, and the factor on cosine and sine, 1.0 unless the kind scales.

    ``dynamic`` and ``longrope`` depend on `length`, that of the longest sequence of the call.
    """
    parameters = rope.parameters
    kind, theta = parameters["rope_type"], float(parameters["rope_theta"])
    pairs = torch.arange(rope.dims // 2, dtype=torch.float64) * 2 / rope.dims
    plain = torch.exp(-math.log(theta) * pairs)  # theta^(-2i/d), arXiv:2104.09864 section 3.2.2
    if kind == "default":
        return plain, 1.0
    if kind == "linear":  # arXiv:2306.15595: positions are divided by the factor
        return plain / parameters["factor"], 1.0
    if kind == "dynamic":
        return _dynamic(rope, pairs, theta, length), 1.0
    if kind == "llama3":
        return _llama3(parameters, plain), 1.0
    if kind == "yarn":
        return _yarn(rope, plain, theta), _yarn_factor(parameters)
    return _longrope(parameters, plain, length), _longrope_factor(parameters)


def _dynamic(rope: Rope, pairs: torch.Tensor, theta: float, length: int) -> torch.Tensor:
    """NTK-aware scaling: the base grows with the length beyond the trained one."""
    factor, trained = rope.parameters["factor"], rope.max_positions
    stretch = factor * max(length, trained) / trained - (factor - 1)
    grown = theta * stretch ** (rope.dims / (rope.dims - 2))
    return torch.exp(-math.log(grown) * pairs)


def _llama3(parameters: Mapping[str, Any], plain: torch.Tensor) -> torch.Tensor:
    """arXiv:2407.21783: low frequencies are divided, high ones kept, and those between blended."""
    turns = parameters["original_max_position_embeddings"] * plain / (2 * math.pi)  # within the trained length
    low, high = parameters["low_freq_factor"], parameters["high_freq_factor"]
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    mixed: torch.Tensor = plain * keep + plain / parameters["factor"] * (1 - keep)
    return mixed


def _yarn(rope: Rope, plain: torch.Tensor, theta: float) -> torch.Tensor:
    """arXiv:2309.00071 section 3.2: a ramp over the pairs between `beta_fast` and `beta_slow` turns."""
    parameters = rope.parameters
    trained = parameters["original_max_position_embeddings"]

    def pair_of(turns: float) -> float:
        return rope.dims * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(theta))

    first, last = pair_of(parameters["beta_fast"]), pair_of(parameters["beta_slow"])
    if parameters["truncate"]:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, rope.dims - 1)
    width = last - first or 0.001
    ramp = ((torch.arange(rope.dims // 2, dtype=torch.float64) - first) / width).clamp(0, 1)
    mixed: torch.Tensor = plain / parameters["factor"] * ramp + plain * (1 - ramp)
    return mixed


def _yarn_factor(parameters: Mapping[str, Any]) -> float:
    if "attention_factor" in parameters:
        return float(parameters["attention_factor"])

    def scale(weight: float) -> float:
        return 1.0 if parameters["factor"] <= 1 else 0.1 * weight * math.log(parameters["factor"]) + 1.0

    above, below = parameters.get("mscale"), parameters.get("mscale_all_dim")
    return scale(above) / scale(below) if above and below else scale(1.0)


def _longrope(parameters: Mapping[str, Any], plain: torch.Tensor, length: int) -> torch.Tensor:
    """arXiv:2402.13753: each pair has its own factor, from one set up to the trained length and another beyond."""
    key = "long_factor" if length > parameters["original_max_position_embeddings"] else "short_factor"
    return plain / torch.tensor(parameters[key], dtype=torch.float64)


def _longrope_factor(parameters: Mapping[str, Any]) -> float:
    if "attention_factor" in parameters:
        return float(parameters["attention_factor"])
    factor = parameters["factor"]
    return (
        1.0
        if factor <= 1
        else math.sqrt(1 + math.log(factor) / math.log(parameters["original_max_position_embeddings"]))
    )


def angles(rope: Rope, positions: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine ``(B, 1, S, dims / 2)`` of `positions` ``(B, S)``."""
    turns, factor = frequencies(rope, int(positions.max()) + 1)
    turned = positions[:, None, :, None].double() * turns
    return (turned.cos() * factor).to(dtype), (turned.sin() * factor).to(dtype)


def angles_on_grid(rope: Rope, places: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine ``(B, 1, S, dims / 2)`` of `places` in time, height and width ``(3, B, S)``: each pair follows one."""
    turns, factor = frequencies(rope, int(places.max()) + 1)
    turned = torch.stack([places[axis].double() * turn for axis, turn in zip(rope.axes, turns, strict=True)], dim=-1)
    return (turned.cos() * factor).to(dtype)[:, None], (turned.sin() * factor).to(dtype)[:, None]


def rotate(values: torch.Tensor, rope: Rope, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate pairs of `values` ``(B, H, S, head_dim)``: ``(x[i], x[i + dims/2])``, or neighbours; those after ``dims`` stay."""
    first, second = (slice(0, rope.dims, 2), slice(1, rope.dims, 2)) if rope.interleaved else _halves(rope.dims)
    turned = values.clone()
    turned[..., first] = values[..., first] * cos - values[..., second] * sin
    turned[..., second] = values[..., second] * cos + values[..., first] * sin
    return turned


def _halves(dims: int) -> tuple[slice, slice]:
    return slice(0, dims // 2), slice(dims // 2, dims)
