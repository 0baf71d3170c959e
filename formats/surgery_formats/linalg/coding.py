# SPDX-License-Identifier: Apache-2.0
"""How numbers become codes, in numbers alone: planning and inspecting need sizes, not torch."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["CODINGS", "Coding"]


@dataclass(frozen=True, slots=True)
class Coding:
    """A way to store numbers as codes.

    Attributes:
        name: ``int8``, ``int4``.
        bits: Of a code.
        group: Consecutive numbers that share a scale.
    """

    name: str
    bits: int
    group: int

    @property
    def largest(self) -> int:
        """Codes lie between this and its negative."""
        return (1 << (self.bits - 1)) - 1

    def scales(self, numel: int) -> int:
        """Number of scales for `numel` numbers."""
        return -(-numel // self.group)

    def nbytes(self, numel: int) -> int:
        """Bytes of `numel` numbers: codes and bfloat16 scales."""
        return -(-numel * self.bits // 8) + 2 * self.scales(numel)


CODINGS = {coding.name: coding for coding in (Coding("int8", 8, 64), Coding("int4", 4, 32))}
"""By name. Error and size of each: docs/compact.md."""
