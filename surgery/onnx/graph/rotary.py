# SPDX-License-Identifier: Apache-2.0
"""Rotary positions: frequencies from a family's parameters, and tables from frequencies.

A graph holds the frequencies, ``dims / 2`` numbers, and computes the tables of cosines and sines from them; runtimes do
that once, at load time. Written out, the tables of one model take up to 67 MB.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from surgery.onnx.graph.graph import ONNX_TYPES, Graph
from surgery_formats.dtypes import DType
from surgery_formats.errors import FitError
from surgery_formats.models.families.recipe import Rope

__all__ = ["Frequencies", "RotaryTable", "RotaryTables", "frequencies", "longest"]

_ROWS = 1 << 24
"""Greatest number of positions; more than any model supports, but config.json may contain anything."""


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


@dataclass(frozen=True, slots=True)
class RotaryTable:
    """Cosines and sines as values of a graph, ``(rows, dims / 2)``.

    Attributes:
        cos: Cosines.
        sin: Sines.
        original: Longer sequences use the rows from `rows` on; 0 if there are no such rows.
        rows: Number of positions.
    """

    cos: str
    sin: str
    original: int
    rows: int


def longest(rope: Rope, requested: int | None, limit: int) -> int:
    """The number of positions of a graph: `requested`, or as many as the model supports (`limit`).

    Raises:
        FitError: more positions than a table can hold.
    """
    if (requested or limit) > _ROWS:
        raise FitError(
            f"rotary tables of {requested or limit} positions do not fit into memory",
            file="config.json",
            hint=f"`max_length={_ROWS}` or less; a table takes 4 bytes per position and value of a head",
        )
    if requested is not None and requested > rope.max_positions and rope.parameters["rope_type"] == "dynamic":
        raise FitError(
            f"dynamic rotary positions change with every token beyond {rope.max_positions}, so no graph has them",
            file="config.json",
            hint=f"`max_length={rope.max_positions}` or less",
        )
    return requested or limit


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


def _table(graph: Graph, rope: Rope, rows: int, io: DType) -> RotaryTable:
    """Tables of `rows` positions in type `io`; twice as many rows if long sequences have their own angles."""
    angles_per_position = frequencies(rope)
    at = "rotary"
    # integers, to be exact at any length
    positions = graph.node("Range", [graph.number(n, DType.I64) for n in (0, rows, 1)], at)
    column = graph.node("Unsqueeze", [graph.cast(positions, DType.F32, at), graph.ints(1)], at)
    angles = graph.node("Mul", [column, graph.constant(angles_per_position.usual[None])], at)
    original = 0
    if angles_per_position.long is not None and rows > angles_per_position.original:
        original = angles_per_position.original
        long = graph.node("Mul", [column, graph.constant(angles_per_position.long[None])], at)
        angles = graph.node("Concat", [angles, long], at, axis=0)

    def wave(op: str) -> str:
        value = graph.node(op, [angles], at)
        if angles_per_position.scaling != 1.0:
            value = graph.node("Mul", [value, graph.constant(np.array(angles_per_position.scaling, np.float32))], at)
        return value if io is DType.F32 else graph.node("Cast", [value], at, to=ONNX_TYPES[io])

    return RotaryTable(wave("Cos"), wave("Sin"), original, rows)


class RotaryTables:
    """The tables of one graph; layers with equal parameters share them."""

    def __init__(self, graph: Graph, rows: int, io: DType) -> None:
        """Tables of so many positions, in the type of hidden states."""
        self._graph, self._rows, self._io = graph, rows, io
        self._known: list[tuple[Rope, RotaryTable]] = []  # parameters are a mapping, which is no key

    def of(self, rope: Rope) -> RotaryTable:
        """The table of these parameters, built when first needed."""
        for known, values in self._known:
            if known == rope:
                return values
        values = _table(self._graph, rope, self._rows, self._io)
        self._known.append((rope, values))
        return values
