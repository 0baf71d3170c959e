# SPDX-License-Identifier: Apache-2.0
"""Plugins: objects that installed packages add to a registry."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from surgery.consumers.registry import consumers
from surgery_formats.adapters.mlx import MLX
from surgery_formats.adapters.peft.kinds import kinds
from surgery_formats.adapters.registry import BUILT_IN, ENTRY_POINTS, formats
from surgery_formats.containers.registry import containers
from surgery_formats.errors import SurgeryError
from surgery_formats.storage.registry import storage_kinds
from surgery_formats.testing.plugins import installed

REGISTRIES = {
    "consumers": consumers,
    "containers": containers,
    "storages": storage_kinds,
    "adapter_formats": formats,
    "peft_kinds": kinds,
}


def test_a_plugin_is_registered_after_the_built_in_ones_while_it_is_installed() -> None:
    plugin = replace(MLX, name="toy")
    with installed(ENTRY_POINTS, "toy", plugin):
        assert list(formats().values()) == [*BUILT_IN, plugin]
    assert list(formats().values()) == [*BUILT_IN]


def test_two_plugins_can_be_installed_at_once() -> None:
    first, second = replace(MLX, name="first"), replace(MLX, name="second")
    with installed(ENTRY_POINTS, "b", first), installed(ENTRY_POINTS, "a", second):
        assert list(formats())[len(BUILT_IN) :] == ["second", "first"]  # in order of their entry points


def test_a_plugin_is_imported_from_where_its_entry_point_says() -> None:
    with installed(ENTRY_POINTS, "again", "surgery_formats.adapters.mlx:MLX"):
        assert formats()["mlx"] is MLX


def test_a_plugin_must_not_take_a_built_in_name() -> None:
    with installed(ENTRY_POINTS, "thief", replace(MLX, title="another")), pytest.raises(SurgeryError, match="taken"):
        formats()


@pytest.mark.parametrize("group", ["consumers", "containers", "storages", "adapter_formats", "peft_kinds"])
def test_a_plugin_without_a_name_is_named_by_its_entry_point(group: str) -> None:
    with (
        installed(f"surgery.{group}", "nameless", object()),
        pytest.raises(SurgeryError, match=r"plugin 'nameless' of .* is not a .* has no name"),
    ):
        REGISTRIES[group]()


def test_a_format_of_an_older_interface_is_named_with_what_it_lacks() -> None:
    members = {name: getattr(MLX, name) for name in dir(MLX) if not name.startswith("_") and name != "file_stems"}
    with (
        installed(ENTRY_POINTS, "old", SimpleNamespace(**members | {"name": "old"})),
        pytest.raises(SurgeryError, match=r"plugin 'old' of .* has no file_stems"),
    ):
        formats()


def test_a_plugin_that_cannot_be_imported_is_named() -> None:
    with installed(ENTRY_POINTS, "broken", "surgery_formats:nothing"), pytest.raises(SurgeryError, match="'broken'"):
        formats()


def test_a_plugin_that_ends_the_program_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "quitting_plugin.py").write_text("raise SystemExit(0)")
    monkeypatch.syspath_prepend(tmp_path)
    with installed(ENTRY_POINTS, "quits", "quitting_plugin:FORMAT"), pytest.raises(SurgeryError, match="'quits'"):
        formats()
