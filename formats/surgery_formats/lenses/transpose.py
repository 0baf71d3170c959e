# SPDX-License-Identifier: Apache-2.0
"""Weights stored ``(in, out)``: GPT-2's Conv1D."""

from __future__ import annotations

from surgery_formats.lenses.view import View

__all__ = ["transpose"]


def transpose(view: View) -> View:
    """`view` with its logical axes exchanged."""
    return View(view.cols, view.rows, not view.transposed, view.col_origin, view.row_origin)
