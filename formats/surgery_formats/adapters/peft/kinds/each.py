# SPDX-License-Identifier: Apache-2.0
"""Shared by writers of kinds that have one update for each module."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar

from surgery_formats.adapters.peft.file import PeftFile
from surgery_formats.canonical.adapter import Site
from surgery_formats.updates import Update

__all__ = ["put_each"]

U = TypeVar("U", bound=Update)


def put_each(
    file: PeftFile,
    updates: Sequence[tuple[Site, Update]],
    kind: type[U],
    put: Callable[[str, U], float | None],
    common: Callable[[U], Hashable] = lambda update: None,
    why: str = "",
) -> U | None:
    """Store every update of one kind, and what any kind may hold besides; drop the rest.

    Args:
        file: Gets the tensors.
        updates: All of the adapter's.
        kind: The class of those that are stored by `put`.
        put: Stores the factors of one under keys that begin with a module's path; returns the number that had to be
            multiplied into one of them, if there is a scale.
        common: What all modules of a file have in common; those that differ from the first are dropped.
        why: Why, for the ledger.

    Returns:
        The first that was stored; None if there is none.
    """
    first: U | None = None
    for site, update in updates:
        if not isinstance(update, kind):
            file.hold_other(site, update)
            continue
        first = first or update
        if file.own is None and common(update) != common(first):
            file.drop(site, update, why)
            continue
        key = f"{file.prefix}{file.module_of(site, update)[0]}"
        times = put(key, update)
        file.ledger.keep(site, update, "exact" if times in (None, 1.0) else "folded", key)
    return first
