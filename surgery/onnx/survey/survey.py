# SPDX-License-Identifier: Apache-2.0
"""Survey: everything that is told of a graph without its base, and without loading it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from surgery.onnx.edit.uses import graphs_in
from surgery.onnx.graph.contract import Contract, contract_of
from surgery.onnx.survey.modules import module_names
from surgery.onnx.survey.ports import inputs_of, is_factor_name, outputs_of
from surgery.onnx.survey.runtime import what_runs_where
from surgery.onnx.survey.traces import traces_of
from surgery.reports.checkpoint_report import WeightFileReport
from surgery.reports.graph_report import GraphReport, OperatorReport
from surgery_formats.containers.base import Shard
from surgery_formats.containers.onnx import OnnxGraph
from surgery_formats.containers.onnx.container import ONNX
from surgery_formats.dtypes import DType
from surgery_formats.models.component import Component
from surgery_formats.models.module_tree import Node, Totals, leaves, module_graph, role_totals
from surgery_formats.tensors.tensor import StoredTensor
from surgery_formats.text import listing

if TYPE_CHECKING:
    import onnx

__all__ = ["computed_weights", "operator_counts", "survey"]

_PROTO_LIMIT = (1 << 31) - 1
_OLD = 4
_CONTRACT = ("kind", "task", "target", "dtype", "padding", "cache", "max_length", "virtual_tokens", "prefill")


def survey(graph: OnnxGraph, config: Mapping[str, Any] | None = None) -> GraphReport:
    """What `graph` is made of.

    Args:
        graph: The open graph.
        config: The configuration of its model, if it lies beside it.

    Raises:
        MalformedError: it cannot be parsed, or its contract cannot be read.
    """
    model = graph.proto
    contract = contract_of(model, graph.path)
    counts = operator_counts(model)
    weights = computed_weights(graph)
    inputs = inputs_of(model, graph.shapes, contract.slot_inputs if contract else ())
    ports = {port.name for port in inputs}
    held = {name: tensor for name, tensor in weights.items() if name not in ports}
    places = module_names(model.graph, held)
    tree = _tree(graph, held, {name: place.name for name, place in places.items()}, config)
    functions = {(function.domain, function.name) for function in model.functions}
    return GraphReport(
        path=graph.path,
        producer=" ".join(part for part in (model.producer_name, model.producer_version) if part),
        ir_version=model.ir_version,
        opsets={entry.domain: entry.version for entry in model.opset_import},
        nodes=sum(counts.values()),
        operators=tuple(
            OperatorReport(domain, name, count, (domain, name) in functions)
            for (domain, name), count in sorted(counts.items(), key=lambda entry: (-entry[1], entry[0]))
        ),
        inputs=inputs,
        outputs=outputs_of(model),
        runs=what_runs_where(model, counts),
        files=tuple(_files(graph)),
        parameters=tree.parameters,
        tree=tree,
        roles=role_totals(leaves(tree)),
        dtypes=_dtypes(held.values()),
        constants=len(graph.holders) - len(weights),
        unplaced=sum(place.unplaced for place in places.values()),
        factors=sum(map(is_factor_name, held)),
        contract={} if contract is None else _told(contract),
        metadata=_metadata(model),
        warnings=tuple(_warnings(graph, model)),
    )


def operator_counts(model: onnx.ModelProto) -> Counter[tuple[str, str]]:
    """How many nodes there are by domain and operator, those in bodies and functions included."""
    counts: Counter[tuple[str, str]] = Counter()
    for graph in graphs_in(model.graph):
        counts.update((node.domain, node.op_type) for node in graph.node)
    for function in model.functions:
        counts.update((node.domain, node.op_type) for node in function.node)
    return counts


def computed_weights(graph: OnnxGraph) -> dict[str, StoredTensor]:
    """The tensors of a graph that a network trains, or codes of such: arrays of floats, and of integers of up to 8 bits.

    Shapes, axes, masks and the scales of single activations are the computation's.
    """
    return {
        name: tensor
        for name, tensor in graph.tensors.items()
        if tensor.shape
        and tensor.nbytes > tensor.dtype.bits // 8
        and (tensor.dtype.is_float_or_fp8 or tensor.packed_as or tensor.dtype in (DType.I8, DType.U8))
    }


def _tree(
    graph: OnnxGraph, weights: Mapping[str, StoredTensor], places: Mapping[str, str], config: Mapping[str, Any] | None
) -> Node:
    renamed = tuple(replace(tensor, name=places[name]) for name, tensor in weights.items())
    shard = Shard(graph.path, ONNX.name, graph.file, renamed)
    return module_graph(Component("", graph.path.parent, (shard,), None, "", config or {}))


def _files(graph: OnnxGraph) -> Iterable[WeightFileReport]:
    held = Counter(id(tensor.file) for tensor in graph.tensors.values())
    folder = graph.path.parent
    for file in graph.files:
        inside = file.path.is_relative_to(folder)
        name = file.path.relative_to(folder).as_posix() if inside else file.path.name
        kind = ONNX.name if file is graph.file else "external"
        yield WeightFileReport(name, kind, file.size, held[id(file)])


def _dtypes(tensors: Iterable[StoredTensor]) -> dict[str, Totals]:
    totals: dict[str, Totals] = {}
    for tensor in tensors:
        own = totals.get(tensor.stored_type, Totals())
        totals[tensor.stored_type] = Totals(own.tensors + 1, own.parameters + tensor.numel, own.nbytes + tensor.nbytes)
    return dict(sorted(totals.items(), key=lambda entry: (-entry[1].nbytes, entry[0])))


def _told(contract: Contract) -> dict[str, Any]:
    told = {name: getattr(contract, name) for name in _CONTRACT}
    return {name: value for name, value in told.items() if value not in ("", 0)}


def _metadata(model: onnx.ModelProto) -> dict[str, int]:
    keys = Counter(entry.key for entry in model.metadata_props)
    keys.update(entry.key for graph in graphs_in(model.graph) for node in graph.node for entry in node.metadata_props)
    return dict(sorted(keys.items()))


def _warnings(graph: OnnxGraph, model: onnx.ModelProto) -> Iterable[str]:
    if graph.file.size > _PROTO_LIMIT:
        yield "the file is larger than 2 GB, which no runtime loads: weights belong into external data"
    if model.ir_version < _OLD:
        yield f"IR version {model.ir_version}: every weight had to be listed as an input, and may be replaced at run time"
    if typed := [name for name in graph.small if graph.small.is_weight(name, 1024)]:
        yield f"{len(typed)} weights are written value by value, and are not counted: {listing(typed)}"
    if graph.strings:
        yield f"{len(graph.strings)} tensors are texts: {listing(graph.strings)}"
    if traces := traces_of(model):
        yield traces
