# SPDX-License-Identifier: Apache-2.0
"""Fold the branches of LoRAs in a graph's file into its weights, and write the graph anew."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from surgery.engine.card import CARD, name_of
from surgery.onnx.edit.graph_card import edited_card, folded_relation
from surgery.onnx.edit.output import NewValues, editable, write_edited
from surgery.onnx.fold.folding import FoldedWeight, fold_branches
from surgery.onnx.fold.result import FoldResult
from surgery.onnx.graph.adapter_names import check_adapter_file
from surgery.onnx.graph.inserted import state_inserted, stated_inserted
from surgery_formats.adapters.onnx_adapter.names import factor_name
from surgery_formats.containers.onnx import open_graph
from surgery_formats.containers.onnx_adapter import open_onnx_adapter
from surgery_formats.errors import FitError
from surgery_formats.tensors.tensor import StoredTensor
from surgery_formats.text import closest

if TYPE_CHECKING:
    import onnx

__all__ = ["fold_graph"]

Array = npt.NDArray[Any]


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
    _check_apart(model, path)
    tensors = _tensors(model)
    given, files = _given(model, adapters, path)
    done = fold_branches(graph, model, given)
    baked = _baked(model, given)
    _note(model, path)
    everything: Mapping[str, FoldedWeight] = {**done.weights, **done.copies}
    folded = tuple((name, weight.node, weight.rank) for name, weight in everything.items())
    written = 0
    if output is not None:
        names = ", ".join(name_of(path) for path, _ in adapters)
        title = f"with {names or 'its branches'} folded into its weights"
        rows = [("branches that became part of a weight", str(len(folded))), ("nodes less", str(done.removed))]
        dropped = tensors - _tensors(model)
        changed: dict[str, NewValues] = {name: weight.added_to for name, weight in done.weights.items() if weight.rank}
        changed |= {name: partial(_instead, values) for name, values in baked.items()}
        facts = {
            "folded": [{"tensor": tensor, "rank": rank} for tensor, _, rank in folded],
            "adapters": [{"name": Path(adapter).name, "weight": weight} for adapter, weight in adapters],
        }
        written = write_edited(
            graph,
            model,
            output,
            files={CARD: edited_card(path, title, rows, relation=folded_relation(path, added=bool(adapters)))},
            facts=facts,
            inputs=files,
            overwrite=overwrite,
            changed=changed,
            dropped=dropped,
        )
    return FoldResult(output, path, folded, done.removed, written)


def _check_apart(model: onnx.ModelProto, path: Path) -> None:
    """Refuse slots that several weights share: their sum is behind all of these, not behind one.

    Raises:
        FitError: there are some.
    """
    if slot := next((one for one in stated_inserted(model, path).slots if one.parts), None):
        raise FitError(
            "is a packed slot, which several weights share, and cannot be folded",
            file=path,
            tensor=slot.A,
            hint="merge the adapter at the export, or export without `packed=`",
        )


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


def _given(model: onnx.ModelProto, adapters: Sequence[tuple[Path, float]], path: Path) -> tuple[_Given, list[Path]]:
    """Values of inputs by name, and the files that they are read from."""
    inputs = [one.name for one in model.graph.input]
    known = _adapters(model, path)
    given: dict[str, Callable[[], Array]] = {}
    files = []
    for adapter, weight in adapters:
        if (strength := known.get(str(adapter))) is not None:
            given[strength] = partial(np.array, [weight], np.float32)
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
            given[tensor.name] = partial(_read, tensor, _factor_of(tensor.name, weight, file))
    return _Given(given), files


class _Given(Mapping[str, Array]):
    """Values of inputs, read whenever one is asked for: all of them are as large as an adapter."""

    def __init__(self, read: Mapping[str, Callable[[], Array]]) -> None:
        self._read = read

    def __getitem__(self, name: str) -> Array:
        return self._read[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._read)

    def __len__(self) -> int:
        return len(self._read)

    def __contains__(self, name: object) -> bool:
        return name in self._read


def _read(tensor: StoredTensor, factor: float) -> Array:
    values = np.asarray(tensor.read())
    return values if factor == 1.0 else values.astype(np.float32) * np.float32(factor)


def _factor_of(name: str, weight: float, file: Path) -> float:
    """By what an adapter with a weight multiplies, in float32, what it gives an input: only its second factors.

    Raises:
        FitError: the input is no factor's, so that a weight means nothing.
    """
    if weight == 1.0:
        return 1.0
    found = factor_name(name)
    if found is None:
        raise FitError(
            f"the adapter has the weight {weight:g}, and gives this as it is",
            file=file,
            tensor=name,
            hint="the weight 1",
        )
    return weight if found.side == "B" else 1.0


def _adapters(model: onnx.ModelProto, path: Path) -> dict[str, str]:
    """The inputs for the strengths of the adapters in a graph, by the adapter's name."""
    entries = stated_inserted(model, path).adapters
    return {str(one["name"]): str(one["strength"]) for one in entries if "strength" in one}


def _note(model: onnx.ModelProto, path: Path) -> None:
    """Take out of what the graph says of itself the inputs that it no longer has, and adapters that were for these alone."""
    inputs, before = {one.name for one in model.graph.input}, stated_inserted(model, path)
    slots = tuple(slot for slot in before.slots if slot.A in inputs)
    others = tuple(name for name in before.replaceable if name in inputs)
    gone = {"gated"} if slots or others else {"gated", "swapped"}
    adapters = tuple(one for one in before.adapters if one.get("mode") not in gone or one.get("strength") in inputs)
    state_inserted(model, replace(before, slots=slots, adapters=adapters, replaceable=others), path)
