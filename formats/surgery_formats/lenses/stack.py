# SPDX-License-Identifier: Apache-2.0
"""One of E experts of a 3-D tensor ``(E, rows, cols)``, which a storage flattens to ``(E, rows * cols)``."""

from __future__ import annotations

from surgery_formats.lenses.view import View

__all__ = ["expert"]


def expert(index: int, count: int, shape: tuple[int, int]) -> View:
    """Expert `index` of `count`, each of `shape`, in a storage of ``(count * rows, cols)``.

    Raises:
        IndexError: no such expert.
    """
    if not 0 <= index < count:
        raise IndexError(f"expert {index} of {count}")
    return View(range(index * shape[0], (index + 1) * shape[0]), range(shape[1]))
