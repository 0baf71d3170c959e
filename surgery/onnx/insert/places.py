# SPDX-License-Identifier: Apache-2.0
"""Where the weights of a base lie in a graph that somebody else made: found by their values, whatever they are called."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from surgery.onnx.locate.matrix import Matrix
from surgery.onnx.locate.pieces import LocatedPiece
from surgery.onnx.locate.search import Located, located_weights
from surgery.onnx.locate.ties import is_told
from surgery.onnx.locate.wanted import wanted_weights
from surgery_formats.containers.onnx import OnnxGraph
from surgery_formats.errors import FitError
from surgery_formats.models.checkpoint import Checkpoint
from surgery_formats.models.component import Component
from surgery_formats.tensors.views import Index
from surgery_formats.text import listing, show

__all__ = ["WeightPlace", "places_of"]


@dataclass(frozen=True, slots=True)
class WeightPlace:
    """Outputs of a weight in a tensor of a graph: those at `at` are the weight's `rows`.

    Attributes:
        tensor: The tensor.
        weight: The weight.
        rows: Which of the weight's outputs lie there (of a table: which rows).
        at: Where, among the tensor's outputs.
        width: Number of the tensor's outputs.
        by_output: Whether the tensor's rows are the outputs.
        factor: What the weight was multiplied by, or each of its outputs.
    """

    tensor: str
    weight: str
    rows: Index
    at: Index
    width: int
    by_output: bool
    factor: float | tuple[float, ...] = 1.0

    @property
    def is_all(self) -> bool:
        """Whether the tensor holds nothing else, in the weight's order."""
        return list(self.at) == list(range(self.width))


def places_of(
    graph: OnnxGraph, checkpoint: Checkpoint, component: Component, turned: Mapping[str, bool]
) -> dict[str, tuple[WeightPlace, ...]]:
    """Where each weight lies, in the order of the graph.

    Args:
        graph: The graph.
        checkpoint: The base.
        component: The part of it that the graph was made of.
        turned: The weights by name, and whether the rows of their stored matrix are inputs.

    Raises:
        FitError: a weight, or a part of it, is not in the graph, lies there as no slot can follow, or cannot be told from
            others.
    """
    stored = {name: component.aliases.get(name, name) for name in turned}
    labels = {name: f"{component.name}:{own}" if component.name else own for name, own in stored.items()}
    wanted = [one for one in wanted_weights(checkpoint) if one.component == component.name]
    located = located_weights(graph, wanted, touched=set(labels.values()), tables=False)
    found: dict[str, tuple[WeightPlace, ...]] = {}
    for name, label in labels.items():
        if located.covered.get(label) != 1:
            raise FitError(
                f"the graph does not hold the weight '{show(name)}' of the base",
                file=graph.path,
                hint="the graph was made of another model, or its weights were changed since: see surgery locate",
            )
        pieces = located.of_weight[label]
        own = [piece for piece in pieces if piece.weight.label == label] or list(pieces)
        for piece in own:
            _check_told(piece, name, located)
        found[name] = tuple(_place(piece, name, graph, turned=turned[name]) for piece in own)
    return found


def _check_told(piece: LocatedPiece, name: str, located: Located) -> None:
    """Refuse a tensor that other weights of equal values may be in, or are in, too.

    Raises:
        FitError: it is such a one.
    """
    others = [weight.label for weight in (piece.weight, *piece.also)] if piece.also else []
    if others:
        why = f"holds several weights of equal values, {listing(others)}"
    elif piece.by_order or (piece.weight.is_uniform and not is_told(piece, located.pieces, located.graph.proto)):
        why = f"may be '{show(name)}' or not: other tensors have its values, and no name tells"
    else:
        return
    raise FitError(
        f"{why}, so that no node is certain to be the weight's",
        file=located.graph.path,
        tensor=piece.place.name,
        hint="insert the adapter before the graph is optimised, where every weight has a tensor and a name of its own",
    )


def _place(piece: LocatedPiece, name: str, graph: OnnxGraph, *, turned: bool) -> WeightPlace:
    """A piece by its outputs.

    Raises:
        FitError: it lies in a stack, is folded with a norm, or has its inputs in another order.
    """
    matrix = piece.place
    of_outputs = piece.flipped == turned  # else the piece's rows are inputs
    by_output = of_outputs != piece.turned
    width = matrix.rows if by_output else matrix.cols
    rows, at = piece.rows, piece.graph_rows
    why = ""
    if not of_outputs:
        whole = list(at) == list(rows) == list(range(matrix.cols if by_output else matrix.rows))
        why = "" if whole else "with its inputs in parts or in another order"
        why = why if not piece.row_factors else "with each input multiplied by a number"
        rows = at = range(width)
    if piece.fold:
        why = f"multiplied by '{show(piece.fold)}'"
    if isinstance(matrix, Matrix) and matrix.numel != math.prod(graph.shapes[matrix.name]):
        why = "in a stack with others"
    if why:
        raise FitError(
            f"the graph holds the weight '{show(name)}' {why}, where a slot cannot follow",
            file=graph.path,
            tensor=matrix.name,
            hint="merge the adapter into the graph instead",
        )
    return WeightPlace(matrix.name, name, rows, at, width, by_output, piece.row_factors or piece.factor)
