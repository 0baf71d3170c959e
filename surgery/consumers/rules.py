# SPDX-License-Identifier: Apache-2.0
"""Rules of traits: what a program makes of the parts of one."""

from __future__ import annotations

from dataclasses import dataclass

from surgery.consumers.part import AdapterPart
from surgery.consumers.verdict import Outcome, Remedy

__all__ = ["TraitRule", "honoured", "ignored", "refused", "remedy_of_kind"]


@dataclass(frozen=True, slots=True)
class TraitRule:
    """What a program makes of parts of one trait.

    Attributes:
        outcome: What becomes of them.
        why: A sentence for people.
        remedy: What makes the program honour them.
    """

    outcome: Outcome
    why: str = ""
    remedy: Remedy = ""


honoured = TraitRule("honoured")


def ignored(why: str, remedy: Remedy = "") -> TraitRule:
    """A rule for what is left out in silence, or with a warning in a log."""
    return TraitRule("ignored", why, remedy)


def refused(why: str, remedy: Remedy = "") -> TraitRule:
    """A rule for what stops the program from loading the adapter."""
    return TraitRule("refused", why, remedy)


def remedy_of_kind(part: AdapterPart) -> Remedy:
    """What helps a part of an adapter whose kind a program does not load at all."""
    if part.trait == "virtual tokens":
        return ""
    return "lora" if part.trait == "other kind" else "drop"
