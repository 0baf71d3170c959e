# SPDX-License-Identifier: Apache-2.0
"""Rows of a fused projection: q of qkv, gate of gate_up; and the reverse, one part of a fused update."""

from __future__ import annotations

from dataclasses import replace

from surgery_formats.lenses.view import View

__all__ = ["rows", "window"]


def rows(view: View, start: int, stop: int, step: int = 1) -> View:
    """Logical rows ``start:stop:step`` of `view` as a weight of their own."""
    return replace(view, rows=view.rows[start:stop:step])


def window(view: View, row_origin: int = 0, col_origin: int = 0) -> View:
    """`view` as the part of a larger logical weight that begins at ``(row_origin, col_origin)``."""
    return replace(view, row_origin=view.row_origin + row_origin, col_origin=view.col_origin + col_origin)
