# SPDX-License-Identifier: Apache-2.0
"""Numbers of weights as a heat map: a row for each layer, a column for each part of one, told by names alone."""

from __future__ import annotations

import re
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import takewhile
from operator import itemgetter

from surgery.reports.drawings import HeatMap
from surgery.reports.sections import Chart, Column, Table
from surgery.reports.values import Name, Piece, Type, Value
from surgery_formats.text import numbered, show

__all__ = ["layer_chart", "layer_of"]

_LAYERS, _PARTS = 160, 24
"""Most rows and columns; a model that has more of them shows the first layers, and the parts that most layers have, and says
so. The sentence is of all."""
_HEADING = 60  # characters of a part's name
_REPEATED = ("layers", "layer", "blocks", "block", "attentions", "resnets", "h")
"""What is in front of a number that counts layers; a name's first number does in any case, those of experts never do."""

Entry = tuple[str, float, float]


def layer_of(name: str) -> tuple[str, str] | None:
    """The layer of a weight, and which part of it the weight is; None of a weight outside the layers.

    ``model.layers.3.self_attn.q_proj.weight`` -> ``model.layers.3``, ``self_attn.q_proj``. All experts of a layer are one
    part.
    """
    words = re.split(r"([._:])", name.removesuffix(".weight"))
    last = None
    for index in range(2, len(words) - 2, 2):
        before = words[index - 2]
        if _counts(words[index]) and before != "experts" and (last is None or before in _REPEATED):
            last = index
    if last is None:
        return None
    part = "".join(words[last + 2 :])
    return "".join(words[: last + 1]), re.sub(r"(?<=experts[._])\d+", "*", part)


def layer_chart(
    title: str,
    entries: Iterable[Entry],
    finish: Callable[[float, float], float],
    *,
    type: Type = "number",
    digits: int = 3,
    log: bool = False,
    low: float | None = None,
    high: float | None = None,
    worst: str = "greatest",
) -> Chart | None:
    """A heat map of layers and their parts; None where fewer than two weights lie in layers.

    Args:
        title: Of the chart.
        entries: Name of a weight, and two sums, which are added up over weights of one place (experts).
        finish: Makes the number of a place of its sums.
        type: Of the numbers.
        digits: Of the numbers.
        log: Whether colours go by ratios.
        low: Value of the lightest colour.
        high: Value of the darkest.
        worst: ``greatest`` or ``least``: which place the sentence names.
    """
    sums: dict[str, dict[str, tuple[float, float]]] = {}
    for name, above, below in entries:
        if (place := layer_of(name)) is not None:
            layer = sums.setdefault(place[0], {})
            one, other = layer.get(place[1], (0.0, 0.0))
            layer[place[1]] = one + above, other + below
    layers = sorted(sums, key=_numbers)
    values = {layer: {part: finish(*places) for part, places in sums[layer].items()} for layer in layers}
    times = Counter(part for layer in layers for part in values[layer])
    if times.total() < 2:
        return None
    kept = {part for part, _ in times.most_common(_PARTS)}
    parts = [part for part in times if part in kept]
    names = dict(zip(layers, _short(layers), strict=True))
    columns = Column("layer", "name"), *(Column(show(part, _HEADING), type, digits) for part in parts)
    rows = tuple((names[layer], *(values[layer].get(part) for part in parts)) for layer in layers[:_LAYERS])
    drawing = HeatMap(0, tuple(range(1, len(columns))), log, low, high)
    says = _said({names[layer]: places for layer, places in values.items()}, (type, digits), worst)
    left = f"; {len(rows)} of {numbered(len(layers), 'layer')} and {len(parts)} of {numbered(len(times), 'part')} are shown"
    return Chart(
        title,
        Table(columns, rows),
        drawing,
        says if (len(rows), len(parts)) == (len(layers), len(times)) else (*says, left),
    )


def _said(values: Mapping[str, Mapping[str, float]], written: tuple[Type, int], worst: str) -> tuple[Piece, ...]:
    """Where the greatest, or the least, number of all places is, beside the median."""
    known = [(value, layer, part) for layer, places in values.items() for part, value in places.items()]
    choose = max if worst == "greatest" else min
    value, layer, part = choose(known, key=itemgetter(0))
    middle = statistics.median(value for value, _, _ in known)
    where = "layer ", Name(layer, 60), ", ", Name(part, 60)
    return f"{worst} ", Value(value, *written), " (", *where, "), median ", Value(middle, *written)


def _short(layers: Sequence[str]) -> list[str]:
    """Names of layers without what all of them begin with."""
    split = [re.split(r"(?<=[._:])", layer) for layer in layers]  # behind what joins the words, which stays with them
    shared = sum(1 for _ in takewhile(lambda words: len(set(words)) == 1, zip(*split, strict=False)))
    shared = min(shared, min(map(len, split)) - 1)
    return ["".join(words[shared:]) for words in split]


def _numbers(layer: str) -> list[tuple[int, int | str]]:
    """The key by which layer 10 comes behind layer 9."""
    return [(0, int(word)) if _counts(word) else (1, word) for word in re.split(r"[._:]", layer)]


def _counts(word: str) -> bool:
    return word.isdecimal() and len(word) < 10
