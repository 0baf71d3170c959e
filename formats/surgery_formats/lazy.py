# SPDX-License-Identifier: Apache-2.0
"""Packages whose public names are imported when they are first used, so that importing the package costs nothing."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from surgery_formats.extras import explained
from surgery_formats.system import check_system

__all__ = ["lazy"]


def lazy(
    package: str, homes: Mapping[str, Sequence[str]]
) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """``__getattr__``, ``__dir__`` and ``__all__`` of `package`, from the names that each module defines.

    Type checkers do not see these names. The package therefore imports them once more under ``TYPE_CHECKING``, and a
    test compares both lists.
    """
    home_of = {name: module for module, names in homes.items() for name in names}
    public = sorted(home_of)

    @explained
    def __getattr__(name: str) -> Any:
        if name not in home_of:
            raise AttributeError(f"module '{package}' has no attribute '{name}'")
        check_system()  # before a module is imported that would fail at it
        return getattr(importlib.import_module(home_of[name]), name)

    return __getattr__, lambda: public, public
