# SPDX-License-Identifier: Apache-2.0
"""The part of an update that factors of low rank hold, for comparisons."""

from __future__ import annotations

from surgery_formats.updates.dora import DoRA
from surgery_formats.updates.lora import LoRA
from surgery_formats.updates.update import Update

__all__ = ["low_rank_part"]


def low_rank_part(update: Update) -> LoRA | None:
    """All of an update, or the direction of a DoRA, as one LoRA; None where it has no low-rank part."""
    return update.direction if isinstance(update, DoRA) else update.low_rank()
