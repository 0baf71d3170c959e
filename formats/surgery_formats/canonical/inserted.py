# SPDX-License-Identifier: Apache-2.0
"""A module that an adapter inserts into a network: what it computes, where, and its values, before any base is known."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from surgery_formats.arrays import Array
from surgery_formats.canonical.adapter import Site
from surgery_formats.models.families.inserted import PlacedModule

__all__ = ["InsertedModule"]


@dataclass(frozen=True, slots=True)
class InsertedModule:
    """A module with its values.

    Attributes:
        place: What it computes, and where.
        sites: The adapter's sites that it is made of.
        values: Returns its tensors in float32, by the names of the network, stored ``(inputs, outputs)``.
    """

    place: PlacedModule
    sites: frozenset[Site]
    values: Callable[[], Mapping[str, Array]]
