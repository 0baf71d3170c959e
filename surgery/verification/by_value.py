# SPDX-License-Identifier: Apache-2.0
"""Does a graph of another exporter hold what a base and adapters make, weight by weight?

Its tensors are located by value (`surgery.onnx.locate.search`), so that nothing has to be run, and a model of any kind is
told.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from surgery.onnx.fold.standing import standing_branches, what_is_added
from surgery.onnx.locate.search import Located, located_weights
from surgery.onnx.locate.wanted import wanted_weights
from surgery.onnx.merge.changes import touched_labels
from surgery_formats.binding.bind import bind
from surgery_formats.canonical.adapter import Adapter
from surgery_formats.containers.onnx import open_graph
from surgery_formats.errors import ProofError
from surgery_formats.models.checkpoint import Checkpoint
from surgery_formats.text import listing, show, summed_up

__all__ = ["ByValue", "compare_by_value"]


@dataclass(frozen=True)
class ByValue:
    """What a graph was found to hold.

    Attributes:
        whole: Weights that are there, as they should be.
        updated: How many of them adapters changed.
        coded: How many of them are codes.
        error: Greatest error of these, in steps of their quantiser.
        absent: Weights that are not there in any form: an exporter may drop or fold what its graph does not need.
    """

    whole: int
    updated: int
    coded: int
    error: float
    absent: tuple[str, ...]


def compare_by_value(path: Path, base: Checkpoint, adapters: Sequence[tuple[Adapter, float]]) -> ByValue:
    """Compare a graph with what base and adapters make.

    Raises:
        InputError: the graph cannot be read.
        FitError: the adapters do not fit the base.
        ProofError: a weight that an adapter changes is not there as it should be, another has other values, or none is there;
            or the graph adds LoRAs that are no weights of its own.
    """
    binding = bind(adapters, base)
    graph = open_graph(path)
    located = located_weights(graph, wanted_weights(base, binding))
    touched = touched_labels(binding)
    explained = {piece.place.name for piece in located.pieces}
    if branches := standing_branches(graph, explained):
        raise ProofError(
            f"{what_is_added(branches)}, which makes another model of it",
            file=path,
            tensor=branches[0].weight,
            hint="surgery fold takes them into the weights; then name the adapter too",
        )
    missing = [weight.label for weight in located.missing]
    if near := [one for one in located.near if one.piece.weight.label in missing]:
        first = near[0]
        raise ProofError(
            f"{len(near)} weights have other values than base and adapters make: {show(first.piece.weight.label)} in "
            f"'{show(first.piece.place.name)}' is {first.distance:.2%} away",
            file=path,
        )
    if other := _other_values(located):
        raise ProofError(
            f"{len(other)} weights have other values than base and adapters make: {listing(summed_up(other))}",
            file=path,
            hint="is it this base? adapters that were merged into it have to be named, too",
        )
    if lost := sorted(touched.intersection(missing)):
        raise ProofError(f"{len(lost)} weights that the adapters change are not there: {listing(lost)}", file=path)
    if not located.whole:
        raise ProofError("holds no weight of this base", file=path)
    pieces = [piece for piece in located.pieces if piece.place.name in located.coded]
    return ByValue(
        len(located.whole),
        len(touched),
        len({piece.weight.label for piece in pieces}),
        max((piece.error for piece in pieces), default=0.0),
        tuple(missing),
    )


def _other_values(located: Located) -> list[str]:
    """Matrices that were not found, where a tensor of the graph that nothing explains has room for them.

    An exporter drops what its graph does not need, and then no such tensor is left over. Vectors are not asked: a norm that
    is folded into a convolution leaves a bias of its length.
    """
    graph, sizes = located.graph, list[tuple[int, ...]]()
    for name in located.others:
        if name in located.coded:
            sizes.append((located.coded[name].rows, located.coded[name].cols))
        else:
            sizes.append(graph.tensors[name].shape if name in graph.tensors else graph.small.shape(name))
    room = max((math.prod(size) for size in sizes if len(size) > 1), default=0)
    return [weight.label for weight in located.missing if not weight.is_vector and weight.rows * weight.cols <= room]
