# SPDX-License-Identifier: Apache-2.0
"""Torch checkpoints (``.bin``, ``.pt``, ``.pth``, ``.ckpt``) as lazy byte ranges; nothing is executed.

Two containers are read: the zip archive that ``torch.save`` writes since 1.6 (``*/data.pkl`` beside
``*/data/<storage key>``), and the older file of five pickles (magic number, version, system, object, storage
keys) followed by the storages, each behind its 64-bit length. The pickles go through
`surgery_formats.containers.torch.pickle_interpreter`, which can call nothing.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from dataclasses import replace

from surgery_formats.containers.stored_zip import members
from surgery_formats.containers.torch.pickle_interpreter import interpret
from surgery_formats.containers.torch.rebuild import PickledStorage
from surgery_formats.dtypes import DType
from surgery_formats.errors import MalformedError
from surgery_formats.files.raw import File
from surgery_formats.tensors.tensor import StoredTensor
from surgery_formats.text import listing, show

__all__ = ["is_torch", "read_torch", "state_dict"]

_PICKLE_LIMIT = 64 << 20
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_VERSION = 1001
_COUNT_NBYTES = 8
WRAPPERS = (
    "state_dict",
    "model_state_dict",
    "model",
    "module",
)  # of Lightning, trainers, fairseq and DeepSpeed


def _open_zip(file: File) -> object:
    archive = members(file)
    pickles = [name for name in archive if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(pickles) != 1:
        raise MalformedError(
            f"{len(pickles)} members '*/data.pkl' instead of one",
            file=file.path,
            hint="not a torch checkpoint",
        )
    root = pickles[0].removesuffix("data.pkl")
    order = archive.get(f"{root}byteorder")
    if order is not None and bytes(file.read(order.offset, min(order.nbytes, 16))) != b"little":
        raise MalformedError("its numbers are not little-endian", file=file.path)
    if not {f"{root}version", f"{root}.data/version"} & archive.keys():
        raise MalformedError(f"no member '{show(root, 40)}version', which torch.load needs", file=file.path)
    pickled = archive[pickles[0]]
    if pickled.nbytes > _PICKLE_LIMIT:
        raise MalformedError(f"a pickle of {pickled.nbytes} bytes (at most {_PICKLE_LIMIT} are read)", file=file.path)

    def locate(key: str, nbytes: int) -> int:
        member = archive.get(f"{root}data/{key}")
        if member is None or member.nbytes != nbytes:
            what = "is missing" if member is None else f"has {member.nbytes} bytes, its description says {nbytes}"
            raise MalformedError(f"storage '{show(key)}' {what}", file=file.path)
        return member.offset

    stream = io.BytesIO(file.read(pickled.offset, pickled.nbytes))
    tree = interpret(stream, file, locate)
    if stream.tell() != pickled.nbytes:
        raise MalformedError("bytes behind the end of the pickle", file=file.path)
    return tree


def _no_storage(file: File) -> MalformedError:
    return MalformedError("a storage in the header", file=file.path)


def _open_legacy(file: File) -> object:
    """The object comes before the storages, so it is read twice: first for their sizes, then with their offsets."""
    stream = io.BytesIO(file.read(0, min(file.size, _PICKLE_LIMIT)))

    def no_storage(key: str, nbytes: int) -> int:
        raise _no_storage(file)

    if interpret(stream, file, no_storage) != _LEGACY_MAGIC or interpret(stream, file, no_storage) != _LEGACY_VERSION:
        raise MalformedError("not a torch checkpoint", file=file.path)
    system = interpret(stream, file, no_storage)
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise MalformedError("its numbers are not little-endian", file=file.path)
    begin = stream.tell()
    sizes: dict[str, int] = {}

    def measure(key: str, nbytes: int) -> int:
        sizes[key] = nbytes
        return 0

    interpret(stream, file, measure)
    keys = interpret(stream, file, no_storage)
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys) or sorted(keys) != sorted(sizes):
        raise MalformedError("the list of storages is not that of the tensors", file=file.path)
    at = stream.tell()
    offsets: dict[str, int] = {}
    for key in keys:
        count = int.from_bytes(file.read(at, _COUNT_NBYTES), "little")
        offsets[key] = at + _COUNT_NBYTES
        at = offsets[key] + sizes[key]
        # The count is in elements, whose size only the object's pickle knows.
        if at > file.size or (count == 0) != (sizes[key] == 0) or (count and sizes[key] % count):
            raise MalformedError(f"storage '{show(key)}' does not have the size its description gives", file=file.path)
    if at != file.size:
        raise MalformedError(f"{file.size - at} bytes behind the last storage", file=file.path)
    stream.seek(begin)
    return interpret(stream, file, lambda key, nbytes: offsets[key])


def is_torch(file: File) -> bool:
    """Whether `file` begins like a torch checkpoint.

    Its first member is then the pickle, or it has the older format's magic number.
    """
    head = bytes(file.read(0, min(file.size, 128)))
    if head.startswith(b"PK\x03\x04"):
        return b"/data.pkl" in head
    return _LEGACY_MAGIC.to_bytes(10, "little") in head[:32] or head.startswith(f"L{_LEGACY_MAGIC}L".encode())


def read_torch(file: File) -> object:
    """The object in a torch checkpoint.

    Returns:
        A tree of dict, list, tuple, str, int, float, bool, None, `DType` and `StoredTensor`. References are shared
        as they were when saved: a hostile tree may be cyclic, so walk it to a known depth only. Tensors that share
        bytes (ties) have the same `place`.

    Raises:
        MalformedError: not a torch checkpoint, or it asks for more than tensors and plain values; the message names
            what it asked for.
    """
    head = bytes(file.read(0, min(file.size, 4)))
    if head == b"PK\x03\x04":
        return _open_zip(file)
    if head[:1] == b"\x80" or head == b"L119":  # the magic number in protocols 2 and up, and 0 and 1
        return _open_legacy(file)
    raise MalformedError("not a torch checkpoint", file=file.path)


def _weights(tree: object) -> dict[object, object]:
    """The dict of tensors: `tree` itself, or a dict that it wraps."""
    if not isinstance(tree, dict):
        raise MalformedError(f"a {type(tree).__name__} where a dict of tensors was expected")
    if any(isinstance(value, StoredTensor) for value in tree.values()):
        return tree
    inside = [key for key in WRAPPERS if isinstance(tree.get(key), dict)]
    if len(inside) > 1:
        raise MalformedError(f"several dicts of tensors: {listing(inside)}")
    if not inside:
        return tree
    others = [str(key) for key, value in tree.items() if key != inside[0] and _holds_tensors(value)]
    if others:
        raise MalformedError(
            f"tensors under {listing(others)} beside those of the model", hint="save the model's state dict alone"
        )
    weights: dict[object, object] = tree[inside[0]]
    return weights


def _inner(value: object) -> Iterable[tuple[object, object]]:
    """Keys and values of a dict, positions and values of a list; none of anything else."""
    return value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()


def _holds_tensors(tree: object) -> bool:
    """Whether a tensor is in it, however deep. What is shared is looked into once: a file of 3 KB may repeat it a billion times."""
    waiting, seen = [tree], {id(tree)}
    while waiting:
        value = waiting.pop()
        if isinstance(value, StoredTensor):
            return True
        for _, item in _inner(value):
            if id(item) not in seen:
                seen.add(id(item))
                waiting.append(item)
    return False


def _pairs(tree: object) -> Iterator[tuple[str, object]]:
    for key, value in _weights(tree).items():
        if not isinstance(key, str):
            raise MalformedError(f"the key '{show(key)}' is not a string")
        if any("\ud800" <= c <= "\udfff" for c in key):
            raise MalformedError(f"the key '{show(key)}' is not Unicode (a lone surrogate)")
        if not isinstance(value, StoredTensor | str | int | float | DType | None):
            what = "storage" if isinstance(value, PickledStorage) else type(value).__name__
            raise MalformedError(f"a {what} where a tensor was expected", tensor=key)
        yield key, value


_KEY_LIMIT = 200  # of a part of a path, of which there may be as many copies as tensors


def nested_names(tree: object, depth: int = 4) -> list[str]:
    """The names of the tensors of a tree of dicts and lists, as dotted paths.

    Those below `depth` are left out, and what is shared is named once, where it is found first.
    """
    found: list[str] = []
    level, seen = [("", tree)], {id(tree)}
    for _ in range(depth):
        below = []
        for path, value in level:
            for key, item in _inner(value):
                name = f"{path}{str(key)[:_KEY_LIMIT] if isinstance(key, str | int) else '?'}"
                if isinstance(item, StoredTensor):
                    found.append(name)
                elif id(item) not in seen:
                    seen.add(id(item))
                    below.append((f"{name}.", item))
        level = below
    return found


def state_dict(tree: object) -> dict[str, StoredTensor]:
    """The tensors of `tree` by name: a dict of tensors, or one inside ``{"state_dict": ...}`` or the like.

    Raises:
        MalformedError: no such dict, or it holds dicts or lists, whose tensors would be lost.
    """
    return {key: replace(value, name=key) for key, value in _pairs(tree) if isinstance(value, StoredTensor)}
