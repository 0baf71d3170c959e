# SPDX-License-Identifier: Apache-2.0
"""What a merge changes in a graph: every tensor with the updates of the weights in it; refused unless all is found."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from surgery.onnx.edit.uses import graphs_in
from surgery.onnx.locate.matrix import Matrix
from surgery.onnx.locate.pieces import LocatedPiece, Place
from surgery.onnx.locate.search import Located, located_weights
from surgery.onnx.locate.ties import is_told
from surgery.onnx.locate.wanted import Wanted, label_of
from surgery_formats.binding.bind import Binding
from surgery_formats.binding.edits import Edit
from surgery_formats.errors import FitError
from surgery_formats.text import listing, show

if TYPE_CHECKING:
    import onnx

__all__ = ["Change", "TensorChange", "changes_of", "touched_labels"]

_GATHERS = frozenset(("Gather", "GatherBlockQuantized", "EmbedLayerNormalization"))
_PACKED = 4  # codes in a byte, at most
_KEEPING = frozenset(("Identity", "Cast", "Transpose", "DequantizeLinear"))


@dataclass(frozen=True, eq=False)
class Change:
    """A piece that gets new values.

    Attributes:
        piece: Where.
        edit: The weight's operations.
        fold: The vector that its columns are multiplied by, or None.
    """

    piece: LocatedPiece
    edit: Edit
    fold: Wanted | None = None


@dataclass(frozen=True, eq=False)
class TensorChange:
    """All changes of one tensor of the graph."""

    name: str
    place: Place
    changes: tuple[Change, ...]


def _label(edit: Edit) -> str:
    return label_of(edit.component, edit.name)


def _keeps(edit: Edit) -> bool:
    """Whether a head that was tied has a tensor of its own now, with the values that it had."""
    return edit.added and not edit.operations and edit.replaced is None


def touched_labels(binding: Binding) -> set[str]:
    """Labels of the weights, as they are stored, that a binding changes."""
    labels = set()
    for edit in binding.edits.values():
        labels.add(_label(edit))
        component = binding.checkpoint.components[edit.component]
        if edit.name in component.aliases:
            labels.add(label_of(edit.component, component.aliases[edit.name]))
    return labels


def changes_of(located: Located, binding: Binding) -> tuple[TensorChange, ...]:
    """The tensors of a graph that a merge changes.

    Raises:
        FitError: a weight that an adapter changes is not in the graph wholly, has no place in it, or shares its tensor
            with one that does not change.
    """
    edits = {_label(edit): edit for edit in binding.edits.values()}
    by_tensor: dict[str, list[Change]] = {}
    missing: list[str] = []
    owners: dict[str, Wanted] = {weight.label: weight for weight in located.weights}
    for label, edit in edits.items():
        if _keeps(edit):
            continue
        pieces = _pieces(located, binding, edit)
        if pieces is None:
            missing.append(label)
            continue
        if edit.source.shape != pieces[0].weight.storage.shape:
            sizes = f"{list(edit.source.shape)} instead of {list(pieces[0].weight.storage.shape)}"
            raise FitError(f"would have other sizes, {sizes}, and a graph keeps its own", tensor=label)
        for piece in pieces:
            _check_shared(piece, edits)
            fold = owners[piece.fold] if piece.fold else None
            if fold is not None:
                _check_fold(piece, fold, edits, binding)
            by_tensor.setdefault(piece.place.name, []).append(Change(piece, edit, fold))
    if missing:
        raise _not_found(missing, located, edits)
    _check_all_told(located, by_tensor, binding)
    _check_both_halves(located, binding)
    for piece in located.pieces:
        if piece.fold in edits and piece.weight.label not in edits:
            raise FitError(f"is folded into {show(piece.weight.label)}, and an adapter changes it", tensor=piece.fold)
    return tuple(_one_tensor(name, changes, located) for name, changes in by_tensor.items())


def _check_all_told(located: Located, by_tensor: Mapping[str, Sequence[Change]], binding: Binding) -> None:
    """Refuse weights that are in the graph a second time with other values, or that any tensor of one value could be.

    Raises:
        FitError: there is one.
    """
    pieces = [change.piece for changes in by_tensor.values() for change in changes]
    changed = {piece.weight.label for piece in pieces}
    for near in located.near:
        if near.piece.weight.label in changed and not _is_kept_half(near.piece, located, binding):
            raise FitError(
                f"holds other values of {show(near.piece.weight.label)}, {near.distance:.2%} away, which is in the graph "
                "twice and would change once",
                file=located.graph.path,
                tensor=near.piece.place.name,
                hint="export a graph of the merged model",
            )
    for piece in pieces:
        if piece.weight.is_uniform and not is_told(piece, located.pieces, located.graph.proto):
            raise FitError(
                f"may be {show(piece.weight.label)}, which is of one value: no name beside it tells",
                file=located.graph.path,
                tensor=piece.place.name,
                hint="export a graph of the merged model",
            )


def _check_both_halves(located: Located, binding: Binding) -> None:
    """Refuse a table that changes with its head where one of them is found, and the other may be what is not known.

    Raises:
        FitError: that is so.
    """
    found = {piece.place.name for piece in located.pieces}
    for component in binding.checkpoint.components.values():
        table = (component.name, component.embedding)
        if not component.tied or component.name in binding.untied or table not in binding.edits:
            continue
        edit = binding.edits[component.name, component.embedding]
        pieces = located.of_weight[label_of(edit.component, component.aliases.get(edit.name, edit.name))]
        uses = set().union(*(_uses(located.graph.proto, piece.place.name) for piece in pieces))
        size = math.prod(edit.source.shape)
        unknown = [
            name
            for name, shape in located.graph.shapes.items()
            if name not in found and name in located.graph.tensors and math.prod(shape) * _PACKED >= size
        ]
        if uses and not (uses & _GATHERS and uses - _GATHERS) and unknown:
            half = "embedding" if uses & _GATHERS else "head"
            raise FitError(
                f"is found as the {half} alone, and an adapter changes both: the other half may be {listing(unknown[:4])}",
                file=located.graph.path,
                tensor=edit.name,
                hint="export a graph of the merged model",
            )


def _is_kept_half(piece: LocatedPiece, located: Located, binding: Binding) -> bool:
    """Whether a tensor is the half of a parted pair, head or table, that no adapter changes."""
    component = binding.checkpoint.components[piece.weight.component]
    if component.name not in binding.untied:
        return False
    is_table = bool(_uses(located.graph.proto, piece.place.name) & _GATHERS)
    edit = binding.edits.get((component.name, component.embedding if is_table else component.head))
    return edit is None or _keeps(edit)


def _one_tensor(name: str, changes: Sequence[Change], located: Located) -> TensorChange:
    place = changes[0].piece.place
    if isinstance(place, Matrix) and place.tensor is None:
        raise FitError(
            "its values are written one by one, so that they have no place of their own",
            file=located.graph.path,
            tensor=name,
            hint="save the graph with raw data",
        )
    return TensorChange(name, place, tuple(changes))


def _pieces(located: Located, binding: Binding, edit: Edit) -> tuple[LocatedPiece, ...] | None:
    """The pieces that an edit is for, whole together; None if there are none.

    Raises:
        FitError: head and embedding part, and one tensor serves as both.
    """
    component = binding.checkpoint.components[edit.component]
    label = label_of(edit.component, component.aliases.get(edit.name, edit.name))
    pieces = located.of_weight.get(label, ())
    if located.covered.get(label, 0.0) < 1:
        return None
    if edit.component not in binding.untied or edit.name not in (component.head, component.embedding):
        return pieces
    is_head = edit.name == component.head
    graph = located.graph.proto.graph
    main = {one.name for one in graph.initializer} | {value for node in graph.node for value in node.output}
    chosen = []
    for piece in pieces:
        uses = _uses(located.graph.proto, piece.place.name)
        if piece.place.name not in main:
            text = (
                "is read by no node by this name, so that it may be the head or the embedding, which the adapter parts"
            )
            raise FitError(
                text, file=located.graph.path, tensor=piece.place.name, hint="export a graph of the merged model"
            )
        if uses & _GATHERS and uses - _GATHERS:
            text = "is embedding and head at once, and the adapter changes one of them"
            raise FitError(
                text, file=located.graph.path, tensor=piece.place.name, hint="export a graph of the merged model"
            )
        if bool(uses & _GATHERS) != is_head:
            chosen.append(piece)
    if not chosen:
        text = "has no place in the graph of its own: the adapter parts head and embedding, which are one tensor there"
        raise FitError(text, file=located.graph.path, tensor=edit.name, hint="export a graph of the merged model")
    return tuple(chosen)


def _uses(model: onnx.ModelProto, name: str) -> set[str]:
    """The operators that read a tensor, in bodies, too, and behind nodes that keep its elements."""
    nodes = [node for inner in graphs_in(model.graph) for node in inner.node]
    names, found = {name}, set[str]()
    waiting = [name]
    while waiting:
        value = waiting.pop()
        for node in nodes:
            if value not in node.input:
                continue
            if node.op_type not in _KEEPING:
                found.add(node.op_type)
            elif node.output[0] not in names:
                names.add(node.output[0])
                waiting.append(node.output[0])
    return found


def _check_shared(piece: LocatedPiece, edits: Mapping[str, Edit]) -> None:
    unchanged = [weight.label for weight in (piece.weight, *piece.also) if weight.label not in edits]
    if piece.by_order and not piece.also:
        text = f"is {show(piece.weight.label)} by the order of the graph alone: other weights have its values"
        raise FitError(text, tensor=piece.place.name, hint="export a graph of the merged model")
    if piece.also and unchanged:
        raise FitError(
            f"holds weights of equal values, of which an adapter changes some: {listing(unchanged)} stay",
            tensor=piece.place.name,
        )
    if piece.also:
        raise FitError(
            f"holds several weights of equal values: {listing([w.label for w in (piece.weight, *piece.also)])}",
            tensor=piece.place.name,
            hint="export a graph of the merged model",
        )


def _check_fold(piece: LocatedPiece, fold: Wanted, edits: Mapping[str, Edit], binding: Binding) -> None:
    """Refuse what a fold does not let through: a change of the vector itself, and a norm that adds something, too."""
    if fold.label in edits:
        raise FitError(f"is folded into {show(piece.weight.label)}, and an adapter changes it", tensor=fold.label)
    parameters = binding.checkpoint.components[fold.component].parameters
    bias = f"{fold.name.removesuffix('weight')}bias"
    if bias != fold.name and bias in parameters and parameters[bias].get().any():
        raise FitError(
            f"has {show(fold.label)} folded into it, whose bias then is in another tensor, made of this one",
            tensor=piece.weight.label,
        )


def _not_found(missing: Sequence[str], located: Located, edits: Mapping[str, Edit]) -> FitError:
    """The error for weights that are not there, with how far the nearest tensors are."""
    graph, path = located.graph, located.graph.path
    looked_for = [weight for weight in located.weights if weight.label in missing]
    again = located_weights(graph, located.weights, touched=set(missing))
    near = {one.piece.weight.label: one for one in again.near}
    names = f"{len(missing)} weights that an adapter changes are not in the graph: {listing(missing)}"
    if not looked_for:
        return FitError(f"{len(missing)} weights have no place in the graph: {listing(missing)}", file=path)
    if _are_merged(missing, located, edits):
        return FitError(f"these adapters are merged already: {listing(missing)}", file=path)
    if not near:
        share = {label: again.covered.get(label, 0.0) for label in missing}
        part = [f"{show(label)} {value:.0%}" for label, value in share.items() if value]
        found = f"; found of them: {', '.join(part[:4])}" if part else ""
        return FitError(names + found, file=path, hint="is the graph made of another checkpoint?")
    far = max(one.distance for one in near.values())
    text = f"{names}; {len(near)} of them are there with other values, up to {far:.2%} away"
    return FitError(text, file=path, hint="another adapter is merged already, or the graph was made of a fine-tune")


def _are_merged(missing: Sequence[str], located: Located, edits: Mapping[str, Edit]) -> bool:
    """Whether the graph has the values that the merge would write."""
    after = tuple(
        Wanted(weight.component, weight.name, edits[weight.label].source, edits[weight.label].operations)
        if weight.label in missing
        else weight
        for weight in located.weights
    )
    again = located_weights(located.graph, after, touched=set(missing), tables=False)
    return all(again.covered.get(label, 0.0) == 1 for label in missing)
