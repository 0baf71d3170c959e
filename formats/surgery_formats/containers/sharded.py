# SPDX-License-Identifier: Apache-2.0
"""A folder of weights in files of any container: one file, or shards and an index ``{"weight_map": {tensor: shard}}``.

Index and shards must agree in full: a loader that trusts one of them may load half of a model, or a mixture of two,
without an error. The names in an index are untrusted, so they may only name files of this folder (or,
through the links of a Hugging Face cache, of its ``blobs`` folder).
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surgery_formats.containers.base import Shard, ShardSet
from surgery_formats.containers.weight_files import (
    GRAPH_FILES,
    file_containers,
    holds_weights,
    is_weight_file,
    open_shard,
    open_weight_file,
)
from surgery_formats.dtypes import DType
from surgery_formats.errors import FitError, MalformedError, NotFoundError, SurgeryError
from surgery_formats.files.bounded_json import INDEX_LIMIT, read_object
from surgery_formats.files.places import entries, exists, is_folder, names_in
from surgery_formats.files.raw import open_file, stays_inside
from surgery_formats.files.remote.path import to_path
from surgery_formats.text import listing, show

__all__ = [
    "MODEL_STEMS",
    "SHARDED",
    "index_bytes",
    "index_name",
    "is_index",
    "is_training_state",
    "open_folder_tensors",
    "open_shards",
    "output_name",
    "shard_names",
]

MODEL_STEMS = ("model", "diffusion_pytorch_model", "pytorch_model")  # of a full model's files, in order of preference
_INDEX = re.compile(r"(?P<stem>.+)(?P<suffix>\.[^.]+)\.index(?P<variant>\.[^.]+)?\.json", re.DOTALL)
# Files of a training run beside the weights; they hold optimizer states and arguments.
_NOT_WEIGHTS = re.compile(r"(training_args|optimizer|scheduler|scaler|rng_state.*|random_states.*)\.[^.]+")
_BLOCKS = re.compile(
    r"(?<=[-._])(UD-)?(I?Q\d_\w+|TQ\d_0|MXFP4(_MOE)?|NVFP4)(?=(-\d{5}-of-\d{5})?\.gguf$)", re.IGNORECASE
)
_HEAD = 1 << 20  # bytes of an index in which it is recognised
_LOOKED_AT = 100  # folders in a folder without weights
_NAME_NBYTES = 255  # of one path component on every common file system
_DEVICES = re.compile(r"(con|prn|aux|nul|com[0-9]|lpt[0-9])(\..*)?", re.IGNORECASE)  # Windows opens these as devices


def is_index(name: str) -> bool:
    """Whether `name` is that of an index whose shards can be read."""
    return (match := _INDEX.fullmatch(name)) is not None and is_weight_file(f"x{match['suffix']}")


def is_training_state(name: str) -> bool:
    """Whether `name` is that of a training run's own file: arguments, or the state of its optimizer or generators."""
    return _NOT_WEIGHTS.fullmatch(name) is not None


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
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise MalformedError("the index has no weight_map", file=index_path)
    for tensor, name in weight_map.items():
        if not isinstance(name, str):
            raise MalformedError("its shard is not a string", file=index_path, tensor=tensor)
    folded: dict[str, str] = {}
    for name in sorted(set(weight_map.values())):
        path = index_path.parent / name if (fault := _name_fault(name, suffix)) is None else None
        if path is None:
            raise MalformedError(f"the shard '{show(name)}' {fault}", file=index_path)
        if folded.setdefault(name.casefold(), name) != name:
            raise MalformedError(
                f"the shards {listing([folded[name.casefold()], name])} are one file on some systems",
                file=index_path,
            )
        if not exists(path, links=True):
            hint = "the download is incomplete, or the index is left over from another model"
            raise MalformedError(f"the shard '{show(name)}' is missing", file=index_path, hint=hint)
        if not stays_inside(path):
            hint = "links may lead into the blobs of a Hugging Face cache only"
            raise MalformedError(f"the shard '{show(name)}' leads out of the folder", file=index_path, hint=hint)
    return weight_map


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
    shards = tuple(open_shard(index_path.parent / name) for name in sorted(set(weight_map.values())))
    _check_agreement(index_path, weight_map, shards)
    return ShardSet(index_path.parent, shards, index_path, index)


def _listed(folder: Path) -> list[str]:
    return [n for n in names_in(folder) if not n.startswith(".") and not is_folder(folder / n)]


def _pick(folder: Path, names: Sequence[str], stems: Iterable[str]) -> str:
    """The file or index to open: containers in their order, well-known names before a lone file."""
    for container in file_containers().values():
        for stem in stems:
            for suffix in container.suffixes:
                single, index = f"{stem}{suffix}", f"{stem}{suffix}.index.json"
                if index in names and single in names:
                    return _single_or_index(folder, single, index, suffix)
                if single in names or index in names:
                    return single if single in names else index
        lone = [n for n in names if (m := _INDEX.fullmatch(n)) and m["suffix"] in container.suffixes]
        lone = lone or [n for n in names if n.endswith(container.suffixes) and not _NOT_WEIGHTS.fullmatch(n)]
        if len(lone) > 1:
            raise MalformedError(
                f"{len(lone)} files of weights ({listing(lone)})", file=folder, hint="name one of them"
            )
        if lone:
            return lone[0]
    stem = next(iter(stems), "*")
    first, second, *_ = (f"{stem}{container.suffixes[0]}" for container in file_containers().values())
    hint = _graphs_below(folder) or _weights_below(folder) or f"expected {first}, or {second} and the like"
    raise NotFoundError("no weights here", file=folder, hint=hint)


def _graphs_below(folder: Path) -> str | None:
    """Where a repository keeps its graphs, if it has nothing else."""
    inner = folder / "onnx"
    try:
        graphs = [name for name in _listed(inner) if name.endswith(GRAPH_FILES[0].suffixes)]
    except OSError:
        return None
    return f"there are graphs in 'onnx': name one, such as onnx/{show(graphs[0])}" if graphs else None


def _weights_below(folder: Path) -> str | None:
    """The folders in a folder of models, from which one has to be chosen."""
    below = [entry for entry in entries(folder)[:_LOOKED_AT] if is_folder(entry) and not entry.name.startswith(".")]
    held = [str(entry) for entry in below if _holds_some(entry)]
    return f"there are weights in {listing(held)}: name one" if held else None


def _holds_some(folder: Path) -> bool:
    """Whether there are files of weights; none are known of in a folder that may not be read."""
    try:
        return any(map(holds_weights, _listed(folder)))
    except OSError:
        return False


def _single_or_index(folder: Path, single: str, index: str, suffix: str) -> str:
    """Choose between a file and an index beside it: harmless if the index names only that file, else refused."""
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
    where = to_path(path)
    if where.is_dir():
        return open_folder_tensors(where)
    if is_index(where.name) and (index := _INDEX.fullmatch(where.name)):
        return _open_indexed(where, index["suffix"])
    opened = open_weight_file(where)
    if len(opened) != 1:
        raise FitError("several components where the weights of one were expected", file=where)
    return next(iter(opened.values()))


def open_folder_tensors(folder: str | os.PathLike[str], stems: Sequence[str] = MODEL_STEMS) -> ShardSet:
    """The weights in `folder`: safetensors before pickles, well-known names before a lone file.

    Args:
        folder: Where to look; its sub-folders are not searched.
        stems: Well-known names without suffix, best first.

    Raises:
        NotFoundError: no such folder, or no weights in it.
        MalformedError: a file is malformed; index and shards disagree; several sets of weights.
    """
    where = to_path(folder)
    try:
        names = _listed(where)
    except OSError as error:
        raise NotFoundError(error.strerror or "cannot be listed", file=where) from error
    return open_shards(where / _pick(where, names, stems))


@dataclass(frozen=True, slots=True)
class _Sharded:
    name: str = "sharded"
    title: str = "a folder of model-00001-of-00002.safetensors and model.safetensors.index.json, or of one file"
    written_as: str = "sharded"

    def detect(self, path: Path) -> bool:
        """A folder with a file of weights or an index, or an index."""
        try:
            if not is_folder(path):
                file = open_file(path)
                return is_index(path.name) and b'"weight_map"' in file.read(0, min(file.size, _HEAD))
            names = _listed(path)
        except (SurgeryError, OSError):
            return False
        return any(is_index(name) or (is_weight_file(name) and not _NOT_WEIGHTS.fullmatch(name)) for name in names)

    def open(self, path: Path) -> dict[str, ShardSet]:
        """See `open_shards`."""
        return {"": open_shards(path)}


SHARDED = _Sharded()


def output_name(name: str, suffix: str, types: Collection[DType] = ()) -> str:
    """The name of a base's file or shard with another ending.

    ``pytorch_model-1.bin`` becomes ``model-1.safetensors``. A GGUF is commonly named after the types of its blocks: if its
    tensors have plain `types` only, ``llama-Q4_K_M.gguf`` becomes ``llama-F16.gguf``.
    """
    if suffix == ".gguf" and types and DType.U8 not in types:
        plain = next((dtype for dtype in (DType.BF16, DType.F16) if dtype in types), DType.F32)
        name = _BLOCKS.sub(plain.label, name)
    return name if name.endswith(suffix) else _plain_stem(name.rpartition(".")[0]) + suffix


def shard_names(first: str, suffix: str, count: int) -> list[str]:
    """Names of `count` weight files that replace a set whose first file is `first`."""
    stem = _unnumbered(first.removesuffix(suffix))
    return (
        [f"{stem}{suffix}"] if count == 1 else [f"{stem}-{i:05d}-of-{count:05d}{suffix}" for i in range(1, count + 1)]
    )


def index_name(first: str, suffix: str, base: str) -> str:
    """The name of an index whose first shard is `first`, beside shards of the ending `suffix`.

    Args:
        first: Name of the first shard.
        suffix: Its ending.
        base: Name of the base's index, or empty. Loaders of the base look for this name.
    """
    if match := _INDEX.fullmatch(base):
        return f"{_plain_stem(match['stem'])}{suffix}.index{match['variant'] or ''}.json"
    return f"{_unnumbered(first.removesuffix(suffix))}{suffix}.index.json"


def index_bytes(weight_map: Mapping[str, str], totals: Mapping[str, int], base: Mapping[str, Any] | None) -> bytes:
    """The content of an index.

    Args:
        weight_map: ``{tensor: shard}``.
        totals: ``total_size`` and ``total_parameters`` of the weights; the second is written if the base has it.
        base: The base's index, whose other metadata is kept.
    """
    kept = base.get("metadata") if base else None
    metadata = {**(kept if isinstance(kept, dict) else {}), "total_size": totals["total_size"]}
    metadata |= {key: totals[key] for key in ("total_parameters",) if key in metadata}
    text = json.dumps({"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}, indent=2)
    return text.encode() + b"\n"


def _plain_stem(stem: str) -> str:
    return re.sub("^pytorch_model", "model", stem)


def _unnumbered(stem: str) -> str:
    return re.sub(r"-\d+-of-\d+$", "", stem)
