# SPDX-License-Identifier: Apache-2.0
"""Forms that some updates have: the answer of a kind, or of one that lacks the member, in one place."""

from __future__ import annotations

from surgery_formats.updates.lora import LoRA
from surgery_formats.updates.offset import Offset
from surgery_formats.updates.stacked import Stacked
from surgery_formats.updates.update import Update, is_directed, is_either_way, is_expanding, is_in_full

__all__ = ["expanded", "experts_of", "in_full", "low_rank_part", "plain_form", "stack_of_loras", "transposed"]


def low_rank_part(update: Update) -> LoRA | None:
    """All of an update, or what it adds before rows get their lengths, as one LoRA; None where it has no such part."""
    return update.direction if is_directed(update) else update.low_rank()


def expanded(update: Update) -> LoRA | None:
    """All of an update as one LoRA, exactly, of however many directions it takes; None where no file tells them."""
    return update.low_rank() or (update.expanded() if is_expanding(update) else None)


def in_full(update: Update) -> Offset | None:
    """An addition of which every number is stored; None for other updates."""
    return update.in_full() if is_in_full(update) else None


def experts_of(update: Update) -> tuple[Update, ...]:
    """The updates that a stack is made of, in order; none for an update that is not stacked."""
    parts = tuple(part for _, part in update.parts())
    return () if parts[0] is update else parts


def stack_of_loras(update: Update) -> Stacked | None:
    """A stack whose experts are LoRAs, or are the same as LoRAs; None for other updates."""
    if isinstance(update, Stacked):
        return update
    turned = transposed(update)
    stacks = [experts_of(update), experts_of(turned) if turned else ()]
    loras = [tuple(lora for expert in stack if (lora := expert.low_rank())) for stack in stacks]
    return Stacked(*loras) if loras[0] and list(map(len, loras)) == list(map(len, stacks)) else None


def plain_form(update: Update) -> Update:
    """The update as a LoRA, a stack of LoRAs or an offset, exactly; itself where it has none of these forms."""
    return update.low_rank() or stack_of_loras(update) or in_full(update) or update


def transposed(update: Update) -> Update | None:
    """A stack as it is for a base that stores experts as ``(E, in, out)``; None where the file alone tells the axes."""
    return update.transposed() if is_either_way(update) else None
