# SPDX-License-Identifier: Apache-2.0
"""What of a network is stored as codes: formats, bits per weight, and what shares a scale."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from surgery.reports.values import Phrase, Value
from surgery_formats.models.component import Component
from surgery_formats.storage.base import Storage
from surgery_formats.storage.quantised import is_coded, is_quantised
from surgery_formats.storage.unread import method_of

__all__ = ["QuantisedWeights", "quantised_phrase", "quantised_weights", "scale_shared_by"]


@dataclass(frozen=True, slots=True)
class QuantisedWeights:
    """The weights of a network that are stored in one quantised format.

    Attributes:
        kind: The format, as types are shown: ``NF4``.
        method: What config.json says of it; empty if nothing. Untrusted text.
        weights: How many they are.
        of: All weights of the network.
        parameters: Numbers that they stand for.
        nbytes: Of all their stored tensors, scales too.
        shared: What shares a scale: ``blocks of 64``; and whether the scales are codes themselves.
    """

    kind: str
    method: str
    weights: int
    of: int
    parameters: int
    nbytes: int
    shared: str

    @property
    def bits(self) -> float:
        """Stored bits per number, those of scales and offsets included."""
        return 8 * self.nbytes / self.parameters if self.parameters else 0.0


def scale_shared_by(storage: Storage) -> str:
    """``blocks of 64``, ``blocks of 128 x 128``, ``a scale per row``, ``one scale``; empty if the codec does not say.

    Rows and columns are those of the model's code.
    """
    if not is_quantised(storage):
        return ""
    rows, columns = storage.block
    height, width = storage.shape
    if storage.transposed:
        rows, columns, height, width = columns, rows, width, height
    if rows >= height and columns >= width:
        return "one scale"
    if columns >= width:
        return "a scale per row" if rows == 1 else f"a scale per {rows} rows"
    if rows >= height and columns == 1:
        return "a scale per column"
    return f"blocks of {columns}" if rows == 1 else f"blocks of {rows} x {columns}"


def quantised_weights(component: Component) -> tuple[QuantisedWeights, ...]:
    """The formats of a network's coded weights, the one with most numbers first."""
    found: dict[tuple[str, str], list[tuple[int, int]]] = {}
    for parameter in component.parameters.values():
        if is_coded(parameter.storage):
            nested = ", nested scales" if getattr(parameter.storage, "nested", False) else ""
            key = parameter.storage.kind, scale_shared_by(parameter.storage) + nested
            found.setdefault(key, []).append((parameter.numel, parameter.nbytes))
    method, whole = method_of(component.config), len(component.parameters)
    groups = [
        QuantisedWeights(kind, method, len(sizes), whole, sum(n for n, _ in sizes), sum(b for _, b in sizes), shared)
        for (kind, shared), sizes in found.items()
    ]
    return tuple(sorted(groups, key=lambda group: (-group.parameters, group.kind, group.shared)))


def quantised_phrase(groups: Sequence[QuantisedWeights]) -> Phrase:
    """``NF4, 4.5 bits per weight, 112 of 146 weights, blocks of 64``; formats apart by semicolons."""
    pieces: list[str | Value] = []
    for group in groups:
        pieces += ["; "] if pieces else []
        count = f" bits per weight, {group.weights} of {group.of} weights"
        pieces += [f"{group.kind}, ", Value(group.bits, "number", 3), count]
        pieces += [f", {group.shared}"] if group.shared else []
    return tuple(pieces)
