# SPDX-License-Identifier: Apache-2.0
"""A folder of weights: one file, or shards and an index ``{"weight_map": {tensor: shard}}``.

Index and shards must agree in full: loaders that trust one of them load half of a model, or a mixture of two,
without a word. The names in an index are a stranger's, so they may only name files of this folder (or,
through the links of a Hugging Face cache, of its ``blobs`` folder).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from surgery_formats.containers.safetensors import Header, read_header
from surgery_formats.containers.torch.pickle_file import leftovers, open_torch, state_dict
from surgery_formats.errors import MalformedError, NotFoundError
from surgery_formats.files.bounded_json import INDEX_LIMIT, read_object
from surgery_formats.files.raw import File, open_file, stays_inside
from surgery_formats.tensors.tensor import StoredTensor
from surgery_formats.text import listing, show

__all__ = ["STEMS", "Shard", "ShardSet", "open_folder_tensors", "open_shards"]

Kind = Literal["safetensors", "torch"]

STEMS = ("model", "diffusion_pytorch_model", "pytorch_model", "adapter_model")  # in order of preference
_TORCH_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
_SUFFIXES = (".safetensors", *_TORCH_SUFFIXES)
_INDEX = re.compile(r"(?P<stem>.+)(?P<suffix>\.safetensors|\.bin)\.index(?:\.[^.]+)?\.json", re.DOTALL)
# Files of a training run beside the weights; they hold optimizer states and arguments.
_NOT_WEIGHTS = re.compile(r"(training_args|optimizer|scheduler|scaler|rng_state.*|random_states.*)\.(bin|pt|pth|ckpt)")
_NAME_NBYTES = 255  # of one path component on every common file system
_DEVICES = re.compile(r"(con|prn|aux|nul|com[0-9]|lpt[0-9])(\..*)?", re.IGNORECASE)  # Windows opens these as devices


@dataclass(frozen=True, slots=True)
class Shard:
    """One file of weights.

    Attributes:
        path: The file.
        kind: Its container.
        tensors: In order of position (safetensors) or of the dict (torch).
        header: Of a safetensors file.
        extras: Plain values beside the tensors of a torch checkpoint.
    """

    path: Path
    kind: Kind
    tensors: tuple[StoredTensor, ...]
    header: Header | None
    extras: dict[str, object]

    @property
    def file(self) -> File:
        """The open file.

        Raises:
            MalformedError: a torch checkpoint without a single tensor.
        """
        if self.header is not None:
            return self.header.file
        if not self.tensors:
            raise MalformedError("no tensors", file=self.path)
        return self.tensors[0].file


@dataclass(frozen=True)
class ShardSet:
    """The weights of a folder.

    Attributes:
        folder: The folder.
        shards: In order of their names.
        index_path: The index file, if the weights have one.
        index: Its content.
    """

    folder: Path
    shards: tuple[Shard, ...]
    index_path: Path | None
    index: dict[str, Any] | None

    @cached_property
    def tensors(self) -> dict[str, StoredTensor]:
        """Every tensor by name (names are unique across shards), in order of shards and positions."""
        return {tensor.name: tensor for shard in self.shards for tensor in shard.tensors}


def _open_shard(path: Path) -> Shard:
    if path.suffix == ".safetensors":
        header = read_header(open_file(path))
        return Shard(path, "safetensors", header.tensors, header, {})
    tree = open_torch(path)
    try:
        return Shard(path, "torch", tuple(state_dict(tree).values()), None, leftovers(tree))
    except MalformedError as error:
        raise MalformedError(error.message, file=path, tensor=error.tensor, hint=error.hint) from error


def _name_fault(name: str, suffix: str) -> str | None:
    """Why `name` is not a plain file name on every system, or None."""
    if name in ("", ".", "..") or any(c in '/\\:<>"|?*' for c in name):
        return "is not a plain file name"
    if not name.isprintable() or name[-1] in ". " or _DEVICES.fullmatch(name):
        return "is not a file name on every system"
    if len(name.encode()) > _NAME_NBYTES:
        return "is too long for a file name"
    return None if name.endswith(suffix) else f"does not end in '{suffix}' as its index does"


def _weight_map(index_path: Path, index: dict[str, Any], suffix: str) -> dict[str, str]:
    """The checked weight map: plain names of existing files of this folder."""
    found = index.get("weight_map")
    if not isinstance(found, dict) or not found:
        raise MalformedError("the index has no weight_map", file=index_path)
    for tensor, name in found.items():
        if not isinstance(name, str):
            raise MalformedError("its shard is not a string", file=index_path, tensor=tensor)
    folded: dict[str, str] = {}
    for name in sorted(set(found.values())):
        path = index_path.parent / name if (fault := _name_fault(name, suffix)) is None else None
        if path is None:
            raise MalformedError(f"the shard '{show(name)}' {fault}", file=index_path)
        if folded.setdefault(name.casefold(), name) != name:
            raise MalformedError(
                f"the shards {listing([folded[name.casefold()], name])} are one file on some systems",
                file=index_path,
            )
        if not os.path.lexists(path):
            hint = "the download is incomplete, or the index is left over from another model"
            raise MalformedError(f"the shard '{show(name)}' is missing", file=index_path, hint=hint)
        if not stays_inside(path):
            hint = "links may lead into the blobs of a Hugging Face cache only"
            raise MalformedError(f"the shard '{show(name)}' leads out of the folder", file=index_path, hint=hint)
    return found


def _check_agreement(index_path: Path, weight_map: dict[str, str], shards: Sequence[Shard]) -> None:
    """Index and shards name the same tensors in the same places."""
    where: dict[str, str] = {}
    for shard in shards:
        for tensor in shard.tensors:
            named = weight_map.get(tensor.name)
            if tensor.name in where:
                what = f"is in '{show(where[tensor.name])}' and in '{show(shard.path.name)}'"
            elif named is None:
                what = f"is in '{show(shard.path.name)}', but not in the index"
            elif named != shard.path.name:
                what = f"is in '{show(shard.path.name)}', but the index says '{show(named)}'"
            else:
                where[tensor.name] = shard.path.name
                continue
            raise MalformedError(what, file=index_path, tensor=tensor.name)
    missing = [name for name in weight_map if name not in where]
    if missing:
        what = f"{len(missing)} of its {len(weight_map)} tensors are not in their shards ({listing(missing)})"
        raise MalformedError(what, file=index_path, tensor=missing[0])


def _open_indexed(index_path: Path, suffix: str) -> ShardSet:
    index = read_object(index_path, INDEX_LIMIT)
    weight_map = _weight_map(index_path, index, suffix)
    shards = tuple(_open_shard(index_path.parent / name) for name in sorted(set(weight_map.values())))
    _check_agreement(index_path, weight_map, shards)
    return ShardSet(index_path.parent, shards, index_path, index)


def _listed(folder: Path) -> list[str]:
    with os.scandir(folder) as entries:
        names = [entry.name for entry in entries]
    # os.path.isdir, unlike an entry, takes a loop of links for no folder instead of failing.
    return sorted(n for n in names if not n.startswith(".") and not os.path.isdir(folder / n))


def _pick(folder: Path, names: Sequence[str], stems: Iterable[str]) -> str:
    """The file or index to open: safetensors before pickles, well-known names before a lone file."""
    for suffixes in ((".safetensors",), _TORCH_SUFFIXES):
        for stem in stems:
            for suffix in suffixes:
                single, index = f"{stem}{suffix}", f"{stem}{suffix}.index.json"
                if index in names and single in names:
                    return _single_or_index(folder, single, index, suffix)
                if single in names or index in names:
                    return single if single in names else index
        lone = [n for n in names if (m := _INDEX.fullmatch(n)) and m["suffix"] in suffixes]
        lone = lone or [n for n in names if n.endswith(suffixes) and not _NOT_WEIGHTS.fullmatch(n)]
        if len(lone) > 1:
            raise MalformedError(
                f"{len(lone)} files of weights ({listing(lone)})", file=folder, hint="name one of them"
            )
        if lone:
            return lone[0]
    stem = next(iter(stems), "")
    raise NotFoundError(
        "no weights here", file=folder, hint=f"expected {stem or '*'}.safetensors, or {stem or '*'}.bin and the like"
    )


def _single_or_index(folder: Path, single: str, index: str, suffix: str) -> str:
    """Both are there: harmless when the index names just this file; else nobody knows which one is stale."""
    content = read_object(folder / index, INDEX_LIMIT)
    shards = set(_weight_map(folder / index, content, suffix).values())
    if shards != {single}:
        raise MalformedError(
            f"two models: '{single}' and the shards of '{index}'", file=folder, hint="name one of them"
        )
    return index


def open_shards(path: str | os.PathLike[str]) -> ShardSet:
    """Open one file of weights, an index with its shards, or a folder (see `open_folder_tensors`).

    Raises:
        NotFoundError: nothing there.
        MalformedError: a file is malformed, or index and shards disagree.
    """
    where = Path(path)
    if where.is_dir():
        return open_folder_tensors(where)
    index = _INDEX.fullmatch(where.name)
    if index:
        return _open_indexed(where, index["suffix"])
    if where.suffix not in _SUFFIXES:
        raise MalformedError(
            "not a file of weights by its name", file=where, hint=f"expected one of {', '.join(_SUFFIXES)}"
        )
    return ShardSet(where.parent, (_open_shard(where),), None, None)


def open_folder_tensors(folder: str | os.PathLike[str], stems: Sequence[str] = STEMS) -> ShardSet:
    """The weights in `folder`: safetensors before pickles, well-known names before a lone file.

    Args:
        folder: Where to look; its sub-folders are not searched.
        stems: Well-known names without suffix, best first.

    Raises:
        NotFoundError: no such folder, or no weights in it.
        MalformedError: a file is malformed; index and shards disagree; several sets of weights.
    """
    where = Path(folder)
    try:
        names = _listed(where)
    except OSError as error:
        raise NotFoundError(error.strerror or "cannot be listed", file=where) from error
    return open_shards(where / _pick(where, names, stems))
