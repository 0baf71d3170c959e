# SPDX-License-Identifier: Apache-2.0
"""A torch checkpoint that is to be written: the zip archive that ``torch.save`` writes, its pickle made here.

``archive/data.pkl`` describes a dict of tensors, ``archive/data/N`` holds the bytes of each, at multiples of 64. Members are
stored, so that nothing depends on values but their checksums. torch 1.6 and later load it, with ``weights_only`` too.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from surgery_formats.containers.base import TensorSpec
from surgery_formats.containers.torch.rebuild import STORAGES
from surgery_formats.dtypes import DType
from surgery_formats.errors import FitError

__all__ = ["Archive", "plan_archive"]

_LOCAL = struct.Struct("<4s5H3L2H")
_CENTRAL = struct.Struct("<4s6H3L5H2L")
_END = struct.Struct("<4s4H2LH")
_ALIGNMENT = 64
_MOST = (1 << 32) - 1  # a larger archive needs zip64
_DATE = 0x21  # 1980-01-01
_PADDING = b"FB"  # of torch's own extra field
_STORAGES = {dtype: name.rpartition(".")[2] for name, dtype in STORAGES.items()}

Data = bytes | memoryview


@dataclass(frozen=True, slots=True)
class Archive:
    """A file before its tensors are known.

    Attributes:
        header: All before the first tensor's own header.
        ranges: ``(offset, nbytes)`` of every tensor.
        nbytes: All of it.
        before: The header of a tensor's member, given its name and bytes.
        end: What lies behind the last tensor, once `before` was called for each.
    """

    header: bytes
    ranges: dict[str, tuple[int, int]]
    nbytes: int
    before: Callable[[str, Data], bytes]
    end: Callable[[], bytes]


def plan_archive(tensors: Sequence[TensorSpec], within: str = "") -> Archive:
    """The archive of a dict of `tensors`, or of ``{within: dict}``.

    Raises:
        FitError: torch has no such type here, or the archive would be larger than 4 GB.
    """
    pickled = _pickle(tensors, within)
    first = [("data.pkl", pickled), ("byteorder", b"little"), ("version", b"3\n")]
    header, entries = b"", list[tuple[str, int, int, int]]()
    for name, data in first:
        entries.append((name, len(header), zlib.crc32(data), len(data)))
        header += _local(name, len(header), zlib.crc32(data), len(data)) + data
    at = len(header)
    ranges: dict[str, tuple[int, int]] = {}
    members: dict[str, tuple[str, int]] = {}
    for number, (name, dtype, shape) in enumerate(tensors):
        if name in ranges:
            raise FitError("the name appears twice", tensor=name)
        nbytes = dtype.nbytes(_count(shape))
        members[name] = f"data/{number}", at
        at += len(_local(f"data/{number}", at, 0, 0))
        ranges[name] = at, nbytes
        at += nbytes
    names = [name for name, *_ in first] + [name for name, _ in members.values()]
    total = at + sum(_CENTRAL.size + len(f"archive/{name}") for name in names) + _END.size
    if total > _MOST:
        raise FitError("is larger than 4 GB, the most that a torch file is written with here")
    checked: dict[str, int] = {}

    def before(name: str, data: Data) -> bytes:
        checked[name] = zlib.crc32(data)
        member, offset = members[name]
        return _local(member, offset, checked[name], ranges[name][1])

    def end() -> bytes:
        own = [(member, offset, checked[name], ranges[name][1]) for name, (member, offset) in members.items()]
        directory = b"".join(_central(*entry) for entry in (*entries, *own))
        count = len(entries) + len(own)
        return directory + _END.pack(b"PK\x05\x06", 0, 0, count, count, len(directory), at, 0)

    return Archive(header, ranges, total, before, end)


def _count(shape: Sequence[int]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def _local(name: str, offset: int, checksum: int, nbytes: int) -> bytes:
    """The header of a member that begins at `offset`, padded so that its data is aligned."""
    raw = f"archive/{name}".encode()
    padding = -(offset + _LOCAL.size + len(raw) + 4) % _ALIGNMENT
    extra = _PADDING + struct.pack("<H", padding) + b"Z" * padding
    fixed = _LOCAL.pack(b"PK\x03\x04", 20, 0, 0, 0, _DATE, checksum, nbytes, nbytes, len(raw), len(extra))
    return fixed + raw + extra


def _central(name: str, offset: int, checksum: int, nbytes: int) -> bytes:
    raw = f"archive/{name}".encode()
    fields = (20, 20, 0, 0, 0, _DATE, checksum, nbytes, nbytes, len(raw), 0, 0, 0, 0, 0, offset)
    return _CENTRAL.pack(b"PK\x01\x02", *fields) + raw


def _pickle(tensors: Sequence[TensorSpec], within: str) -> bytes:
    """Protocol 2: ``{name: torch._utils._rebuild_tensor_v2(storage, 0, shape, strides, False, OrderedDict())}``."""
    items = b"".join(_text(tensor[0]) + _tensor(str(at), *tensor) for at, tensor in enumerate(tensors))
    inner = b"}(" + items + b"u"
    return b"\x80\x02" + (b"}" + _text(within) + inner + b"s" if within else inner) + b"."


def _tensor(key: str, name: str, dtype: DType, shape: tuple[int, ...]) -> bytes:
    if dtype not in _STORAGES:
        raise FitError(f"a torch file is not written with tensors of {dtype.label}", tensor=name)
    strides = tuple(_count(shape[axis + 1 :]) for axis in range(len(shape)))
    storage = b"(" + _text("storage") + _global("torch", _STORAGES[dtype]) + _text(key) + _text("cpu")
    storage += _number(_count(shape)) + b"tQ"
    hooks = _global("collections", "OrderedDict") + b")R"
    arguments = b"(" + storage + _number(0) + _numbers(shape) + _numbers(strides) + b"\x89" + hooks + b"t"
    return _global("torch._utils", "_rebuild_tensor_v2") + arguments + b"R"


def _global(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def _text(value: str) -> bytes:
    raw = value.encode(errors="replace")
    return b"X" + struct.pack("<I", len(raw)) + raw


def _number(value: int) -> bytes:
    if value < 1 << 31:
        return b"J" + struct.pack("<i", value)
    return b"\x8a\x08" + struct.pack("<q", value)


def _numbers(values: Sequence[int]) -> bytes:
    return b"(" + b"".join(map(_number, values)) + b"t"
