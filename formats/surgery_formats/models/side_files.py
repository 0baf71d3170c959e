# SPDX-License-Identifier: Apache-2.0
"""Files beside a model's weights: those that outputs carry along, and those that they do not."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from surgery_formats.containers.pipeline import PIPELINE, part_folders
from surgery_formats.containers.sharded import is_index
from surgery_formats.containers.weight_files import holds_weights
from surgery_formats.files.bounded_json import read_object
from surgery_formats.files.output.manifest import is_safe_name
from surgery_formats.files.places import entries, exists, is_file, is_folder, is_own_folder
from surgery_formats.files.raw import stays_inside

__all__ = ["BASE_ROUNDING", "EXPORT_ACCOUNT", "side_files"]

BASE_ROUNDING = "base.rounding"
"""What a reversible merge keeps beside the model. Its ending is none of weights: programs load every such file."""

EXPORT_ACCOUNT = "surgery_export.json"
"""What an export into the folder of its base leaves there: an account of the files that it added, as in a manifest."""

_NEVER_CARRIED = (
    EXPORT_ACCOUNT,
    "surgery_manifest.json",
    BASE_ROUNDING,
    "adapter_config.json",
    "README.md",
    ".gitattributes",
)

Files = list[tuple[str, Path]]


def side_files(model: Path, shards: Collection[Path]) -> tuple[tuple[tuple[str, Path], ...], tuple[str, ...]]:
    """Side files of the model's folder and of the folders in it (in a pipeline: those that its index names).

    ``(relative name, path)`` of files to carry along, and the names of the others: weights that are no `shards` of the
    model, deeper folders, and links that lead out of their folder.
    """
    carried, left = _beside(model)
    if PIPELINE.detect(model):
        for name, folder in part_folders(model).items():
            inner, beside = _beside(folder, f"{name}/")
            config = folder / "config.json"
            if any(shard.parent == folder for shard in shards):
                left += beside
            elif exists(config, links=True):
                inner.append((f"{name}/config.json", config))
            carried += inner
        carried.sort()
    else:
        for entry in entries(model):
            if is_own_folder(entry) and not entry.name.startswith("."):
                inner, beside = _beside(entry, f"{entry.name}/", configs=True)
                carried, left = carried + inner, left + beside
    return tuple(carried), tuple(name for name, path in left if path not in shards)


def _beside(folder: Path, prefix: str = "", *, configs: bool = False) -> tuple[Files, Files]:
    """Files of one folder to carry, and those to leave; `prefix` goes before their names."""
    carried: Files = []
    left: Files = []
    exported = _exported(folder)
    for path in entries(folder):
        name = f"{prefix}{path.name}"
        if prefix and is_folder(path) and not path.name.startswith("."):
            left.append((f"{name}/", path))
        if not is_file(path) or path.name in _NEVER_CARRIED or path.name in exported or path.name.startswith("."):
            continue
        if (path.name == "config.json" and not configs) or is_index(path.name):
            continue
        kept = not holds_weights(path.name) and stays_inside(path) and is_safe_name(name)
        (carried if kept else left).append((name, path))
    return carried, left


def _exported(folder: Path) -> frozenset[str]:
    """Files that exports added to a model's folder."""
    account = folder / EXPORT_ACCOUNT
    files = read_object(account).get("files") if is_file(account) else None
    return frozenset(files) if isinstance(files, dict) else frozenset()
