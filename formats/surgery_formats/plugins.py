# SPDX-License-Identifier: Apache-2.0
"""Objects that other packages register under an entry point group, beside the built-in ones of a registry."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from importlib.metadata import entry_points
from typing import Any, Protocol, TypeVar

from surgery_formats.errors import SurgeryError

__all__ = ["Registered", "forget_plugins", "with_plugins"]


class Registered(Protocol):
    """An object of a registry."""

    @property
    def name(self) -> str:
        """Its key in the registry."""


T = TypeVar("T", bound=Registered)


def with_plugins(group: str, built_in: Iterable[T], noun: str) -> dict[str, T]:
    """The objects of a registry by name: the built-in ones in their order, then those of plugins.

    Args:
        group: Entry point group; each of its entry points is an object like those of `built_in`.
        built_in: Objects that the registry always has.
        noun: The kind of object, for messages (``format``).

    Raises:
        SurgeryError: a plugin cannot be imported, has no name, or has a name that is taken.
    """
    known = {item.name: item for item in built_in}
    for entry, plugin in _loaded(group, noun):
        if known.setdefault(plugin.name, plugin) is not plugin:
            raise SurgeryError(f"the {noun} plugin '{entry}' takes the name '{plugin.name}', which is taken")
    return known


@cache
def _installed() -> Any:  # EntryPoints; before Python 3.12 SelectableGroups, which has select() too
    """All entry points: looking through the installed packages once serves every group."""
    return entry_points()


@cache
def _loaded(group: str, noun: str) -> tuple[tuple[str, Any], ...]:
    loaded = []
    for entry in sorted(_installed().select(group=group), key=lambda entry: entry.name):
        try:
            plugin = entry.load()
        except Exception as error:
            raise SurgeryError(f"the {noun} plugin '{entry.name}' cannot be imported: {error}") from error
        if not isinstance(getattr(plugin, "name", None), str):
            raise SurgeryError(f"the {noun} plugin '{entry.name}' is not a {noun}: {entry.value} has no name")
        loaded.append((entry.name, plugin))
    return tuple(loaded)


def forget_plugins() -> None:
    """Look for plugins again: packages were installed or removed while this process ran."""
    _installed.cache_clear()
    _loaded.cache_clear()
