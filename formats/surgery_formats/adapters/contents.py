# SPDX-License-Identifier: Apache-2.0
"""What files hold of an update: the one table of kinds that writers ask."""

from __future__ import annotations

from dataclasses import dataclass

from surgery_formats.updates import (
    DoRA,
    LoRA,
    Offset,
    Replacing,
    Stacked,
    TokenRows,
    Update,
    in_full,
    is_replacing,
    stack_of_loras,
)

__all__ = ["Contents", "contents_of"]


@dataclass(frozen=True, slots=True)
class Contents:
    """An update in the form in which formats hold it; all but `lora` of a DoRA exclude each other.

    Attributes:
        update: The update.
        lora: All of it as one LoRA, or the direction of a DoRA.
        dora: The update, if it is a DoRA.
        stack: All of it as a stack of LoRAs.
        offset: All of it as numbers that are added.
        whole: The update, if it is a whole parameter.
        rows: The update, if it is token rows.
    """

    update: Update
    lora: LoRA | None = None
    dora: DoRA | None = None
    stack: Stacked | None = None
    offset: Offset | None = None
    whole: Replacing | None = None
    rows: TokenRows | None = None

    @property
    def folded(self) -> str:
        """``VeRA as LoRA``, for the ledger; empty if the update is held as what it is."""
        form = self.dora or self.lora or self.stack or self.offset or self.update
        return "" if type(form) is type(self.update) else f"{self.update.kind} as {form.kind}"


def contents_of(update: Update) -> Contents:
    """An update in the form in which formats hold it; none for a kind that needs a place of its own."""
    dora = update if isinstance(update, DoRA) else None
    return Contents(
        update,
        update.low_rank() if dora is None else dora.direction,
        dora,
        stack_of_loras(update),
        in_full(update),
        update if is_replacing(update) else None,
        update if isinstance(update, TokenRows) else None,
    )
