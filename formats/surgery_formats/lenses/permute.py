# SPDX-License-Identifier: Apache-2.0
"""Rows in another order than the logical weight's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from surgery_formats.lenses.view import View

__all__ = ["interleaved", "permute"]


def permute(view: View, order: Sequence[int]) -> View:
    """Logical row i is row ``order[i]`` of `view`.

    Raises:
        ValueError: `order` is not a permutation of the rows.
    """
    if sorted(order) != list(range(len(view.rows))):
        raise ValueError("not a permutation of the rows")
    return replace(view, rows=tuple(view.rows[i] for i in order))


def interleaved(heads: int, dim: int) -> tuple[int, ...]:
    """Row order of rotary weights stored as pairs (GGUF llama, Meta) for a logical weight stored as halves (Hugging Face).

    Logical row ``(head, half, i)`` lies at stored row ``(head, i, half)``, for `heads` heads of `dim` rows each (llama.cpp
    ``LlamaModel.permute``).
    """
    half = dim // 2
    return tuple(h * dim + i * 2 + s for h in range(heads) for s in range(2) for i in range(half))
