# SPDX-License-Identifier: Apache-2.0
"""Types of blocks that are read by the package ``gguf`` of llama.cpp: their codebooks are tables of thousands of numbers.

It is needed for nothing else, so it is an extra, and is imported when such a tensor is read.
"""

from __future__ import annotations

import importlib

from surgery_formats.arrays import Array
from surgery_formats.errors import FitError
from surgery_formats.extras import require

__all__ = ["BY_LIBRARY", "dequantise"]

BY_LIBRARY = frozenset(("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S"))
"""Types by name."""


def dequantise(rows: Array, name: str) -> Array:
    """The values of rows of blocks, float32.

    Args:
        rows: uint8 ``(rows, bytes)``.
        name: Of the type.

    Raises:
        MissingPackageError: the package is not installed.
        FitError: it is too old for the type.
    """
    library = require("gguf", f"values of type {name}")
    importlib.import_module("gguf.quants")
    type_ = getattr(library.GGMLQuantizationType, name, None)
    if type_ is None:
        raise FitError(f"this version of the package gguf does not know {name}", hint="install its newest version")
    values: Array = library.quants.dequantize(rows, type_)
    return values
