# SPDX-License-Identifier: Apache-2.0
"""Fold the branches of LoRAs in a graph's file into its weights, and write the graph anew."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from surgery.onnx.edit.output import Change, editable, write_edited
from surgery.onnx.fold.folding import FoldedWeight, fold_branches
from surgery.onnx.graph.adapter_names import check_adapter_file
from surgery.onnx.graph.contract import from_metadata
from surgery.onnx.graph.inserted import INSERTED, inserted_in
from surgery.reports.output import DRY_RUN, PATH
from surgery.reports.result import elapsed, summarised
from surgery.reports.sections import Facts, Note
from surgery.reports.summary import Summary, warning_notes
from surgery.reports.values import Name, Phrase, Value
from surgery_formats.adapters.onnx_adapter.names import factor_name
from surgery_formats.containers.onnx import open_graph
from surgery_formats.containers.onnx_adapter import open_onnx_adapter
from surgery_formats.errors import FitError
from surgery_formats.text import closest, show

if TYPE_CHECKING:
    import onnx

__all__ = ["FoldResult", "fold_graph"]

Array = npt.NDArray[Any]


@summarised
@dataclass(frozen=True)
class FoldResult:
    """What became of a graph whose branches were folded.

    Attributes:
        output: The folder; None for a dry run.
        graph: The graph it was made of.
        folded: The tensors that changed, each with the node that reads it and the rank of what was added.
        removed: Nodes that are gone.
        nbytes: Bytes written.
        warnings: What the user should know.
        seconds: How long it took.
    """

    output: Path | None
    graph: Path
    folded: tuple[tuple[str, str, int], ...]
    removed: int
    nbytes: int = 0
    warnings: tuple[str, ...] = ()
    seconds: float = elapsed()

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "output": None if self.output is None else str(self.output),
            "graph": str(self.graph),
            "folded": [{"tensor": tensor, "node": node, "rank": rank} for tensor, node, rank in self.folded],
            "removed": self.removed,
            "nbytes": self.nbytes,
            "seconds": round(self.seconds, 3),
            "warnings": list(self.warnings),
        }

    def summary(self, *, verbose: bool = False, output: Path | None = None) -> Summary:
        """How many branches went into weights; with `verbose` which.

        Args:
            verbose: Name every tensor.
            output: Where a dry run would write.
        """
        where = self.output or output
        empty = sum(1 for _, _, rank in self.folded if not rank)
        unchanged = f", {empty} of them empty" if empty else ""
        facts: list[tuple[str, Phrase]] = [
            ("graph", Name(self.graph, PATH)),
            ("folded", f"{len(self.folded)} branches{unchanged}, {self.removed} nodes less"),
        ]
        if where is not None:
            size = Value(self.nbytes, "bytes")
            facts.append(
                ("wrote", (Name(where, PATH), ": ", size)) if self.output else ("would write", Name(where, PATH))
            )
        notes = [Note(f"{show(tensor)}: rank {rank}") for tensor, _, rank in self.folded] if verbose else []
        notes += [DRY_RUN] if self.output is None else []
        return Summary("Fold", (Facts(tuple(facts)), *notes, *warning_notes(self.warnings)))


def fold_graph(
    path: Path, adapters: Sequence[tuple[Path, float]], output: Path | None, *, overwrite: bool = False
) -> FoldResult:
    """Fold every branch of the graph `path` into the weight beside it.

    Args:
        path: The graph.
        adapters: What goes into the slots, each with its weight: ``.onnx_adapter`` files, or names of adapters that are
            in the graph with an input for their strength.
        output: Folder to make; None for a dry run.
        overwrite: Replace an existing output.

    Raises:
        InputError: something cannot be read.
        NothingChangedError: there is no branch in the graph.
        FitError: a branch that is no plain sum, beside codes, or an adapter that the graph has no inputs for.
        OutputExistsError, ResourceError, ProofError: nothing is written.
    """
    graph = open_graph(path)
    model = editable(graph)
    tensors = _tensors(model)
    given, files = _given(model, adapters, path)
    done = fold_branches(graph, model, given)
    baked = _baked(model, given)
    _note(model, path)
    everything: Mapping[str, FoldedWeight] = {**done.weights, **done.copies}
    folded = tuple((name, weight.node, weight.rank) for name, weight in everything.items())
    written = 0
    if output is not None:
        dropped = tensors - _tensors(model)
        changed: dict[str, Change] = {name: weight.added_to for name, weight in done.weights.items() if weight.rank}
        changed |= {name: partial(_instead, values) for name, values in baked.items()}
        facts = {
            "folded": [{"tensor": tensor, "rank": rank} for tensor, _, rank in folded],
            "adapters": [{"name": Path(adapter).name, "weight": weight} for adapter, weight in adapters],
        }
        written = write_edited(
            graph,
            model,
            output,
            files={},
            facts=facts,
            inputs=files,
            overwrite=overwrite,
            changed=changed,
            dropped=dropped,
        )
    return FoldResult(output, path, folded, done.removed, written)


def _baked(model: onnx.ModelProto, given: Mapping[str, Array]) -> dict[str, Array]:
    """Values of tensors that an adapter gives in full: they are no inputs any more."""
    stored = {one.name for one in model.graph.initializer}
    baked = {name: values for name, values in given.items() if name in stored}
    for number in range(len(model.graph.input) - 1, -1, -1):
        if model.graph.input[number].name in baked:
            del model.graph.input[number]
    return baked


def _instead(new: Array, old: Array) -> Array:
    """Other values in the place of a tensor's.

    Raises:
        FitError: they are of another type or shape.
    """
    if (new.dtype, new.shape) != (old.dtype, old.shape):
        raise FitError(f"the adapter has {new.dtype} {list(new.shape)} for a tensor {old.dtype} {list(old.shape)}")
    return new


def _tensors(model: onnx.ModelProto) -> set[str]:
    """Names of the initializers and constants of the main graph."""
    constants = (node.output[0] for node in model.graph.node if node.op_type == "Constant")
    return {one.name for one in model.graph.initializer} | set(constants)


def _given(
    model: onnx.ModelProto, adapters: Sequence[tuple[Path, float]], path: Path
) -> tuple[dict[str, Array], list[Path]]:
    """Values of inputs by name, and the files that they were read from."""
    inputs = [one.name for one in model.graph.input]
    known = _adapters(model, path)
    given: dict[str, Array] = {}
    files = []
    for adapter, weight in adapters:
        if (strength := known.get(str(adapter))) is not None:
            given[strength] = np.array([weight], np.float32)
            continue
        file = Path(adapter)
        check_adapter_file(file, path, known)
        files.append(file)
        for tensor in open_onnx_adapter(file).tensors:
            if tensor.name not in inputs:
                raise FitError(
                    "the graph has no such input",
                    file=file,
                    tensor=tensor.name,
                    hint=closest(tensor.name, inputs) or "surgery convert writes it for this graph",
                )
            if tensor.name in given:
                raise FitError("two adapters fill this slot", file=file, tensor=tensor.name, hint="combine them first")
            given[tensor.name] = _weighted(tensor.name, np.asarray(tensor.read()), weight, file)
    return given, files


def _weighted(name: str, values: Array, weight: float, file: Path) -> Array:
    """What an adapter with a weight gives an input: its second factors are multiplied, in float32.

    Raises:
        FitError: the input is no factor's, so that a weight means nothing.
    """
    if weight == 1.0:
        return values
    found = factor_name(name)
    if found is None:
        raise FitError(
            f"the adapter has the weight {weight:g}, and gives this as it is",
            file=file,
            tensor=name,
            hint="the weight 1",
        )
    return values.astype(np.float32) * np.float32(weight) if found.side == "B" else values


def _adapters(model: onnx.ModelProto, path: Path) -> dict[str, str]:
    """The inputs for the strengths of the adapters in a graph, by the adapter's name."""
    props = {one.key: one.value for one in model.metadata_props}
    contract = from_metadata(props, path)
    entries = (*(contract.adapters if contract else ()), *inserted_in(props, path).adapters)
    return {str(one["name"]): str(one["strength"]) for one in entries if "strength" in one}


def _note(model: onnx.ModelProto, path: Path) -> None:
    """Take out of what the graph says of itself the inputs that it no longer has, and adapters that were for these alone."""
    inputs = {one.name for one in model.graph.input}
    props = {one.key: one.value for one in model.metadata_props}
    contract, known = from_metadata(props, path), inserted_in(props, path)
    before = contract or known
    slots = tuple(slot for slot in before.slots if slot.A in inputs)
    others = tuple(name for name in before.replaceable if name in inputs)
    gone = {"gated"} if slots or others else {"gated", "swapped"}
    adapters = tuple(one for one in before.adapters if one.get("mode") not in gone or one.get("strength") in inputs)
    if contract is not None:
        props |= replace(contract, slots=slots, adapters=adapters, replaceable=others).as_metadata()
    elif slots or others or adapters:
        props |= replace(known, slots=slots, adapters=adapters, replaceable=others).as_metadata()
    else:
        props.pop(INSERTED, None)
    del model.metadata_props[:]
    for key, value in props.items():
        model.metadata_props.add(key=key, value=value)
