# SPDX-License-Identifier: Apache-2.0
"""What makes the first hidden states of an image, as data; see `surgery_formats.models.families.recipe`."""

from __future__ import annotations

from dataclasses import dataclass

from surgery_formats.models.families.recipe_parts import Shapes

__all__ = ["Patches"]


@dataclass(frozen=True, slots=True)
class Patches:
    """``(B, channels, height, width)`` to ``(B, S, D)`` (ViT, arXiv:2010.11929 section 3.1).

    Each patch is one token; a class token and registers (arXiv:2309.16588) stand in front of them. Positions are added to
    all but the registers.

    Attributes:
        weight: Tensor ``(D, channels, *patch)``: patches do not overlap.
        bias: Tensor ``(D,)``, or empty.
        channels: Of an image.
        image: Height and width of every image.
        patch: Height and width of a patch.
        positions: Tensor of `positions_shape`, with a row for the class token, if there is one, and for each patch.
        positions_shape: ``(rows, D)``, or ``(1, rows, D)``.
        first: The class token, a tensor of `first_shape`, or empty.
        first_shape: ``(D,)``, or ``(1, 1, D)``.
        registers: Tensor ``(1, register_count, D)``, or empty.
        register_count: Number of registers.
    """

    weight: str
    bias: str
    channels: int
    image: tuple[int, int]
    patch: tuple[int, int]
    positions: str
    positions_shape: tuple[int, ...]
    first: str = ""
    first_shape: tuple[int, ...] = ()
    registers: str = ""
    register_count: int = 0

    @property
    def count(self) -> int:
        """Number of patches."""
        return (self.image[0] // self.patch[0]) * (self.image[1] // self.patch[1])

    @property
    def in_front(self) -> int:
        """Number of tokens before those of the patches."""
        return bool(self.first) + self.register_count

    def shapes(self, hidden: int) -> Shapes:
        """Its tensors, in a model of `hidden` values."""
        named: Shapes = {
            self.weight: (hidden, self.channels, *self.patch),
            self.bias: (hidden,),
            self.positions: self.positions_shape,
            self.first: self.first_shape,
            self.registers: (1, self.register_count, hidden),
        }
        return {name: shape for name, shape in named.items() if name}
