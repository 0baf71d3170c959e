# SPDX-License-Identifier: Apache-2.0
"""The strings of a header that a conversion leaves behind."""

from __future__ import annotations

from surgery_formats.adapters.format import Rendering
from surgery_formats.adapters.grammar.header import ADAPTER_METADATA
from surgery_formats.adapters.writing import OF_THE_FILE
from surgery_formats.canonical.adapter import Adapter
from surgery_formats.text import listing

__all__ = ["lost_strings"]


def lost_strings(adapter: Adapter, rendering: Rendering) -> tuple[str, ...]:
    """A warning that names the metadata which the files have no place for, if there is some."""
    known = {*OF_THE_FILE, ADAPTER_METADATA, *rendering.metadata}
    lost = sorted(key for key in adapter.metadata if key not in known and not key.startswith("surgery."))
    if not lost:
        return ()
    return (f"{len(lost)} strings of its header have no place in these files: {listing(lost, 40)}",)
