# SPDX-License-Identifier: Apache-2.0
"""Random numbers of fresh tensors: each tensor has a generator of its own, so that no order and no thread changes them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from hashlib import blake2b

from surgery_formats.arrays import Array
from surgery_formats.updates.draws import TorchDraws

__all__ = ["Draws"]


@dataclass(frozen=True, slots=True)
class Draws:
    """Generators by the name of what they are for.

    Attributes:
        seed: Of all of them.
    """

    seed: int

    def of(self, name: str) -> TorchDraws:
        """The generator of the tensor `name`, at its beginning."""
        digest = blake2b(f"{self.seed}/{name}".encode(), digest_size=4).digest()
        return TorchDraws(int.from_bytes(digest, "little"))

    def uniform(self, name: str, shape: tuple[int, ...], inputs: int) -> Array:
        """As a linear layer with so many inputs begins: uniform in ``+-1 / sqrt(inputs)`` (He et al. 2015, with a of sqrt 5)."""
        bound = 1.0 / math.sqrt(inputs)
        return self.of(name).uniform(shape, -bound, bound)

    def normal(self, name: str, shape: tuple[int, ...]) -> Array:
        """Normal, of variance 1."""
        values: Array = self.of(name).normal(math.prod(shape)).reshape(shape)
        return values
