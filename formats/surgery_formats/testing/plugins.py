# SPDX-License-Identifier: Apache-2.0
"""Register a plugin for the length of a test, without installing its package."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType

from surgery_formats.plugins import forget_plugins

__all__ = ["installed"]

_MODULE = "surgery_plugin_under_test"


@contextmanager
def installed(group: str, name: str, plugin: object) -> Iterator[None]:
    """An installed package whose only entry point is `plugin`, on the path of this process.

    Args:
        group: Entry point group, as in ``[project.entry-points."surgery.containers"]``.
        name: Of the entry point.
        plugin: The object, or where it is imported from (``package.module:OBJECT``).
    """
    with TemporaryDirectory(prefix="surgery-plugin-") as folder:
        target = plugin if isinstance(plugin, str) else f"{_MODULE}_{id(plugin)}:plugin"
        module = target.partition(":")[0]
        if not isinstance(plugin, str):
            sys.modules[module] = ModuleType(module)
            sys.modules[module].__dict__["plugin"] = plugin
        info = Path(folder, f"{_MODULE}_{id(plugin)}-0.dist-info")
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {info.name.partition('-')[0]}\nVersion: 0\n")
        (info / "entry_points.txt").write_text(f"[{group}]\n{name} = {target}\n")
        sys.path.insert(0, folder)
        try:
            _look_again()
            yield
        finally:
            sys.path.remove(folder)
            if not isinstance(plugin, str):
                del sys.modules[module]
            _look_again()


def _look_again() -> None:
    importlib.invalidate_caches()
    forget_plugins()
