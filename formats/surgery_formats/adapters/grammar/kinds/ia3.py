# SPDX-License-Identifier: Apache-2.0
"""``weight`` and ``on_input``: (IA)^3, stored as the distance of its factors from 1 (LyCORIS 4.1.3, ``modules/ia3.py``)."""

from __future__ import annotations

from collections.abc import Iterable

from surgery_formats.adapters.grammar.kinds.kind import LeafKind, LeafWriter, ReadUpdate, number_tensor
from surgery_formats.adapters.grammar.module import ModuleTensors, malformed
from surgery_formats.adapters.grammar.scalars import scalar
from surgery_formats.adapters.grammar.scales import StatedScales
from surgery_formats.updates import IA3 as Stretch
from surgery_formats.updates import Factor, Update

__all__ = ["IA3"]


def _read(module: ModuleTensors, scales: StatedScales) -> Iterable[ReadUpdate]:
    switch = module.part("on_input", "weight" if "weight" in module.parts else "on_input")
    stored = module.part("weight", "on_input")
    if stored.numel not in stored.shape:
        raise malformed(stored, f"factors of shape {list(stored.shape)}")
    on_input = bool(scalar(switch, "a switch"))
    vector = Factor.computed((Factor((stored,), (stored.numel,)),), (stored.numel,), lambda distance: 1 + distance)
    # A convolution's factors are (1, n, 1, ...), a linear layer's (n,).
    yield ReadUpdate("weight", Stretch(vector, not on_input, noted=(switch,)), kernel=(0,) * len(stored.shape[2:]))


def _write(update: Update, parameter: str, writer: LeafWriter) -> None:
    assert isinstance(update, Stretch)  # as `writes` says
    vector, size = update.vector, update.vector.shape[0]
    shape = (1, size, *writer.ones) if writer.kernel else (size,)
    if vector.terms:
        writer.put("weight", vector.terms[0], shape)
    else:
        writer.put("weight", vector, shape, lambda factors: factors - 1)
    name = writer.spelt("on_input")
    writer.tensors[name] = number_tensor(name, float(not update.per_row))


IA3 = LeafKind(
    name="(IA)^3",
    roles=frozenset(["weight", "on_input"]),
    marks=frozenset(["weight", "on_input"]),
    read=_read,
    writes=frozenset([Stretch.kind]),
    write=_write,
)
