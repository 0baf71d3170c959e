# SPDX-License-Identifier: Apache-2.0
"""``a1``, ``a2``, ``b1``, ``b2``: GLoRA (LyCORIS 4.1.3, ``modules/glora.py``).

Files of LyCORIS before 2.0 have the two of each pair in each other's place; their shapes tell, unless the weight is square
and so is a factor.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from surgery_formats.adapters.grammar.kinds.kind import LeafKind, LeafWriter, ReadUpdate
from surgery_formats.adapters.grammar.module import ModuleTensors, fit_error
from surgery_formats.adapters.grammar.scales import StatedScales
from surgery_formats.updates import Factor, ProductGLoRA, Update

__all__ = ["GLORA"]

_FACTORS = ("a1.weight", "a2.weight", "b1.weight", "b2.weight")


def _read(module: ModuleTensors, scales: StatedScales) -> Iterable[ReadUpdate]:
    beside = next(role for role in (*_FACTORS, "bm.weight") if role in module.parts)
    if core := module.parts.get("bm.weight"):
        raise fit_error(core, "GLoRA with a core is not read: LyCORIS itself writes none")
    a1, a2, b1, b2 = (module.matrix(role, beside) for role in _FACTORS)
    rank = b1.matrix[1]
    channels = a1.shape[0]
    if (a1.matrix, a2.matrix) != ((channels, rank), (rank, channels)) or b2.shape[:2] != (rank, channels):
        shapes = [list(stored.shape) for stored in (a1, a2, b1, b2)]
        raise fit_error(a1, f"factors of {shapes}, which are none of GLoRA as LyCORIS has it since 2.0")
    scale = scales.of_module(module, rank)
    A1, A2, B1, B2 = (Factor((stored,), stored.matrix) for stored in (a1, a2, b1, b2))
    update = ProductGLoRA(A1, A2, B1, B2, scale.value, scale.alpha, scale.noted)
    yield ReadUpdate("weight", update, scale.source, b2.shape[2:])


def _write(update: Update, parameter: str, writer: LeafWriter) -> None:
    assert isinstance(update, ProductGLoRA)  # as `writes` says
    times = writer.put_scale(update.scale, update.rank)
    (out, inputs), channels = update.shape, update.A1.shape[0]
    writer.put("a1.weight", update.A1, (*update.A1.shape, *writer.ones), times=times)
    writer.put("a2.weight", update.A2, (*update.A2.shape, *writer.ones))
    writer.put("b1.weight", update.B1, (out, update.rank, *writer.ones), times=times)
    kernel = writer.sizes if math.prod(writer.sizes) == inputs // channels else ()
    writer.put("b2.weight", update.B2, (update.rank, channels, *kernel))


GLORA = LeafKind(
    name="GLoRA",
    roles=frozenset([*_FACTORS, "bm.weight", "alpha"]),
    marks=frozenset([*_FACTORS, "bm.weight"]),
    read=_read,
    writes=frozenset([ProductGLoRA.kind]),
    write=_write,
)
