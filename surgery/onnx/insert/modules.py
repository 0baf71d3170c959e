# SPDX-License-Identifier: Apache-2.0
"""Modules of adapters as optional inputs of a graph that somebody else made: the weights around them are found by value.

The result of a branch's last map is followed to the sum that the branch ends in. What the modules make of it takes its place
there, so that the sum and what comes behind it stay the exporter's own nodes.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from surgery.engine.card import CARD
from surgery.onnx.edit.graph_card import edited_card
from surgery.onnx.edit.nodes import names_in
from surgery.onnx.edit.output import editable, write_edited
from surgery.onnx.edit.readers import readers_of
from surgery.onnx.export.adapters import NamedAdapter, entry, issues_of
from surgery.onnx.export.inserted import ModuleSlots, values_at
from surgery.onnx.export.stored_factors import stored_array
from surgery.onnx.graph.context import Context
from surgery.onnx.graph.graph import Graph
from surgery.onnx.graph.inserted import state_inserted, stated_inserted
from surgery.onnx.graph.modules import body_with_modules
from surgery.onnx.graph.target import TARGETS
from surgery.onnx.graph.weights import GraphWeights
from surgery.onnx.insert.places import places_of
from surgery.onnx.insert.result import GraphInsertion
from surgery.onnx.insert.slots import spots_of
from surgery.onnx.insert.sums import BranchSum, sum_behind
from surgery.onnx.insert.unfuse import unfuse
from surgery.onnx.run.adapter_file import adapter_bytes
from surgery_formats.containers.onnx import OnnxGraph, open_graph
from surgery_formats.dtypes import DType
from surgery_formats.errors import FitError
from surgery_formats.models.checkpoint import Checkpoint
from surgery_formats.models.component import Component
from surgery_formats.models.families.inserted import PlacedModule, as_fields, with_inserted
from surgery_formats.models.families.parameters import model_of
from surgery_formats.models.families.recipe import Branch, Coupling, Experts, Model, Projection

if TYPE_CHECKING:
    import onnx

__all__ = ["insert_modules"]

_TYPES = {1: DType.F32, 10: DType.F16, 16: DType.BF16}


def insert_modules(
    path: Path,
    adapters: Sequence[NamedAdapter],
    checkpoint: Checkpoint,
    output: Path | None,
    *,
    overwrite: bool = False,
) -> GraphInsertion:
    """Add optional inputs for the modules of `adapters` to the graph `path`, and write each adapter as a file for them.

    Args:
        path: The graph.
        adapters: The adapters, each of nothing but modules.
        checkpoint: The base that the graph was made of.
        output: Folder to make; None for a dry run.
        overwrite: Replace an existing output.

    Raises:
        InputError: the graph cannot be read.
        FitError: the graph was made of another base, a branch does not end in a sum that is understood, or a module that only
            a graph of our own can hold.
        OutputExistsError, ResourceError, ProofError: nothing is written.
    """
    graph, component = open_graph(path), checkpoint.main
    model = editable(graph, inputs=True)
    before = len(model.graph.node)
    slots = ModuleSlots.of([named.modules for named in adapters])
    _check(adapters, slots)
    recipe = with_inserted(model_of(component.config, frozenset(component.parameters)), slots.places)
    if clash := sorted(names_in(model.graph) & slots.inputs.names):
        raise FitError("the graph has a module here already", file=path, tensor=clash[0])
    branches = _branches(recipe, slots.places)
    sums = _sums(graph, model, checkpoint, [projection for _, projection in branches])
    io = _TYPES.get(sums[0].element)
    if io is None or any(found.element != sums[0].element for found in sums):
        raise FitError("computes in a type, or in types, that modules cannot have", file=path)
    _build(
        model,
        component,
        io,
        slots,
        list(zip([branch for branch, _ in branches], sums, strict=True)),
        recipe.hidden,
        path,
    )
    names = [f"adapters/{named.name}.onnx_adapter" for named in adapters]
    files = {
        name: _contents(named, places, io) for name, named, places in zip(names, adapters, slots.names, strict=True)
    }
    entries = tuple(entry(named, "swapped", file=name) for named, name in zip(adapters, names, strict=True))
    known = stated_inserted(model, path)
    now = replace(
        known,
        adapters=(*known.adapters, *entries),
        replaceable=(*known.replaceable, *sorted(slots.inputs.names)),
        modules=(*known.modules, *map(as_fields, slots.places)),
    )
    state_inserted(model, now, path)
    nodes, written = len(model.graph.node) - before, 0
    warnings = issues_of(adapters, checkpoint)
    if output is not None:
        files[CARD] = edited_card(
            path,
            "with inputs for modules",
            [("modules", str(len(slots.places))), ("nodes more", str(nodes))],
            base=checkpoint,
            adapters=[(named.adapter, named.weight) for named in adapters],
            warnings=warnings,
        )
        facts = {
            "inserted": [place.network.module for place in slots.places],
            "adapters": [dict(one) for one in entries],
        }
        read = [checkpoint.path, *(named.adapter.path for named in adapters)]
        written = write_edited(graph, model, output, files=files, facts=facts, inputs=read, overwrite=overwrite)
        checkpoint.check_unchanged()
    return GraphInsertion(output, path, (), entries, nodes, written, warnings=warnings)


def _check(adapters: Sequence[NamedAdapter], slots: ModuleSlots) -> None:
    """Refuse what only a graph of our own takes.

    Raises:
        FitError: updates of weights beside modules, an invertible adapter, a gate, or a branch without its own sum.
    """
    for named in adapters:
        if not named.modules or named.rest.updates:
            what = "updates of weights beside modules" if named.modules else "no module, where others have some"
            raise FitError(f"has {what}", file=named.adapter.path, hint="insert them one after the other: `without=`")
    for place in slots.places:
        network = place.network
        why = "an invertible adapter" if isinstance(network, Coupling) else "a gate" if network.form.gated else ""
        if not why and not isinstance(network, Coupling) and not network.form.finishes:
            why = "`original_ln_after` off"
        if why:
            raise FitError(
                f"{why} cannot be put into a graph that others made",
                tensor=network.module,
                hint="`surgery export-onnx BASE ADAPTER` makes a graph with it",
            )


def _branches(recipe: Model, places: Iterable[PlacedModule]) -> list[tuple[Branch, Projection]]:
    """The branches that get modules, each with the last map of its body, in the order of the network."""
    wanted = {(place.layer, place.behind) for place in places}
    found = []
    for number, layer in enumerate(recipe.layers):
        if (number, "attention") in wanted:
            found.append((layer.attention_branch, layer.attention.output))
        if (number, "mlp") in wanted:
            if isinstance(layer.mlp, Experts):
                raise FitError(
                    "a module behind a mixture of experts cannot be put into a graph that others made",
                    hint="`surgery export-onnx BASE ADAPTER` makes a graph with it",
                )
            found.append((layer.mlp_branch, layer.mlp.output))
    return found


def _sums(
    graph: OnnxGraph, model: onnx.ModelProto, checkpoint: Checkpoint, projections: Sequence[Projection]
) -> list[BranchSum]:
    """Where the results of the maps are summed up with what their branches began with."""
    turned = {projection.weight: projection.transposed for projection in projections}
    places = places_of(graph, checkpoint, checkpoint.main, turned)
    unfuse(model.graph, {place.tensor for some in places.values() for place in some})
    spots = {
        name: spot
        for spot in spots_of(model.graph, places, lambda weight, kind: weight if kind == "product" else None)
        for name, _ in spot.parts
    }
    readers = readers_of(model.graph)
    found = []
    for projection in projections:
        spot = spots.get(projection.weight)
        if spot is None or spot.use.graph is not model.graph:
            raise FitError("is not used by a product of the graph itself", file=graph.path, tensor=projection.weight)
        found.append(sum_behind(model.graph, spot.use, readers, projection.weight))
    return found


def _build(
    model: onnx.ModelProto,
    component: Component,
    io: DType,
    slots: ModuleSlots,
    sums: Sequence[tuple[Branch, BranchSum]],
    width: int,
    path: Path,
) -> None:
    """Put the nodes of modules in front of the sums, their inputs among those of the graph."""
    built = Graph()
    weights = GraphWeights(built, component, io, replaceable=slots.inputs)
    opset = next((one.version for one in model.opset_import if one.domain in ("", "ai.onnx")), 1)
    ctx = Context(built, weights, TARGETS["portable"], io, opset=opset)
    results = []
    for branch, found in sums:
        at, begun = branch.inserted[0].module, built.nodes
        result = body_with_modules(ctx, branch, found.other, found.body, found.bias, width, at)
        results.append((found, result, slice(begun, built.nodes)))
    names = names_in(model.graph)
    _internalise(built.proto, component, slots.inputs.names)
    if clash := sorted(names & names_in(built.proto)):
        raise FitError("the graph has a value of this name already", file=path, tensor=clash[0])
    for found, result, own in results:
        _splice(model.graph, built.proto.node[own], found, result)
    model.graph.initializer.extend(built.proto.initializer)
    model.graph.input.extend(built.proto.input)


def _splice(graph: onnx.GraphProto, nodes: Iterable[onnx.NodeProto], found: BranchSum, result: str) -> None:
    """Put nodes in front of the sum that reads the body's result, and give it `result` instead."""
    position = next(number for number, node in enumerate(graph.node) if node == found.node)
    graph.node[position].input[found.position] = result
    for node in reversed(list(nodes)):
        graph.node.insert(position, node)


def _internalise(proto: onnx.GraphProto, component: Component, inputs: Collection[str]) -> None:
    """Give constants names that no exporter has, and norms, which the modules read too, their values."""
    files = {shard.path.name: shard.file for shard in component.shards}
    names = {}
    for tensor in proto.initializer:
        if tensor.name in inputs:
            continue
        if tensor.external_data:
            field = {one.key: one.value for one in tensor.external_data}
            tensor.raw_data = bytes(files[field["location"]].read(int(field["offset"]), int(field["length"])))
            del tensor.external_data[:]
            tensor.ClearField("data_location")
        before, tensor.name = tensor.name, f"inserted modules/{tensor.name}"
        names[before] = tensor.name
    for node in proto.node:
        node.input[:] = [names.get(value, value) for value in node.input]


def _contents(named: NamedAdapter, places: Sequence[str], io: DType) -> bytes:
    """The ``.onnx_adapter`` file of one adapter."""
    dtype = Graph().numpy_type(io)
    return adapter_bytes(
        {key: stored_array(array, dtype, key) for key, array in values_at(named.modules, places).items()}
    )
