# SPDX-License-Identifier: Apache-2.0
"""Two graphs with the same nodes: a weight that was found in one lies in the other at the same place, whatever its values are."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from surgery.onnx.locate.coded_nodes import coded_matrices
from surgery.onnx.locate.matrix import Matrix, float_matrices
from surgery.onnx.locate.pieces import LocatedPiece, Place
from surgery.onnx.locate.search import Located
from surgery_formats.containers.onnx import OnnxGraph

if TYPE_CHECKING:
    import onnx

__all__ = ["found_as_in"]


def found_as_in(before: Located, graph: OnnxGraph) -> Located | None:
    """What a graph holds, if it has the nodes and tensors of another; None if it is another graph.

    Args:
        before: What the other holds.
        graph: The graph.
    """
    if _nodes(before.graph.proto) != _nodes(graph.proto):
        return None
    coded = dict(coded_matrices(graph))
    plain = dict(float_matrices(graph))
    pieces: list[LocatedPiece] = []
    for piece in before.pieces:
        places: tuple[Place, ...] = tuple(coded.get(piece.place.name) or plain.get(piece.place.name, ()))
        twin = next((place for place in places if _same(place, piece.place)), None)
        if twin is None:
            return None
        pieces.append(replace(piece, place=twin))
    return Located(graph, before.weights, tuple(pieces), coded={name: matrices[0] for name, matrices in coded.items()})


def _nodes(model: onnx.ModelProto) -> list[bytes]:
    found = []
    for node in model.graph.node:
        bare = type(node)()
        bare.CopyFrom(node)
        del bare.metadata_props[:]
        bare.ClearField("doc_string")
        found.append(bare.SerializeToString(deterministic=True))
    return found


def _same(first: Place, second: Place) -> bool:
    if (first.rows, first.cols, first.dtype) != (second.rows, second.cols, second.dtype):
        return False
    return not (isinstance(first, Matrix) and isinstance(second, Matrix)) or first.start == second.start
