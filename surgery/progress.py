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
        done: So far: bytes of files, tokens of texts, or weights.
        total: Of the whole phase, in the same unit.
        phase: ``reading``, ``comparing``, ``factorising``, ``writing``, ``syncing``, ``proving``, ``measuring``, ``evaluating`` with the
            number of models; of shares that others compute, how many are done.
    """

    done: int
    total: int
    phase: str


Callback = Callable[[Progress], None]
