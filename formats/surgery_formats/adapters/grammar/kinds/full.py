# SPDX-License-Identifier: Apache-2.0
"""``diff``, ``diff_b``, ``w_norm``, ``b_norm``, ``set_weight``: differences, and whole parameters."""

from __future__ import annotations

import math
from collections.abc import Iterable

from surgery_formats.adapters.grammar.kinds.kind import LeafKind, LeafWriter, ReadUpdate
from surgery_formats.adapters.grammar.module import ModuleTensors
from surgery_formats.adapters.grammar.scales import StatedScales
from surgery_formats.updates import Factor, Offset, Replacement, Update

__all__ = ["FULL"]

_DIFFERENCES = {"diff": "weight", "w_norm": "weight", "diff_b": "bias", "b_norm": "bias"}


def _read(module: ModuleTensors, scales: StatedScales) -> Iterable[ReadUpdate]:
    for role, parameter in _DIFFERENCES.items():
        if stored := module.parts.get(role):
            vector = parameter == "bias" or len(stored.shape) == 1
            value = Factor((stored,), (stored.numel,) if vector else stored.matrix)
            yield ReadUpdate(parameter, Offset(value), kernel=() if vector else stored.shape[2:])
    if stored := module.parts.get("set_weight"):
        yield ReadUpdate("weight", Replacement(Factor.of(stored)))


def _write(update: Update, parameter: str, writer: LeafWriter) -> None:
    if isinstance(update, Replacement):
        writer.put("set_weight", update.value)
        return
    assert isinstance(update, Offset)  # as `writes` says
    norm = len(update.value.shape) == 1 and {"w_norm", "b_norm"} & writer.leaves.keys()
    role = ("b_norm" if norm else "diff_b") if parameter == "bias" else ("w_norm" if norm else "diff")
    shape: tuple[int, ...] = update.value.shape
    if len(shape) == 2:
        shape = (shape[0], shape[1] // math.prod(writer.sizes), *writer.sizes)
    writer.put(role, update.value, shape, times=update.scale)
    if update.scale != 1.0:
        writer.notes.append(f"its scale {update.scale:g} is in '{role}'")


FULL = LeafKind(
    name="a difference",
    roles=frozenset([*_DIFFERENCES, "set_weight"]),
    marks=frozenset([*_DIFFERENCES, "set_weight"]),
    read=_read,
    writes=frozenset([Offset.kind, Replacement.kind]),
    write=_write,
)
