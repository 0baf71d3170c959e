# SPDX-License-Identifier: Apache-2.0
"""Slots for adapters in a graph that somebody else made: where its weights lie is found by value."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy.typing as npt

from surgery.onnx.edit.output import editable, write_edited
from surgery.onnx.edit.ranges import warning_of_ranges
from surgery.onnx.export.adapters import NamedAdapter, entry
from surgery.onnx.export.additions import BoundAdditions, bound_additions, factors_of
from surgery.onnx.export.replaced import is_small
from surgery.onnx.graph.contract import Slot, from_metadata
from surgery.onnx.graph.inserted import Inserted, inserted_in
from surgery.onnx.insert.gates import GatedAdapter, add_gated
from surgery.onnx.insert.places import places_of
from surgery.onnx.insert.replaced import replaced_tensors
from surgery.onnx.insert.slots import SlotShape, Spot, add_slots, spots_of
from surgery.onnx.insert.unfuse import unfuse
from surgery.onnx.run.adapter_file import adapter_bytes
from surgery.reports.output import DRY_RUN, PATH
from surgery.reports.result import elapsed, summarised
from surgery.reports.sections import Facts, Note
from surgery.reports.summary import Summary, warning_notes
from surgery.reports.values import Name, Phrase, Value
from surgery_formats.binding.bind import warn_of_other_base
from surgery_formats.containers.onnx import OnnxGraph, open_graph
from surgery_formats.errors import FitError
from surgery_formats.models.checkpoint import Checkpoint
from surgery_formats.text import show

if TYPE_CHECKING:
    import onnx

__all__ = ["GraphInsertion", "insert_adapters"]

Array = npt.NDArray[Any]


@summarised
@dataclass(frozen=True)
class GraphInsertion:
    """What became of a graph that got slots.

    Attributes:
        output: The folder; None for a dry run.
        graph: The graph it was made of.
        slots: The slots, in order.
        adapters: What the graph says of each adapter.
        nodes: Nodes that were added.
        nbytes: Bytes written.
        required: Whether the slots are inputs without a default.
        replaced: Tensors of the graph that became optional inputs, for parameters that an adapter gives in full.
        warnings: What the user should know.
        seconds: How long it took.
    """

    output: Path | None
    graph: Path
    slots: tuple[Slot, ...]
    adapters: tuple[Mapping[str, Any], ...]
    nodes: int
    nbytes: int = 0
    required: bool = False
    replaced: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    seconds: float = elapsed()

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "type": "slots",
            "output": None if self.output is None else str(self.output),
            "graph": str(self.graph),
            "slots": [{"weight": slot.weight, "A": slot.A, "B": slot.B} for slot in self.slots],
            "adapters": [dict(adapter) for adapter in self.adapters],
            "required": self.required,
            "replaced": list(self.replaced),
            "nodes": self.nodes,
            "nbytes": self.nbytes,
            "seconds": round(self.seconds, 3),
            "warnings": list(self.warnings),
        }

    def summary(self, *, verbose: bool = False, output: Path | None = None) -> Summary:
        """The slots and the adapters for them; with `verbose` the inputs by name.

        Args:
            verbose: Name every slot.
            output: Where a dry run would write.
        """
        where = self.output or output
        kind = "inputs without a default" if self.required else "optional inputs"
        facts: list[tuple[str, Phrase]] = [("into", Name(self.graph, PATH))]
        if self.replaced:
            facts.append(
                ("replaced", f"{len(self.replaced)} tensors are optional inputs, the base's values by default")
            )
        if self.slots:
            facts.append(("slots", f"{len(self.slots)} ({2 * len(self.slots)} {kind})"))
        for one in self.adapters:
            name = Name(one["name"], 60)
            if "file" in one:
                facts.append(("adapter", (name, f": {one['file']}")))
            else:
                default = "" if self.required else f", by default {one['weight']:g}"
                facts.append(("adapter", (name, ": inside, input ", Name(one["strength"], 80), default)))
        facts.append(("nodes", f"{self.nodes} more"))
        size: Phrase = Value(self.nbytes, "bytes")
        if where is not None:
            facts.append(("wrote" if self.output else "would write", (Name(where, PATH), ": ", *_pair(size))))
        notes = [Note(f"{show(slot.A)}, {show(slot.B)}") for slot in self.slots] if verbose else []
        if not self.required and any(one.get("mode") == "swapped" or "strength" in one for one in self.adapters):
            notes.append(Note("JavaScript and Triton pass no optional inputs: insert with --required for these"))
        notes += [DRY_RUN] if self.output is None else []
        return Summary("Insertion", (Facts(tuple(facts)), *notes, *warning_notes(self.warnings)))


def _pair(phrase: Phrase) -> tuple[Any, ...]:
    return phrase if isinstance(phrase, tuple) else (phrase,)


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
    files: dict[str, bytes] = {}
    slots = () if gated else tuple(shape.slot for shape in shapes.values())
    if gated:
        parts = [
            GatedAdapter(named.name, f"strength.{named.name}", named.weight, _factors(bound, shapes))
            for named, bound in zip(adapters, bounds, strict=True)
        ]
        add_gated(model, spots, shapes, parts, required=required)
        entries = tuple(
            entry(named, "gated", strength=part.gate, weight=part.strength)
            for named, part in zip(adapters, parts, strict=True)
        )
    else:
        if heavy := next((named for named in adapters if named.weight != 1.0), None):
            raise FitError(
                f"has the weight {heavy.weight:g}, and slots take an adapter as it is",
                file=heavy.adapter.path,
                hint="with `gated=True` it is the strength",
            )
        names = [f"adapters/{named.name}.onnx_adapter" for named in adapters]
        for name, bound in zip(names, bounds, strict=True):
            files[name] = adapter_bytes(_arrays(bound, shapes) | replaced.arrays(bound.replaced, graph))
        add_slots(model, spots, shapes, required=required)
        entries = tuple(entry(named, "swapped", file=name) for named, name in zip(adapters, names, strict=True))
    _note(model, Inserted(slots, entries, replaced.inputs), path)
    warnings = tuple(
        text
        for named in adapters
        for text in (*named.adapter.known_issues(), *warn_of_other_base([named.adapter], checkpoint))
    )
    warnings += warning_of_ranges(model)
    nodes, written = _nodes(model) - before, 0
    if output is not None:
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


def _factors(bound: BoundAdditions, shapes: Mapping[str, SlotShape]) -> dict[str, tuple[Array, Array]]:
    """A and B of one adapter for every weight."""
    factors = {}
    for name, additions in bound.weights.items():
        size, table = bound.sizes[name], shapes[name].table
        inputs = math.prod(size[1:])
        factors[name] = factors_of(additions, (size[0], inputs) if table else (inputs, size[0]), table=table)
    return factors


def _arrays(bound: BoundAdditions, shapes: Mapping[str, SlotShape]) -> dict[str, Array]:
    """What one adapter puts into the slots."""
    arrays: dict[str, Array] = {}
    for name, factors in _factors(bound, shapes).items():
        shape = shapes[name]
        arrays[shape.slot.A], arrays[shape.slot.B] = shape.shaped(*factors)
    return arrays


def _note(model: onnx.ModelProto, new: Inserted, path: Path) -> None:
    """Say in the graph what was inserted: in its contract, if it has one."""
    props = {one.key: one.value for one in model.metadata_props}
    contract, known = from_metadata(props, path), inserted_in(props, path)
    before = contract or known
    slots, adapters = (*before.slots, *new.slots), (*before.adapters, *new.adapters)
    inputs = (*before.replaceable, *new.replaceable)
    if contract is not None:
        props |= replace(contract, slots=slots, adapters=adapters, replaceable=inputs).as_metadata()
    else:
        props |= replace(known, slots=slots, adapters=adapters, replaceable=inputs).as_metadata()
    del model.metadata_props[:]
    for key, value in props.items():
        model.metadata_props.add(key=key, value=value)
