# SPDX-License-Identifier: Apache-2.0
"""The graph of an encoder."""

from __future__ import annotations

from surgery.onnx.context import Context
from surgery_formats.families.recipe import Model

__all__ = ["encoder"]


def encoder(ctx: Context, model: Model) -> None:
    """Build all of it."""
    raise NotImplementedError
