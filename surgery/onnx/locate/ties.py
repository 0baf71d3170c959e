# SPDX-License-Identifier: Apache-2.0
"""Weights of equal values, told apart by names: of the tensors, of the operators beside them; at last by order."""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from surgery.onnx.locate.pieces import LocatedPiece
from surgery.onnx.locate.wanted import Wanted

if TYPE_CHECKING:
    import onnx

__all__ = ["affinity", "bound_together", "is_told", "names_beside", "settled_ties"]

_TOKEN = re.compile(r"[A-Za-z]+|[0-9]+")
_REACH = 3  # operators behind a tensor whose names are looked at
_AWAY = 0.1  # of the likeness, for each operator between
_TELLING, _CLEAR = 0.5, 1e-3  # likeness that tells, and by how much more than that of others
_TEXT = 512  # characters of a name


Text = tuple[str, float]
"""A name beside a tensor, and what is taken from its likeness because it is further away."""


def names_beside(model: onnx.ModelProto) -> Mapping[str, tuple[Text, ...]]:
    """For every input of an operator: its name, those of the operators that use it, and of the next few behind them."""
    users: dict[str, list[onnx.NodeProto]] = {}
    for node in model.graph.node:
        for name in node.input:
            users.setdefault(name, []).append(node)
    outputs = {name for node in model.graph.node for name in node.output}
    return {name: tuple(_texts(name, users)) for name in users if name not in outputs}


def _texts(name: str, users: Mapping[str, list[onnx.NodeProto]]) -> Iterable[Text]:
    names, seen = [name], set[int]()
    yield name, 0.0
    for away in range(_REACH):
        nodes = [node for one in names for node in users.get(one, ()) if id(node) not in seen]
        if len(nodes) > _REACH:
            return
        for node in nodes:
            seen.add(id(node))
            scopes = [entry.value for entry in node.metadata_props if "scope" in entry.key]
            for text in (node.name, *node.output, *scopes):
                yield text, away * _AWAY
        names = [output for node in nodes for output in node.output]


@functools.lru_cache(maxsize=1 << 14)
def _tokens(text: str) -> tuple[str, ...]:
    return tuple(_TOKEN.findall(text.lower()))


def affinity(weight: Wanted, texts: Iterable[Text]) -> float:
    """How alike the name of a weight is to one of some names: 1 is the same words and numbers in the same order."""
    own = _tokens(weight.label)
    numbers = {token for token in own if token.isdigit()}
    best = 0.0
    for text, away in texts:
        other = _tokens(text[:_TEXT])
        alike = at = 0
        for token in own:
            with contextlib.suppress(ValueError):
                at = other.index(token, at) + 1
                alike += 1
        wrong = len(numbers.difference(other))
        best = max(best, (alike - wrong) / max(len(own), 1) - len(other) * 1e-4 - away)
    return best


def bound_together(model: onnx.ModelProto) -> Mapping[str, Mapping[str, float]]:
    """For every tensor that an operator multiplies with: the tensors that are added behind it, and how far away they are."""
    users: dict[str, list[onnx.NodeProto]] = {}
    outputs = set()
    for node in model.graph.node:
        outputs.update(node.output)
        for name in node.input:
            users.setdefault(name, []).append(node)
    found: dict[str, dict[str, float]] = {}
    for name in users.keys() - outputs:
        for first in users[name]:
            reached = found.setdefault(name, {})
            nodes = [first]
            for away in range(_REACH):
                for node in nodes:
                    if node is first or node.op_type in ("Add", "Mul"):
                        for other in node.input:
                            if other not in outputs and other != name:
                                reached.setdefault(other, away * _AWAY)
                nodes = [after for node in nodes for output in node.output for after in users.get(output, ())]
                if len(nodes) != 1:
                    break
    return found


class _Likeness:
    """How likely a tensor is a weight, by names and by what is added behind its module's weight."""

    def __init__(self, pieces: Sequence[LocatedPiece], model: onnx.ModelProto) -> None:
        self._beside, self._together = names_beside(model), bound_together(model)
        self._modules: dict[str, list[str]] = {}
        for piece in pieces:
            if not piece.also:
                self._modules.setdefault(piece.weight.label.rpartition(".")[0], []).append(piece.place.name)

    def of(self, tensor: str, weight: Wanted) -> float:
        """1 and more is certain."""
        together = [self._together.get(one, {}) for one in self._modules.get(weight.label.rpartition(".")[0], ())]
        near = [1.5 - beyond[tensor] for beyond in together if tensor in beyond]
        return max([affinity(weight, self._beside.get(tensor, ((tensor, 0.0),))), *near])


def is_told(piece: LocatedPiece, pieces: Sequence[LocatedPiece], model: onnx.ModelProto) -> bool:
    """Whether more than its values tells that a tensor is a weight."""
    return _Likeness(pieces, model).of(piece.place.name, piece.weight) >= _TELLING


def settled_ties(pieces: Sequence[LocatedPiece], model: onnx.ModelProto) -> list[LocatedPiece]:
    """Every piece with the weight that it is most likely to be, of those that have its values.

    A bias is known by the weight of its module, all others by names. What fewer tensors hold than there are weights, they
    share (`LocatedPiece.also`).
    """
    groups: dict[frozenset[str], list[int]] = {}
    for number, piece in enumerate(pieces):
        if piece.also:
            labels = frozenset(weight.label for weight in (piece.weight, *piece.also))
            groups.setdefault(labels, []).append(number)
    if not groups:
        return list(pieces)
    done = list(pieces)
    likeness = _Likeness(pieces, model)

    def score(number: int, weight: Wanted) -> float:
        return likeness.of(pieces[number].place.name, weight)

    for numbers in groups.values():
        first = pieces[numbers[0]]
        weights = [first.weight, *first.also]
        scores = {(number, place): score(number, weight) for number in numbers for place, weight in enumerate(weights)}
        chosen: dict[int, int] = {}
        ranked = sorted(scores, key=lambda pair: (-round(scores[pair], 6), pair))
        left = set(range(len(weights)))
        for number, place in ranked:
            if number not in chosen and place in left:
                chosen[number] = place
                left.discard(place)
        for number, place in ranked:
            chosen.setdefault(number, place)
        spare = tuple(weights[place] for place in sorted(left))
        for number in numbers:
            own = scores[number, chosen[number]]
            others = [scores[number, place] for place in range(len(weights)) if place != chosen[number]]
            told = own >= _TELLING and own > max(others) + _CLEAR
            done[number] = replace(pieces[number], weight=weights[chosen[number]], also=spare, by_order=not told)
    return done
