# SPDX-License-Identifier: Apache-2.0
"""The layout of an HDF5 file as h5py writes one by default, before its arrays are known; see `containers.hdf5`."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence

from surgery_formats.containers.base import FileLayout, TensorSpec
from surgery_formats.containers.hdf5 import SIGNATURE
from surgery_formats.dtypes import DType
from surgery_formats.errors import FitError

__all__ = ["lay_out_hdf5"]

_NONE = (1 << 64) - 1  # no address
_LEAF, _INNER = 4, 16  # half the entries of a table, and half the children of a node
_ALIGNMENT = 8
_TYPES = {
    DType.F16: bytes.fromhex("11200f0002000000000010000a05000a0f00000000000000"),
    DType.F32: bytes.fromhex("11201f000400000000002000170800177f00000000000000"),
    DType.F64: bytes.fromhex("11203f000800000000004000340b0034ff03000000000000"),
    DType.I64: bytes.fromhex("10080000080000000000400000000000"),
}
"""Messages of the element types (specification IV.A.2.d)."""

_Tree = dict[str, "_Tree | TensorSpec"]


def lay_out_hdf5(tensors: Sequence[TensorSpec]) -> FileLayout:
    """The layout of a file with these datasets, whose names are paths of groups.

    Raises:
        FitError: a type that such files lack, or a name that is a group and a dataset.
    """
    tree: _Tree = {}
    for spec in tensors:
        if spec[1] not in _TYPES:
            raise FitError(f"an HDF5 file here has no arrays of {spec[1].label}", tensor=spec[0])
        *groups, leaf = spec[0].split("/")
        inside = tree
        for group in groups:
            inner = inside.setdefault(group, {})
            if not isinstance(inner, dict):
                raise FitError("a dataset where a group is needed", tensor=spec[0])
            inside = inner
        if leaf in inside:
            raise FitError("this name appears twice", tensor=spec[0])
        inside[leaf] = spec
    writer = _Writer()
    root, names, heap = writer.group(tree)
    places, at = {}, -(-len(writer.data) // _ALIGNMENT) * _ALIGNMENT
    padding = []
    for name, dtype, shape in tensors:
        nbytes = dtype.nbytes(math.prod(shape))
        places[name] = at, nbytes
        end = at + nbytes
        at = -(-end // _ALIGNMENT) * _ALIGNMENT
        padding += [(end, at - end)] if at > end else []
    for name, (place, nbytes) in places.items():
        struct.pack_into("<2Q", writer.data, writer.layouts[name], place, nbytes)
    head = SIGNATURE + bytes((0, 0, 0, 0, 0, 8, 8, 0)) + struct.pack("<HHI", _LEAF, _INNER, 0)
    head += struct.pack("<4Q", 0, _NONE, at, _NONE) + struct.pack("<QQII2Q", 0, root, 1, 0, names, heap)
    header = head + bytes(writer.data[len(head) :])
    header += bytes(-len(header) % _ALIGNMENT)
    return FileLayout(header, places, at, tuple(padding))


class _Writer:
    """What stands before the arrays, object by object; `layouts` has the places of the addresses of the arrays."""

    def __init__(self) -> None:
        self.data = bytearray(96)
        self.layouts: dict[str, int] = {}

    def put(self, content: bytes) -> int:
        """Append, and return the address."""
        self.data += bytes(-len(self.data) % 8)
        at = len(self.data)
        self.data += content
        return at

    def header(self, messages: Sequence[tuple[int, bytes]]) -> int:
        """An object header of version 1."""
        body = b"".join(
            struct.pack("<HHB3x", kind, len(data) + -len(data) % 8, 0) + data + bytes(-len(data) % 8)
            for kind, data in messages
        )
        return self.put(struct.pack("<BBHII4x", 1, 0, len(messages), 1, len(body)) + body)

    def group(self, tree: _Tree) -> tuple[int, int, int]:
        """Addresses of a group's object header, its tree and its names."""
        heap, offsets = bytearray(8), dict[str, int]()
        entries: list[tuple[int, bytes]] = []
        for name in sorted(tree, key=str.encode):
            inner = tree[name]
            if isinstance(inner, dict):
                at, names, below = self.group(inner)
                entry = struct.pack("<QII2Q", at, 1, 0, names, below)
            else:
                entry = struct.pack("<QII16x", self.dataset(inner), 0, 0)
            offsets[name] = len(heap)
            raw = name.encode() + b"\x00"
            heap += raw + bytes(-len(raw) % 8)
            entries.append((offsets[name], struct.pack("<Q", offsets[name]) + entry))
        values = self.put(bytes(heap))
        local = self.put(b"HEAP" + bytes(4) + struct.pack("<3Q", len(heap), 1, values))
        nodes: list[tuple[int, int]] = []  # the last name below, and the address
        for start in range(0, len(entries), 2 * _LEAF):
            part = entries[start : start + 2 * _LEAF]
            table = b"SNOD" + struct.pack("<BxH", 1, len(part)) + b"".join(entry for _, entry in part)
            nodes.append((part[-1][0], self.put(table + bytes(40 * (2 * _LEAF - len(part))))))
        root = self.nodes(nodes)
        return self.header([(0x11, struct.pack("<2Q", root, local))]), root, local

    def nodes(self, children: list[tuple[int, int]], level: int = 0) -> int:
        """Address of the root of a tree over `children`."""
        size = 24 + 8 + 2 * _INNER * 16
        parts = [children[at : at + 2 * _INNER] for at in range(0, len(children), 2 * _INNER)] or [[]]
        first = self.put(bytes(size * len(parts)))
        made, before = [], 0
        for number, part in enumerate(parts):
            left = first + (number - 1) * size if number else _NONE
            right = first + (number + 1) * size if number + 1 < len(parts) else _NONE
            node = b"TREE" + struct.pack("<BBH2QQ", 0, level, len(part), left, right, before)
            node += b"".join(struct.pack("<2Q", child, last) for last, child in part)
            before = part[-1][0] if part else 0
            at = first + number * size
            self.data[at : at + len(node)] = node
            made.append((before, at))
        return first if len(parts) == 1 else self.nodes(made, level + 1)

    def dataset(self, spec: TensorSpec) -> int:
        name, dtype, shape = spec
        space = bytes((1, len(shape), 0, 0, 0, 0, 0, 0)) + struct.pack(f"<{len(shape)}Q", *shape)
        fill = bytes((2, 2, 2, 1, 0, 0, 0, 0))
        at = self.header([(0x01, space), (0x03, _TYPES[dtype]), (0x05, fill), (0x08, b"\x03\x01" + bytes(16))])
        self.layouts[name] = at + 16 + 8 + len(space) + 8 + len(_TYPES[dtype]) + 8 + len(fill) + 8 + 2
        return at
