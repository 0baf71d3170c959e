# SPDX-License-Identifier: Apache-2.0
"""Shared by kinds whose files have one setting for all modules: which updates a file holds, and under which keys."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import TypeVar

from surgery_formats.adapters.peft.file import PeftFile
from surgery_formats.canonical.adapter import Site
from surgery_formats.updates import Update

__all__ = ["of_one_setting"]

_Kind = TypeVar("_Kind")


def of_one_setting(
    file: PeftFile,
    updates: Sequence[tuple[Site, Update]],
    kind: type[_Kind],
    setting: Callable[[_Kind], Hashable],
    what: str,
) -> Iterator[tuple[Site, _Kind, str]]:
    """``(site, update, what the module's keys begin with)`` of updates of `kind` that have the first one's setting.

    All others are stored as every kind stores them, or dropped.

    Args:
        file: Under construction.
        updates: All of the adapter.
        kind: The class of updates that the file is for.
        setting: What all modules of a file have in common, as its configuration states it once.
        what: How to say that.
    """
    first: list[Hashable] = []
    for site, update in updates:
        if not isinstance(update, kind):
            file.hold_other(site, update)
            continue
        own = setting(update)
        if file.own is None and first and own != first[0]:
            file.drop(site, update, f"all modules of a file have one {what}")
            continue
        first.append(own)
        yield site, update, f"{file.prefix}{file.module_of(site, update)[0]}"
