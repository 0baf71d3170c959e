# SPDX-License-Identifier: Apache-2.0
"""Whole parameters under their own names: the norms of BFL's control LoRAs (``query_norm.scale``) and of diffusers' own."""

from __future__ import annotations

from collections.abc import Iterable

from surgery_formats.adapters.grammar.kinds.kind import LeafKind, LeafWriter, ReadUpdate
from surgery_formats.adapters.grammar.module import ModuleTensors
from surgery_formats.adapters.grammar.scales import StatedScales
from surgery_formats.updates import Factor, Replacement, Update

__all__ = ["WHOLE"]


def _read(module: ModuleTensors, scales: StatedScales) -> Iterable[ReadUpdate]:
    for parameter, role in (("scale", "whole_scale"), ("weight", "whole_weight")):
        if stored := module.parts.get(role):
            yield ReadUpdate(parameter, Replacement(Factor.of(stored)))


def _write(update: Update, parameter: str, writer: LeafWriter) -> None:
    assert isinstance(update, Replacement)  # the writer asks for this group by name
    writer.put(f"whole_{parameter}", update.value)


WHOLE = LeafKind(
    name="a whole parameter",
    roles=frozenset(["whole_scale", "whole_weight"]),
    marks=frozenset(["whole_scale", "whole_weight"]),
    read=_read,
    writes=frozenset(),
    write=_write,
)
