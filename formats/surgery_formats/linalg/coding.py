# SPDX-License-Identifier: Apache-2.0
"""Codings of numbers, without numpy: planning and inspecting need only sizes."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["CODINGS", "Coding"]


@dataclass(frozen=True, slots=True)
class Coding:
    """A way to store numbers as codes.

    Attributes:
        name: ``int8`` or ``int4``.
        bits: Bits per code.
        group: Number of consecutive values that share a scale.
    """

    name: str
    bits: int
    group: int

    @property
    def largest(self) -> int:
        """The largest code; codes lie between it and its negative."""
        return (1 << (self.bits - 1)) - 1

    def scales(self, numel: int) -> int:
        """Return the number of scales for `numel` values."""
        return -(-numel // self.group)

    def nbytes(self, numel: int) -> int:
        """Return the size of `numel` values in bytes: codes and bfloat16 scales."""
        return -(-numel * self.bits // 8) + 2 * self.scales(numel)


CODINGS = {coding.name: coding for coding in (Coding("int8", 8, 64), Coding("int4", 4, 32))}
"""Codings by name. Error and size of each: docs/compact.md."""
