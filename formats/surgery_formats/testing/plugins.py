# SPDX-License-Identifier: Apache-2.0
"""Register a plugin for the length of a test, without installing its package."""

from __future__ import annotations

import importlib
import sys
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType

from surgery_formats.plugins import forget_plugins

__all__ = ["installed", "installed_project"]

_MODULE = "surgery_plugin_under_test"


@contextmanager
def installed(group: str, name: str, plugin: object) -> Iterator[None]:
    """An installed package whose only entry point is `plugin`, on the path of this process.

    Args:
        group: Entry point group, as in ``[project.entry-points."surgery.containers"]``.
        name: Of the entry point.
        plugin: The object, or where it is imported from (``package.module:OBJECT``).
    """
    target, module = plugin, f"{_MODULE}_{id(plugin)}"
    if not isinstance(plugin, str):
        target = f"{module}:plugin"
        sys.modules[module] = ModuleType(module)
        sys.modules[module].__dict__["plugin"] = plugin
    try:
        with _distribution(f"[{group}]\n{name} = {target}\n"):
            yield
    finally:
        sys.modules.pop(module, None)


@contextmanager
def installed_project(folder: Path) -> Iterator[None]:
    """The package in `folder` as if it were installed: its modules can be imported, its entry points are found.

    Args:
        folder: Holds pyproject.toml and, beside it, the modules.
    """
    project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
    lines = []
    for group, entries in project.get("entry-points", {}).items():
        lines += [f"[{group}]", *(f"{name} = {target}" for name, target in entries.items())]
    sys.path.insert(0, str(folder))
    try:
        with _distribution("\n".join(lines)):
            yield
    finally:
        sys.path.remove(str(folder))


@contextmanager
def _distribution(entry_points: str) -> Iterator[None]:
    """A distribution with these entry points on the path."""
    with TemporaryDirectory(prefix="surgery-plugin-") as folder:
        name = f"{_MODULE}_{Path(folder).name.rpartition('-')[2]}"
        info = Path(folder, f"{name}-0.dist-info")
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0\n")
        (info / "entry_points.txt").write_text(entry_points)
        sys.path.insert(0, folder)
        try:
            _look_again()
            yield
        finally:
            sys.path.remove(folder)
            _look_again()


def _look_again() -> None:
    importlib.invalidate_caches()
    forget_plugins()
