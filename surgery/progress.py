# SPDX-License-Identifier: Apache-2.0
"""How the library tells of its progress: a callback, never a print."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["Callback", "Progress"]


@dataclass(frozen=True, slots=True)
class Progress:
    """One step.

    Attributes:
        done: Bytes written so far, or tokens measured.
        total: Bytes the plan will write, or tokens of all texts.
        phase: ``writing``, ``syncing``, ``reading``, ``measuring``.
    """

    done: int
    total: int
    phase: str


Callback = Callable[[Progress], None]
