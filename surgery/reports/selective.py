# SPDX-License-Identifier: Apache-2.0
"""Names for fine-tunes that changed a part of a model: BitFit, norms, some layers, some rows (docs/insert.md)."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any, Literal

from surgery.reports.values import Name, Piece, Value

__all__ = ["ChangedWeight", "SelectiveTuning", "selective_tuning"]

Tuned = Literal["biases", "norms", "biases and norms", "rows", "embeddings", "head", "layers", "other"]

_KNOWN_AS = {
    "biases": "only biases changed (BitFit)",
    "norms": "only norms changed",
    "biases and norms": "only biases and norms changed",
    "embeddings": "only embeddings changed",
    "head": "only the head changed",
}
_LAYER = re.compile(r"(?:^|\.)(?:layers?|h|blocks?|block)\.(\d{1,6})(?:\.|$)")
_HEADS = ("head", "embedding")


@dataclass(frozen=True, slots=True)
class ChangedWeight:
    """A weight that a fine-tune changed.

    Attributes:
        name: The parameter's.
        role: What part of the network it is, see `Component.role`.
        numbers: How many are stored anew: of some rows, theirs.
        rows: How many rows changed, where not all did; None where all did, or nobody counted.
        of: Rows there are.
    """

    name: str
    role: str
    numbers: int
    rows: int | None = None
    of: int = 0


@dataclass(frozen=True, slots=True)
class SelectiveTuning:
    """Which part of a model a fine-tune changed.

    Attributes:
        tuned: ``biases`` and so on; ``other`` where no name fits, or all layers changed.
        numbers: How many numbers lie in what changed.
        parameters: How many the model has.
        layers: Numbers of the changed layers, if the change is to some layers only.
        layer_count: Layers there are.
        rows: Of ``rows``: how many rows changed, of how many, and whose.
    """

    tuned: Tuned
    numbers: int
    parameters: int
    layers: tuple[int, ...] = ()
    layer_count: int = 0
    rows: tuple[int, int, str] = (0, 0, "")

    @property
    def share(self) -> float:
        """Of the model's numbers, those in what changed."""
        return self.numbers / self.parameters if self.parameters else 0.0

    @property
    def named(self) -> bool:
        """Whether the change has a name."""
        return self.tuned != "other"

    @property
    def phrase(self) -> tuple[Piece, ...]:
        """``only biases changed (BitFit): 0.08% of the parameters``."""
        share = Value(self.share, "share"), " of the parameters"
        if self.tuned == "rows":
            changed, count, name = self.rows
            return f"only {changed} of {count} rows of ", Name(name), " changed: ", *share
        if self.tuned == "layers":
            many = "s" if len(self.layers) > 1 else ""
            return f"only layer{many} {_spans(self.layers)} of {self.layer_count} changed: ", *share
        return f"{_KNOWN_AS.get(self.tuned, 'changed')}: ", *share

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        found: dict[str, Any] = {"tuned": self.tuned, "numbers": self.numbers, "share": float(f"{self.share:.6g}")}
        if self.tuned == "rows":
            found |= {"rows": self.rows[0], "of_rows": self.rows[1], "parameter": self.rows[2]}
        return found | ({"layers": list(self.layers), "of_layers": self.layer_count} if self.layers else {})


def selective_tuning(changed: Iterable[ChangedWeight], names: Collection[str], parameters: int) -> SelectiveTuning:
    """Name what changed.

    Args:
        changed: Every weight with another value; a tied head is not counted beside its embedding.
        names: Of all parameters of the model.
        parameters: How many numbers these hold.
    """
    weights = list(changed)
    numbers = sum(weight.numbers for weight in weights)
    sorts = {_sort(weight) for weight in weights}
    if len(weights) == 1 and weights[0].rows is not None and weights[0].rows < weights[0].of:
        rows = weights[0].rows, weights[0].of, weights[0].name
        return SelectiveTuning("rows", numbers, parameters, rows=rows)
    tuned: Tuned = "other"
    if sorts == {"biases"} or sorts == {"norms"} or sorts == {"embeddings"} or sorts == {"head"}:
        tuned = next(iter(sorts))
    elif sorts == {"biases", "norms"}:
        norms = [weight for weight in weights if _sort(weight) == "norms"]
        tuned = "norms" if _all_of_norms(weights, norms) else "biases and norms"
    elif weights:
        inside = [_layer(weight.name) for weight in weights]
        there = {number for name in names if (number := _layer(name)) is not None}
        layers = {number for number in inside if number is not None}
        if None not in inside and len(layers) < len(there):
            return SelectiveTuning("layers", numbers, parameters, tuple(sorted(layers)), len(there))
    return SelectiveTuning(tuned, numbers, parameters)


def _sort(weight: ChangedWeight) -> Tuned:
    if weight.name.endswith("bias"):
        return "biases"
    if weight.role in _HEADS:
        return "head" if weight.role == "head" else "embeddings"
    return "norms" if weight.role == "norm" else "other"


def _all_of_norms(weights: Iterable[ChangedWeight], norms: Iterable[ChangedWeight]) -> bool:
    """Whether every bias that changed is a norm's, whose gain changed too."""
    modules = {weight.name.rpartition(".")[0] for weight in norms}
    return all(weight.name.rpartition(".")[0] in modules for weight in weights)


def _layer(name: str) -> int | None:
    found = _LAYER.search(name)
    return None if found is None else int(found[1])


def _spans(numbers: Iterable[int]) -> str:
    """Numbers in order as text: ``0-2, 5``."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(f"{low}-{high}" if high > low else f"{low}" for low, high in runs)
