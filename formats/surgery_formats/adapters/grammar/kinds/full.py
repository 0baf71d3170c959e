# SPDX-License-Identifier: Apache-2.0
"""``diff``, ``diff_b``, ``diff_m``, ``w_norm``, ``b_norm``, ``set_weight``: differences, and whole parameters.

``diff_m`` is LightX2V's: of the table ``modulation`` of a block of Wan.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from surgery_formats.adapters.grammar.kinds.kind import LeafKind, LeafWriter, ReadUpdate
from surgery_formats.adapters.grammar.leaves import NORMS_OF_FLUX
from surgery_formats.adapters.grammar.module import ModuleTensors
from surgery_formats.adapters.grammar.scales import StatedScales
from surgery_formats.updates import Factor, Offset, Replacement, Update

__all__ = ["FULL"]

_DIFFERENCES = {"diff": "weight", "w_norm": "weight", "diff_b": "bias", "b_norm": "bias", "diff_m": "modulation"}


def _read(module: ModuleTensors, scales: StatedScales) -> Iterable[ReadUpdate]:
    for role, parameter in _DIFFERENCES.items():
        if stored := module.parts.get(role):
            table = len(stored.shape) == 3 and stored.shape[0] == 1  # rows of numbers; no convolution has one output
            vector = parameter == "bias" or len(stored.shape) == 1
            shape = stored.shape[1:] if table else (stored.numel,) if vector else stored.matrix
            yield ReadUpdate(
                parameter, Offset(Factor((stored,), shape)), kernel=() if vector or table else stored.shape[2:]
            )
    if stored := module.parts.get("set_weight"):
        called = "scale" if module.path.endswith(NORMS_OF_FLUX) else "weight"
        yield ReadUpdate(called, Replacement(Factor.of(stored)))


def _write(update: Update, parameter: str, writer: LeafWriter) -> None:
    if isinstance(update, Replacement):
        writer.put("set_weight", update.value)
        return
    assert isinstance(update, Offset)  # as `writes` says
    if parameter == "bias" and "up_bias" in writer.leaves and not {"diff_b", "b_norm"} & writer.leaves.keys():
        writer.put("up_bias", update.value, times=update.scale / writer.bias_scale)
        return
    norm = len(update.value.shape) == 1 and {"w_norm", "b_norm"} & writer.leaves.keys()
    role = ("b_norm" if norm else "diff_b") if parameter == "bias" else ("w_norm" if norm else "diff")
    role = "diff_m" if parameter == "modulation" else role
    shape: tuple[int, ...] = update.value.shape
    if any(len(tensor.shape) == 3 and tensor.shape[0] == 1 for tensor in update.value.tensors):
        shape = (1, *shape)
    elif len(shape) == 2:
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
