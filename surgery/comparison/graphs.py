# SPDX-License-Identifier: Apache-2.0
"""The difference of two graphs, or of a graph and a checkpoint."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy

from surgery.comparison.checkpoints import diff_checkpoints
from surgery.comparison.entries import TensorDiff, TensorHeader
from surgery.comparison.graph_diff import GraphDiff, NodeChange, PortChange
from surgery.comparison.graph_nodes import changed_nodes, changed_ports
from surgery.comparison.graph_pairs import TensorPair, paired
from surgery.onnx.survey.modules import module_names
from surgery.onnx.survey.ports import inputs_of, outputs_of
from surgery.onnx.survey.survey import computed_weights, operator_counts
from surgery.progress import Callback
from surgery_formats.containers.base import Shard
from surgery_formats.containers.onnx import OnnxGraph, TypedTensors
from surgery_formats.errors import FitError
from surgery_formats.models.checkpoint import Checkpoint
from surgery_formats.models.component import Component
from surgery_formats.tensors.tensor import StoredTensor

__all__ = ["diff_graphs"]

_Side = OnnxGraph | Checkpoint


@dataclass(frozen=True)
class _Tensors:
    """One side: its tensors by name, and what the nodes around them call them."""

    tensors: Mapping[str, StoredTensor]
    places: Mapping[str, str]


def diff_graphs(
    a: _Side,
    b: _Side,
    *,
    header: bool,
    spectrum: bool,
    tolerance: float | None,
    progress: Callback | None = None,
) -> GraphDiff:
    """Compare two graphs, or a graph and a checkpoint. See `surgery.verbs.diff.diff`.

    Raises:
        FitError: a pipeline of several networks.
    """
    mine, theirs = _side(a), _side(b)
    pairs = paired(mine.tensors, theirs.tensors, (mine.places, theirs.places), values=not header)
    known = [pair for pair in pairs if pair.same]
    lacking = [pair for pair in pairs if _is_constant(pair, mine, theirs)]
    rest = [pair for pair in pairs if not pair.same and pair not in lacking]
    compared = diff_checkpoints(
        _as_checkpoint(a, rest, theirs=False),
        _as_checkpoint(b, rest, theirs=True),
        header=header,
        spectrum=spectrum,
        tolerance=tolerance,
        progress=progress,
    )
    notes = {pair.name: pair.note for pair in rest}
    tensors = [replace(entry, note=_joined(notes.get(entry.name, ""), entry.note)) for entry in compared.tensors]
    tensors += [_equal(pair) for pair in known]
    nodes: tuple[NodeChange, ...] = ()
    ports: tuple[PortChange, ...] = ()
    if isinstance(a, OnnxGraph) and isinstance(b, OnnxGraph):
        tensors += _typed(a.small, b.small, header=header)
        nodes = changed_nodes(a.proto, b.proto)
        ports = (
            *changed_ports("input", *(inputs_of(side.proto, side.shapes) for side in (a, b))),
            *changed_ports("output", *(outputs_of(side.proto) for side in (a, b))),
        )
    for side in (a, b):
        side.check_unchanged()
    return GraphDiff(
        facts=_facts(a, b),
        tensors=tuple(sorted(tensors, key=lambda entry: entry.name)),
        nodes=nodes,
        ports=ports,
        difference=0.0 if compared.difference is None and known and not header else compared.difference,
        renamed=sum(
            pair.mine is not None and pair.theirs is not None and pair.mine.name != pair.theirs.name for pair in pairs
        ),
        constants=(sum(pair.mine is not None for pair in lacking), sum(pair.theirs is not None for pair in lacking)),
        header=header,
        notes=(*compared.notes, *_packed(a, b, compared.tensors)),
    )


def _packed(a: _Side, b: _Side, tensors: Iterable[TensorDiff]) -> Iterator[str]:
    """A hint where weights of a checkpoint were not found in a graph as wholes."""
    if isinstance(a, OnnxGraph) and isinstance(b, OnnxGraph):
        return
    lacking = sum(entry.status == ("only in B" if isinstance(a, OnnxGraph) else "only in A") for entry in tensors)
    if lacking:
        yield (
            f"{lacking} weights of the checkpoint are no tensor of the graph: "
            "'surgery locate' finds those that were packed, cast or coded"
        )


def _is_constant(pair: TensorPair, mine: _Tensors, theirs: _Tensors) -> bool:
    """Whether a shape, an axis or a scalar is on one side alone: it belongs to a node that the other lacks."""
    if pair.mine is not None and pair.theirs is not None:
        return False
    return pair.name not in (mine if pair.mine is not None else theirs).places


def _side(side: _Side) -> _Tensors:
    if isinstance(side, OnnxGraph):
        places = module_names(side.proto.graph, computed_weights(side))
        return _Tensors(side.tensors, {name: place.name for name, place in places.items()})
    if side.is_pipeline:
        raise FitError(
            "a pipeline of several networks beside one graph", file=side.path, hint="name the network's folder"
        )
    return _Tensors(side.main.tensors, {name: name for name in side.main.tensors})


def _as_checkpoint(side: _Side, pairs: list[TensorPair], *, theirs: bool) -> Checkpoint:
    """The tensors of one side under the names of the pairs, those that lie transposed turned."""
    tensors = []
    for pair in pairs:
        tensor = pair.theirs if theirs else pair.mine
        if tensor is not None and theirs and pair.turned:
            tensor = replace(tensor, shape=tensor.shape[::-1], strides=(1, tensor.shape[1]))
        if tensor is not None:
            tensors.append(replace(tensor, name=pair.name))
    file = side.file if isinstance(side, OnnxGraph) else side.main.shards[0].file
    shard = Shard(side.path, "", file, tuple(tensors))
    component = Component("", Path(side.path).parent, (shard,), None, "", {}, uninterpreted=True)
    return Checkpoint(side.path, {"": component}, ())


def _equal(pair: TensorPair) -> TensorDiff:
    mine, theirs = (
        None if one is None else TensorHeader(one.stored_type, one.shape) for one in (pair.mine, pair.theirs)
    )
    return TensorDiff(pair.name, "equal", mine, theirs, note=pair.note)


def _joined(*notes: str) -> str:
    return ", ".join(note for note in notes if note)


def _typed(a: TypedTensors, b: TypedTensors, *, header: bool) -> Iterator[TensorDiff]:
    """Tensors that are written value by value."""
    for name in dict.fromkeys((*a, *b)):
        mine = TensorHeader(a.label(name), a.shape(name)) if name in a else None
        theirs = TensorHeader(b.label(name), b.shape(name)) if name in b else None
        if mine is None or theirs is None:
            yield TensorDiff(name, "only in B" if mine is None else "only in A", mine, theirs)
        elif mine != theirs:
            yield TensorDiff(name, "shape" if mine.shape != theirs.shape else "dtype", mine, theirs)
        else:
            alike = header or numpy.array_equal(a[name], b[name])
            yield TensorDiff(name, "equal" if alike else "values", mine, theirs)


def _facts(a: _Side, b: _Side) -> dict[str, tuple[str, str]]:
    mine, theirs = _told(a), _told(b)
    return {what: (mine.get(what, ""), theirs.get(what, "")) for what in dict.fromkeys((*mine, *theirs))}


def _told(side: _Side) -> dict[str, str]:
    if not isinstance(side, OnnxGraph):
        return {"made by": "a checkpoint"}
    model = side.proto
    return {
        "made by": " ".join(part for part in (model.producer_name, model.producer_version) if part),
        "opsets": ", ".join(f"{entry.domain or 'ai.onnx'} {entry.version}" for entry in model.opset_import),
        "nodes": str(sum(operator_counts(model).values())),
    }
