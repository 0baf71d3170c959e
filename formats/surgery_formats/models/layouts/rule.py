# SPDX-License-Identifier: Apache-2.0
"""The record that every family of networks fills in: how names of other programs correspond to diffusers' names.

diffusers' names are the ones in the middle: its models hold every projection apart, so that any other layout is a table
of rules onto them, and two other layouts meet there.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

__all__ = ["Layout", "Network", "Piece", "Rule", "fused", "same", "swapped"]


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows of a weight by their names in diffusers.

    Attributes:
        name: Of the module, or of a parameter; ``#`` stands for a number.
        units: How many rows it has, relative to the other pieces of its weight.
        part: Which of `parts` equal parts of the rows that diffusers has under this name.
        parts: See `part`.
    """

    name: str
    units: int = 1
    part: int = 0
    parts: int = 1


@dataclass(frozen=True, slots=True)
class Rule:
    """One module, or one parameter, of a layout.

    Attributes:
        name: Its name; ``#`` stands for a number. The pieces' names have as many, in the same order.
        pieces: What its rows are in diffusers, from top to bottom.
        transposed: Whether it is stored with rows and columns exchanged.
    """

    name: str
    pieces: tuple[Piece, ...]
    transposed: bool = False


Layout = Callable[[Collection[str]], Collection[Rule]]
"""The rules of a layout for a base with these names; most do not look at them."""


@dataclass(frozen=True, slots=True)
class Network:
    """A family of networks and its layouts.

    Attributes:
        name: As people call it.
        classes: Its classes in diffusers, or model types in transformers.
        layouts: Every layout beside diffusers' own.
        denoises: Whether it is the network of a pipeline that removes noise.
        told_by: Classes that are not the first, by how names begin that they alone have.
        in_omi: Ends of modules' names that OMI has otherwise than the network's makers: theirs, then OMI's.
    """

    name: str
    classes: tuple[str, ...]
    layouts: tuple[Layout, ...]
    denoises: bool = True
    told_by: Mapping[str, str] = field(default_factory=dict)
    in_omi: Mapping[str, str] = field(default_factory=dict)

    def class_of(self, names: Collection[str]) -> str:
        """The class in diffusers that has a network with these names."""
        found = (one for start, one in self.told_by.items() if any(name.startswith(start) for name in names))
        return next(found, self.classes[0])


def same(name: str, diffusers: str) -> Rule:
    """A weight that has another name, and nothing else."""
    return Rule(name, (Piece(diffusers),))


def fused(name: str, *parts: str, units: tuple[int, ...] = ()) -> Rule:
    """A weight that diffusers holds in parts, which lie below each other here.

    Args:
        name: Its name.
        parts: Names of the parts, in the order of the rows.
        units: Relative heights of the parts; equal ones if empty.
    """
    return Rule(name, tuple(map(Piece, parts, units or (1,) * len(parts))))


def swapped(name: str, diffusers: str) -> Rule:
    """A modulation whose halves (shift, scale) diffusers holds the other way round."""
    return Rule(name, (Piece(diffusers, part=1, parts=2), Piece(diffusers, part=0, parts=2)))
