# SPDX-License-Identifier: Apache-2.0
"""The name of a base, as an adapter made for it or a model made of it records it: that of the hub, where it is known."""

from __future__ import annotations

import re
from collections.abc import Iterable

from surgery_formats.files.remote.hub_cache import cached_repository
from surgery_formats.models.checkpoint import Checkpoint

__all__ = ["base_name", "hub_name", "is_hub_name"]

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
_READ_THERE = re.compile(r"hf://(?P<name>[^/@]+/[^/@]+)(?:[@/].*)?")


def base_name(base: Checkpoint) -> str:
    """The name on the hub, or else that of the folder: never a path.

    A path is one of this machine. A relative one depends on where a command is run, is another folder elsewhere, and
    ``models/base`` is how the hub calls a repository.
    """
    return hub_name(base) or base.path.resolve().name


def is_hub_name(name: str) -> bool:
    """Whether it could be one of the hub: ``org/name``."""
    return _HUB_NAME.fullmatch(name) is not None


def hub_name(base: Checkpoint, told: Iterable[str] = ()) -> str:
    """The hub's name of a base, or nothing.

    It is that under which it is read there, that of its folder in the hub's cache, or what its configuration or one of the
    names `told` calls a model of the folder's name.
    """
    if (there := _READ_THERE.fullmatch(str(base.path))) is not None:
        return there["name"] if _HUB_NAME.fullmatch(there["name"]) else ""
    cached = cached_repository(base.path)
    if cached is not None and _HUB_NAME.fullmatch(cached[0]):
        return cached[0]
    known = [str(component.config.get("_name_or_path", "")) for component in base.components.values()]
    own = base.path.resolve().name
    return next((name for name in (*known, *told) if _HUB_NAME.fullmatch(name) and name.rpartition("/")[2] == own), "")
