# SPDX-License-Identifier: Apache-2.0
"""The tables of a graph in which tokens and their places are looked up: how many of each there are."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx

__all__ = ["TokenTables", "token_tables"]

_PASSED = ("Cast", "Identity", "Reshape", "Squeeze", "Unsqueeze", "Flatten")
_PLACES = ("position", "wpe", "cos_cache")
_STORED = (1, 2, 3, 10, 11, 16)  # floats, and codes of one byte: not the numbers of places themselves
_FUSED = "EmbedLayerNormalization"  # ids, types, table of tokens, table of places, ...


@dataclass(frozen=True, slots=True)
class TokenTables:
    """Rows of tables; 0 where the graph has none that is known.

    Attributes:
        tokens: Of the table in which ``input_ids`` are looked up.
        places: Of the table of positions or of their cosines, by its name or the node that reads it; of several the smallest.
        cached: Whether keys and values are an input.
    """

    tokens: int = 0
    places: int = 0
    cached: bool = False


def token_tables(path: Path) -> TokenTables:
    """Read them from a graph, whose weights are not read."""
    import onnx

    graph = onnx.load(path, load_external_data=False).graph
    shapes = {one.name: tuple(one.dims) for one in graph.initializer if len(one.dims) > 1}
    stored = {one.name for one in graph.initializer if one.data_type in _STORED}
    ids, tokens = {"input_ids"}, 0
    for node in graph.node:
        if not ids.intersection(node.input):
            continue
        if node.op_type in _PASSED:
            ids.add(node.output[0])
        elif node.op_type in ("Gather", "GatherBlockQuantized", _FUSED) and not tokens:
            table = node.input[2] if node.op_type == _FUSED else node.input[0]
            tokens = shapes.get(table, (0,))[0]
    named = {name for name in stored & shapes.keys() if any(word in name.lower() for word in _PLACES)}
    named = {name for name in named if "relative" not in name.lower()}
    places = [shapes[name][0] for name in named | set(_fused_places(graph)) if len(shapes.get(name, ())) == 2]
    cached = any(port.name.startswith("past_key_values") for port in graph.input)
    return TokenTables(tokens, min(places, default=0), cached)


def _fused_places(graph: onnx.GraphProto) -> Iterator[str]:
    return (node.input[3] for node in graph.node if node.op_type == _FUSED)
