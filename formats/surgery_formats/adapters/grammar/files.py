# SPDX-License-Identifier: Apache-2.0
"""The one file of weights of an adapter: found in what the user named, and looked into once for all formats."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

from surgery_formats.containers.base import ShardSet
from surgery_formats.containers.sharded import MODEL_STEMS, open_shards
from surgery_formats.containers.weight_files import is_weight_file
from surgery_formats.errors import SurgeryError
from surgery_formats.files.places import exists, is_file, names_in
from surgery_formats.files.raw import identity_of

__all__ = ["file_keys", "keys_at", "open_adapter_file", "weights_at"]

_DIFFUSERS = "pytorch_lora_weights"


def weights_at(path: Path) -> Path | None:
    """The file of weights that `path` is, or the one in a folder that holds no model and no other; None if there is none.

    A folder of diffusers' has its file under a name of its own, whatever lies beside it.
    """
    if is_file(path):
        return path if is_weight_file(path.name) else None
    try:
        names = [name for name in names_in(path) if is_weight_file(name) and is_file(path / name)]
    except (OSError, ValueError):  # a path that no system has
        return None
    own = [name for name in names if name.partition(".")[0] == _DIFFUSERS]
    if own:
        return path / own[-1]  # safetensors after bin
    alone = len(names) == 1 and not names[0].startswith((*MODEL_STEMS, "adapter_model", "adapters"))
    return path / names[0] if alone and not exists(path / "config.json") else None


def keys_at(path: Path) -> Mapping[str, object]:
    """The names of the tensors of the file at `path`; none if there is no such file, or it is malformed.

    Every format of one file asks, so the last answer is kept.
    """
    file = weights_at(path)
    return {} if file is None else file_keys(file)


def file_keys(file: Path) -> Mapping[str, object]:
    """The names of the tensors of one file; none if it is not there, or malformed."""
    try:
        return _keys(file, identity_of(file))
    except (SurgeryError, OSError, ValueError):
        return {}


@lru_cache(maxsize=1)
def _keys(file: Path, _identity: tuple[int, ...]) -> Mapping[str, object]:
    return dict.fromkeys(open_shards(file).tensors)


def open_adapter_file(path: Path) -> ShardSet:
    """The file of weights at `path`.

    Raises:
        NotFoundError, MalformedError: none, or not what its container says.
    """
    return open_shards(weights_at(path) or path)
