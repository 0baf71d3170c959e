# SPDX-License-Identifier: Apache-2.0
"""Weights of equal values, told apart by names: of the tensors, of the operators beside them; at last by order."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from surgery.onnx.edit.pieces import Piece
from surgery.onnx.edit.wanted import Wanted

if TYPE_CHECKING:
    import onnx

__all__ = ["affinity", "names_beside", "settled_ties"]

_TOKEN = re.compile(r"[A-Za-z]+|[0-9]+")
_REACH = 3  # operators behind a tensor whose names are looked at
_AWAY = 0.1  # of the likeness, for each operator between
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


def affinity(weight: Wanted, texts: Iterable[Text]) -> float:
    """How alike the name of a weight is to one of some names: 1 is the same words and numbers in the same order."""
    own = _TOKEN.findall(weight.label.lower())
    best = 0.0
    for text, away in texts:
        other = _TOKEN.findall(text[:_TEXT].lower())
        matcher = difflib.SequenceMatcher(None, own, other, autojunk=False)
        alike = sum(block.size for block in matcher.get_matching_blocks())
        numbers = [token for token in own if token.isdigit()]
        wrong = sum(token not in other for token in numbers)
        best = max(best, alike / max(len(own), 1) - wrong / max(len(own), 1) - len(other) * 1e-4 - away)
    return best


def settled_ties(pieces: Sequence[Piece], beside: Mapping[str, tuple[Text, ...]]) -> list[Piece]:
    """Every piece with the weight that it is most likely to be, of those that have its values.

    What fewer tensors hold than there are weights, they share (`Piece.also`).
    """
    groups: dict[frozenset[str], list[int]] = {}
    for number, piece in enumerate(pieces):
        if piece.also:
            labels = frozenset(weight.label for weight in (piece.weight, *piece.also))
            groups.setdefault(labels, []).append(number)
    done = list(pieces)
    for numbers in groups.values():
        first = pieces[numbers[0]]
        weights = [first.weight, *first.also]
        scores = {
            (number, place): affinity(
                weight, beside.get(pieces[number].place.name, ((pieces[number].place.name, 0.0),))
            )
            for number in numbers
            for place, weight in enumerate(weights)
        }
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
            done[number] = replace(pieces[number], weight=weights[chosen[number]], also=spare)
    return done
