# SPDX-License-Identifier: Apache-2.0
"""One part of an adapter, of those that programs tell apart."""

from __future__ import annotations

from dataclasses import dataclass, field

from surgery.consumers.traits import Trait
from surgery_formats.updates import Update

__all__ = ["AdapterPart"]


@dataclass(frozen=True, slots=True)
class AdapterPart:
    """One part.

    Attributes:
        name: Path of a parameter, name of a field, or name of a file.
        trait: What it is.
        kind: Kind of its update (`Update.kind`), or empty.
        rank: Inner size of its LoRA.
        scale: What its LoRA was trained with.
        update: The update, where the part is one.
    """

    name: str
    trait: Trait
    kind: str = ""
    rank: int | None = None
    scale: float | None = None
    update: Update | None = field(default=None, compare=False, repr=False)

    @property
    def module(self) -> str:
        """Path of the module."""
        return self.name.removesuffix(".weight").removesuffix(".bias")

    @property
    def leaf(self) -> str:
        """Last name of the module's path."""
        return self.module.rpartition(".")[2]
