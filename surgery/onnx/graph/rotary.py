# SPDX-License-Identifier: Apache-2.0
"""Rotary positions: frequencies out of a family's parameters, tables out of frequencies.

A graph holds the frequencies, ``dims / 2`` numbers, and computes the tables of cosines and sines from them; runtimes do that once, when
they load it. Written out, the tables of one model take up to 67 MB.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from surgery.onnx.graph.graph import ONNX_TYPES, Graph
from surgery_formats.dtypes import DType
from surgery_formats.errors import FitError
from surgery_formats.models.families.recipe import Rope

if TYPE_CHECKING:
    import numpy as np

__all__ = ["Frequencies", "RotaryTable", "frequencies", "longest", "table"]

_ROWS = 1 << 24
"""Positions: more than any model was made for; a config.json may say anything."""


@dataclass(frozen=True)
class Frequencies:
    """Angles per position.

    Attributes:
        usual: Radians per position, ``(dims / 2,)``, float32.
        long: Those for sequences of more than `original` tokens (LongRoPE), or None.
        original: Tokens up to which `usual` holds.
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
        original: Sequences of more tokens use the rows from `rows` on; 0 where there are no such rows.
        rows: Positions.
    """

    cos: str
    sin: str
    original: int
    rows: int


def longest(rope: Rope, wanted: int | None, limit: int) -> int:
    """How many positions a graph reaches to.

    Args:
        rope: Of any layer.
        wanted: By the user; None for as many as the model was made for.
        limit: Positions the model was made for.

    Raises:
        FitError: more than can be done by a table.
    """
    if (wanted or limit) > _ROWS:
        raise FitError(
            f"rotary tables of {wanted or limit} positions do not fit into memory",
            file="config.json",
            hint=f"--max-length {_ROWS} or less; a table takes 4 bytes per position and value of a head",
        )
    if wanted is not None and wanted > rope.max_positions and rope.parameters["rope_type"] == "dynamic":
        raise FitError(
            f"dynamic rotary positions change with every token beyond {rope.max_positions}, which a graph cannot do",
            file="config.json",
            hint=f"--max-length {rope.max_positions} or less",
        )
    return wanted or limit


def frequencies(rope: Rope) -> Frequencies:
    """Angles per position of a model's rotary embedding.

    ``default``: arXiv:2104.09864; ``linear``: arXiv:2306.15595; ``dynamic``: as default up to `Rope.max_positions`; ``llama3``: Llama 3.1,
    arXiv:2407.21783; ``yarn``: arXiv:2309.00071; ``longrope``: arXiv:2402.13753.
    """
    import numpy as np

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
    raise FitError(f"rotary positions of type '{kind}' are not known", file="config.json")


def _llama3(plain: np.ndarray, p: Mapping[str, Any]) -> np.ndarray:
    """Low frequencies are divided by the factor, high ones kept, those between blended."""
    import numpy as np

    original, low, high = (
        p[key] for key in ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor")
    )
    turns = original * plain / (2 * math.pi)
    blend = np.clip((turns - low) / (high - low), 0.0, 1.0)
    mixed: np.ndarray = (1 - blend) * plain / p["factor"] + blend * plain
    return mixed


def _yarn(plain: np.ndarray, p: Mapping[str, Any], dims: int) -> np.ndarray:
    """As Llama 3, but blended over the index of the frequency."""
    import numpy as np

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


def table(graph: Graph, rope: Rope, rows: int, io: DType) -> RotaryTable:
    """The tables of `rows` positions in type `io`; of twice as many rows where long sequences have angles of their own."""
    import numpy as np

    found = frequencies(rope)
    at = "rotary"
    positions = graph.node(
        "Range", [graph.number(n, DType.I64) for n in (0, rows, 1)], at
    )  # in whole numbers: exact at any length
    column = graph.node("Unsqueeze", [graph.cast(positions, DType.F32, at), graph.ints(1)], at)
    angles = graph.node("Mul", [column, graph.constant(found.usual[None])], at)
    original = 0
    if found.long is not None and rows > found.original:
        original = found.original
        long = graph.node("Mul", [column, graph.constant(found.long[None])], at)
        angles = graph.node("Concat", [angles, long], at, axis=0)

    def wave(op: str) -> str:
        value = graph.node(op, [angles], at)
        if found.scaling != 1.0:
            value = graph.node("Mul", [value, graph.constant(np.array(found.scaling, np.float32))], at)
        return value if io is DType.F32 else graph.node("Cast", [value], at, to=ONNX_TYPES[io])

    return RotaryTable(wave("Cos"), wave("Sin"), original, rows)
