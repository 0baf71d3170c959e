# SPDX-License-Identifier: Apache-2.0
"""Slots for adapters in a graph that somebody else made: where its weights lie is found by value."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.engine.card import CARD
from surgery.onnx.edit.graph_card import edited_card
from surgery.onnx.edit.output import editable, write_edited
from surgery.onnx.edit.ranges import warning_of_ranges
from surgery.onnx.export.adapters import NamedAdapter, entry, issues_of
from surgery.onnx.export.additions import BoundAdditions, bound_additions
from surgery.onnx.export.replaced import is_small
from surgery.onnx.fold.standing import warning_of_branches
from surgery.onnx.graph.contract import Slot
from surgery.onnx.graph.inserted import state_inserted, stated_inserted
from surgery.onnx.insert.contents import SlotContents, factors_for
from surgery.onnx.insert.gates import GatedAdapter, add_gated
from surgery.onnx.insert.places import places_of
from surgery.onnx.insert.replaced import replaced_tensors
from surgery.onnx.insert.result import GraphInsertion
from surgery.onnx.insert.slots import SlotShape, Spot, add_slots, spots_of
from surgery.onnx.insert.unfuse import unfuse
from surgery.onnx.run.adapter_file import AdapterFile, sha256_of
from surgery_formats.containers.onnx import OnnxGraph, open_graph
from surgery_formats.errors import FitError
from surgery_formats.models.checkpoint import Checkpoint
from surgery_formats.text import show

if TYPE_CHECKING:
    import onnx

__all__ = ["insert_adapters"]


def insert_adapters(
    path: Path,
    adapters: Sequence[NamedAdapter],
    checkpoint: Checkpoint,
    output: Path | None,
    *,
    required: bool = False,
    gated: bool = False,
    overwrite: bool = False,
) -> GraphInsertion:
    """Add slots for `adapters` to the graph `path`, and write each adapter as a file for them.

    Args:
        path: The graph.
        adapters: The adapters; every weight that one of them adds to gets a slot.
        checkpoint: The base that the graph was made of.
        output: Folder to make; None for a dry run.
        required: Leave the inputs without a default, for runtimes that pass no optional ones.
        gated: Put the adapters into the graph, each behind an input for its strength, which is by default its weight.
        overwrite: Replace an existing output.

    Raises:
        InputError: the graph cannot be read.
        FitError: the graph was made of another base, a weight is used where no slot can be, or an adapter holds what no
            slot can.
        OutputExistsError, ResourceError, ProofError: nothing is written.
    """
    graph = open_graph(path)
    bounds = [bound_additions(named.adapter, checkpoint, is_small) for named in adapters]
    _check_replaced(bounds, required=required, gated=gated)
    model = editable(graph, inputs=True)
    replaced = replaced_tensors(graph, model, checkpoint, bounds)
    spots, shapes = _located(graph, model, checkpoint, bounds)
    _check_free(model, shapes, path)
    before = _nodes(model)
    slots: tuple[Slot, ...] = ()
    files: dict[str, bytes | AdapterFile] = {}
    if gated:
        parts = _gated(adapters, bounds, shapes)
        add_gated(model, spots, shapes, parts, required=required)
        entries = tuple(
            entry(named, "gated", strength=part.gate, weight=part.strength)
            for named, part in zip(adapters, parts, strict=True)
        )
    else:
        _check_unweighted(adapters)
        slots = tuple(shape.slot for shape in shapes.values())
        names = [f"adapters/{named.name}.onnx_adapter" for named in adapters]
        for name, bound in zip(names, bounds, strict=True):
            files[name] = SlotContents(bound, shapes, replaced.arrays(bound.replaced, graph)).file
        add_slots(model, spots, shapes, required=required)
        entries = tuple(entry(named, "swapped", file=name) for named, name in zip(adapters, names, strict=True))
    known = stated_inserted(model, path)
    now = replace(
        known,
        slots=(*known.slots, *slots),
        adapters=(*known.adapters, *entries),
        replaceable=(*known.replaceable, *replaced.inputs),
    )
    state_inserted(model, now, path)
    warnings = (*issues_of(adapters, checkpoint), *warning_of_ranges(model), *warning_of_branches(graph))
    nodes, written = _nodes(model) - before, 0
    for data in files.values():
        sha256_of(data)  # makes every array once: what a slot cannot hold is refused now, in a dry run too
    if output is not None:
        title = "with adapters inside" if gated else "with slots for adapters"
        files[CARD] = edited_card(
            path,
            title,
            [*([("slots", str(len(slots)))] if slots else []), ("nodes more", str(nodes))],
            base=checkpoint,
            adapters=[(named.adapter, named.weight) for named in adapters],
            relation="merge" if gated else "",
            warnings=warnings,
        )
        facts = {"slots": [slot.weight for slot in slots], "adapters": [dict(one) for one in entries]}
        read = [checkpoint.path, *(named.adapter.path for named in adapters)]
        written = write_edited(graph, model, output, files=files, facts=facts, inputs=read, overwrite=overwrite)
        checkpoint.check_unchanged()
    return GraphInsertion(output, path, slots, entries, nodes, written, required, replaced.inputs, warnings)


def _check_replaced(bounds: Sequence[BoundAdditions], *, required: bool, gated: bool) -> None:
    """Refuse parameters in full where they would have no default, or no strength.

    Raises:
        FitError: there are some.
    """
    if (required or gated) and (found := next((bound for bound in bounds if bound.replaced), None)):
        why = "in an input with the base's values as default" if required else "as it is: it has no strength"
        raise FitError(
            f"it gives '{show(next(iter(found.replaced)))}' in full, which a graph takes {why}",
            file=found.adapter.path,
            hint="without `required=`" if required else "without `gated=`, or merge it",
        )


def _gated(
    adapters: Sequence[NamedAdapter], bounds: Sequence[BoundAdditions], shapes: Mapping[str, SlotShape]
) -> list[GatedAdapter]:
    return [
        GatedAdapter(
            named.name, f"strength.{named.name}", named.weight, bound.weights, partial(_factors, bound, shapes)
        )
        for named, bound in zip(adapters, bounds, strict=True)
    ]


def _check_unweighted(adapters: Sequence[NamedAdapter]) -> None:
    """Refuse an adapter with a weight, which a slot has no place for.

    Raises:
        FitError: there is one.
    """
    if heavy := next((named for named in adapters if named.weight != 1.0), None):
        raise FitError(
            f"has the weight {heavy.weight:g}, and slots take an adapter as it is",
            file=heavy.adapter.path,
            hint="with `gated=True` it is the strength",
        )


def _factors(bound: BoundAdditions, shapes: Mapping[str, SlotShape], name: str) -> tuple[Any, Any]:
    return factors_for(bound, name, shapes[name])


def _nodes(model: onnx.ModelProto) -> int:
    from surgery.onnx.edit.uses import graphs_in

    return sum(len(inner.node) for inner in graphs_in(model.graph))


def _located(
    graph: OnnxGraph, model: onnx.ModelProto, checkpoint: Checkpoint, bounds: Sequence[BoundAdditions]
) -> tuple[list[Spot], dict[str, SlotShape]]:
    """Where to add, and the shapes of the slots by weight."""
    component = bounds[0].component
    sizes = {name: size for bound in bounds for name, size in bound.sizes.items()}
    if any(bound.component.name != component.name for bound in bounds):
        raise FitError("the adapters are for different networks, and a graph is one", file=graph.path)
    only = {component.embedding: "table", component.head: "product"}  # which may be one tensor

    def slot_of(weight: str, kind: str) -> str | None:
        return weight if only.get(weight, kind) == kind else None

    turned = {name: any(name in bound.turned for bound in bounds) for name in sizes}
    places = places_of(graph, checkpoint, component, turned) if turned else {}
    unfuse(model.graph, {place.tensor for some in places.values() for place in some})
    spots = spots_of(model.graph, places, slot_of)
    shapes: dict[str, SlotShape] = {}
    for spot in spots:
        for name, place in spot.parts:
            shape = _shape(name, sizes[name], spot, graph.shapes[place.tensor])
            if shapes.setdefault(name, shape) != shape:
                raise FitError(f"'{show(name)}' is used in two ways, and one slot cannot serve both", file=graph.path)
    if missing := [name for name in sizes if name not in shapes]:
        raise FitError(f"nothing in the graph uses the weight '{show(missing[0])}'", file=graph.path)
    return spots, {name: shapes[name] for name in sizes}


def _shape(name: str, size: tuple[int, ...], spot: Spot, dims: tuple[int, ...]) -> SlotShape:
    out, width = size[:2]
    module = name.removesuffix(".weight")
    slot = Slot(name, f"{module}.lora_A.weight", f"{module}.lora_B.weight")
    element, kind = spot.use.element, spot.use.kind
    if kind == "convolution":
        kernel = dims[2:]
        return SlotShape(slot, (None, width, *kernel), (out, None, *([1] * len(kernel))), element, table=False)
    if kind == "table":
        return SlotShape(slot, (out, None), (None, width), element, table=True)
    return SlotShape(slot, (width, None), (None, out), element, table=False)


def _check_free(model: onnx.ModelProto, shapes: Mapping[str, SlotShape], path: Path) -> None:
    from surgery.onnx.edit.nodes import names_in

    taken = names_in(model.graph)
    for shape in shapes.values():
        for name in (shape.slot.A, shape.slot.B):
            if name in taken:
                raise FitError(
                    "the graph has a slot for this already",
                    file=path,
                    tensor=name,
                    hint="write the adapter for the slots that are there: surgery convert",
                )
