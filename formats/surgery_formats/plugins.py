# SPDX-License-Identifier: Apache-2.0
"""Objects that other packages register under an entry point group, beside the built-in ones of a registry."""

from __future__ import annotations

import traceback
from collections.abc import Iterable
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Protocol, TypeVar

from surgery_formats.errors import SurgeryError

__all__ = ["Registered", "forget_plugins", "plugin_behind", "with_plugins"]


class Registered(Protocol):
    """An object of a registry."""

    @property
    def name(self) -> str:
        """Its key in the registry."""


T = TypeVar("T", bound=Registered)

_LOADED: dict[str, tuple[tuple[EntryPoint, Any], ...]] = {}
"""Plugins that were imported, with their entry points, by group."""


def with_plugins(group: str, built_in: Iterable[T], noun: str, interface: type | None = None) -> dict[str, T]:
    """The objects of a registry by name: the built-in ones in their order, then those of plugins.

    Args:
        group: Entry point group; each of its entry points is an object like those of `built_in`.
        built_in: Objects that the registry always has.
        noun: The kind of object, for messages (``format``).
        interface: A Protocol whose members plugins must have, so that one of an older interface is refused by its name.

    Raises:
        SurgeryError: a plugin cannot be imported, lacks its name or another member, or has a name that is taken.
    """
    known = {item.name: item for item in built_in}
    if group not in _LOADED:
        members = tuple(name for name in (vars(interface) if interface is not None else ()) if not name.startswith("_"))
        _LOADED[group] = _load(group, noun, members)
    for entry, plugin in _LOADED[group]:
        if known.setdefault(plugin.name, plugin) is not plugin:
            raise SurgeryError(f"the {noun} plugin {_shown(entry)} takes the name '{plugin.name}', which is taken")
    return known


def plugin_behind(error: BaseException) -> str:
    """The loaded plugin whose code raised an error, or ran when it was raised: ``'toy' of toy-format 1.0``, or empty."""
    ran = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]
    packages = {entry.module.partition(".")[0]: entry for loaded in _LOADED.values() for entry, _ in loaded}
    packages |= {entry.module: entry for loaded in _LOADED.values() for entry, _ in loaded}
    names = (name for module in reversed(ran) for name in (module, module.partition(".")[0]))
    return next((_shown(packages[name]) for name in names if name in packages), "")


def _shown(entry: EntryPoint) -> str:
    """An entry point and the distribution it is of, for messages."""
    distribution = getattr(entry, "dist", None)
    return f"'{entry.name}' of {distribution.name} {distribution.version}" if distribution else f"'{entry.name}'"


@cache
def _installed() -> tuple[EntryPoint, ...]:
    """The entry points of all registries, found by looking through the installed packages once.

    Of the others, most of which belong to strangers, nothing is kept.
    """
    found = entry_points()
    groups = sorted(group for group in found.groups if group.startswith("surgery."))
    return tuple(entry for group in groups for entry in found.select(group=group))


def _load(group: str, noun: str, members: tuple[str, ...]) -> tuple[tuple[EntryPoint, Any], ...]:
    loaded = []
    for entry in sorted((entry for entry in _installed() if entry.group == group), key=lambda entry: entry.name):
        try:
            plugin = entry.load()
        except (Exception, SystemExit) as error:  # a module that ends the program would end it as if all had been done
            raise SurgeryError(f"the {noun} plugin {_shown(entry)} cannot be imported: {error!r}") from error
        if not isinstance(getattr(plugin, "name", None), str):
            raise SurgeryError(f"the {noun} plugin {_shown(entry)} is not a {noun}: {entry.value} has no name")
        if missing := next((member for member in members if not hasattr(plugin, member)), ""):
            raise SurgeryError(f"the {noun} plugin {_shown(entry)} is not a {noun}: {entry.value} has no {missing}")
        loaded.append((entry, plugin))
    return tuple(loaded)


def forget_plugins() -> None:
    """Look for plugins again: packages were installed or removed while this process ran."""
    _installed.cache_clear()
    _LOADED.clear()
