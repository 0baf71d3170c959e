# SPDX-License-Identifier: Apache-2.0
"""Where everything of an ``.onnx_adapter`` file lies: to the byte as onnxruntime (1.31) writes it, before the arrays are known.

onnxruntime takes all arrays at once; with a plan they are made and written one by one. A flatbuffer is built from its end: what refers
to something lies before it, and offsets count what is behind them (flatbuffers.dev, "Internals"; flatbuffers' `FlatBufferBuilder`).
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from surgery_formats.containers.base import TensorSpec
from surgery_formats.containers.onnx_adapter import ELEMENTS, FORMAT_VERSION, IDENTIFIER, LIMIT, NAME_LIMIT
from surgery_formats.errors import FitError

__all__ = ["OnnxAdapterPlan", "plan_onnx_adapter"]

_VERSIONS = 1, 1
"""Of the adapter and of the model."""


@dataclass(frozen=True, slots=True)
class OnnxAdapterPlan:
    """A file before its arrays are known.

    Attributes:
        header: Its first bytes, up to the first array.
        ranges: ``(offset, nbytes)`` of every array by name, in order of position: the last name lies first.
        gaps: What lies before every array but the first, and behind the last one.
        nbytes: Of the file.
    """

    header: bytes
    ranges: Mapping[str, tuple[int, int]]
    gaps: Mapping[str, bytes]
    end: bytes
    nbytes: int

    def before(self, name: str, data: bytes | memoryview) -> bytes:
        """The bytes between an array and what is in front of it; those of the first one are in the header."""
        return self.gaps[name]

    def pieces(self, arrays: Iterable[bytes | memoryview]) -> Iterator[bytes | memoryview]:
        """All bytes of the file in order; `arrays` in the order of `ranges`."""
        yield self.header
        for (name, (_, nbytes)), data in zip(self.ranges.items(), arrays, strict=True):
            assert len(data) == nbytes, name
            yield self.gaps[name]
            yield data
        yield self.end


def plan_onnx_adapter(tensors: Sequence[TensorSpec]) -> OnnxAdapterPlan:
    """The plan of a file with these arrays, in order of their names.

    Raises:
        FitError: no arrays, a type that such files lack, or more data than a flatbuffer holds.
    """
    specs = sorted(tensors)
    if not specs:
        raise FitError("the adapter has no arrays")
    builder = _Builder()
    parameters = []
    for name, dtype, sizes in specs:
        if dtype not in ELEMENTS:
            raise FitError(f"an .onnx_adapter file has no arrays of {dtype.label}", tensor=name)
        if len(encoded := name.encode()) > NAME_LIMIT:
            raise FitError(f"a name of {len(encoded)} bytes (at most {NAME_LIMIT} are read)", tensor=name)
        text = builder.string(encoded)
        shape = builder.vector(struct.pack(f"<{len(sizes)}q", *sizes), len(sizes), 8)
        data = builder.array(name, math.prod(sizes) * dtype.bits // 8)
        parameters.append(builder.table([text, shape, ELEMENTS[dtype], data], offsets=(0, 1, 3)))
        if builder.size > LIMIT:
            raise FitError("more than 2 GB do not fit into an .onnx_adapter file", tensor=name)
    root = builder.table([FORMAT_VERSION, *_VERSIONS, builder.references(parameters)], offsets=(3,))
    builder.finish(root, IDENTIFIER)
    return builder.plan()


class _Builder:
    """A flatbuffer from its end. What is in it is known by its distance from there, as in flatbuffers' own.

    Attributes:
        size: Bytes so far.
    """

    def __init__(self) -> None:
        self.size = 0
        self._alignment = 4
        self._pieces: list[bytes] = []  # the last one lies first
        self._arrays: list[tuple[str, int, int, int]] = []  # name, size before it, bytes, pieces behind it
        self._tables: dict[bytes, int] = {}  # the distance of a vtable, by its bytes

    def string(self, text: bytes) -> int:
        """A string, with a zero behind it; nothing for an empty one."""
        if not text:
            return 0
        self._pad(len(text) + 1, 4)
        self._push(text + b"\0")
        return self._length(len(text))

    def vector(self, data: bytes, count: int, size: int) -> int:
        """A vector of `count` elements of `size` bytes."""
        self._pad(len(data), 4)
        self._pad(len(data), size)
        self._push(data)
        return self._length(count)

    def array(self, name: str, nbytes: int) -> int:
        """A vector of bytes that are not known yet."""
        self._pad(nbytes, 4)
        self._arrays.append((name, self.size, nbytes, len(self._pieces)))
        self.size += nbytes
        return self._length(nbytes)

    def references(self, targets: Sequence[int]) -> int:
        """A vector of offsets of what was built before."""
        self._pad(4 * len(targets), 4)
        for target in reversed(targets):
            self._push(self._offset(target))
        return self._length(len(targets))

    def table(self, fields: Sequence[int], offsets: Sequence[int]) -> int:
        """A table of 32-bit fields, of which `offsets` refer to what was built before; an offset of 0 is left out."""
        start, at = self.size, {}
        for number in reversed(range(len(fields))):
            if number in offsets and not fields[number]:
                continue
            self._push(self._offset(fields[number]) if number in offsets else struct.pack("<i", fields[number]))
            at[number] = self.size
        here = self.size + 4  # its own first field, which names the vtable
        places = [here - at[number] if number in at else 0 for number in range(len(fields))]
        vtable = struct.pack(f"<{2 + len(places)}H", 4 + 2 * len(places), here - start, *places)
        known = self._tables.setdefault(vtable, here + len(vtable))
        self._push(struct.pack("<i", known - here))
        if known == here + len(vtable):
            self._push(vtable)
        return here

    def finish(self, root: int, identifier: bytes) -> None:
        """What stands at the beginning."""
        self._pad(4 + len(identifier), self._alignment)
        self._push(identifier)
        self._push(self._offset(root))

    def plan(self) -> OnnxAdapterPlan:
        """The finished file."""
        marks = [0, *(pieces for _, _, _, pieces in self._arrays), len(self._pieces)]
        known = [b"".join(reversed(self._pieces[low:high])) for low, high in pairwise(marks)]
        end, *between, header = known
        names = [name for name, *_ in self._arrays]
        ranges = {name: (self.size - size - nbytes, nbytes) for name, size, nbytes, _ in reversed(self._arrays)}
        gaps = dict(zip(reversed(names), [b"", *reversed(between)], strict=True))
        return OnnxAdapterPlan(header, ranges, gaps, end, self.size)

    def _push(self, data: bytes) -> None:
        self._pieces.append(data)
        self.size += len(data)

    def _pad(self, nbytes: int, alignment: int) -> None:
        """Zeros, so that what begins `nbytes` further on lies at a multiple of `alignment`."""
        if not nbytes:
            return  # flatbuffers aligns nothing for what is empty
        self._alignment = max(self._alignment, alignment)
        if missing := -(self.size + nbytes) % alignment:
            self._push(bytes(missing))

    def _length(self, count: int) -> int:
        self._push(struct.pack("<I", count))
        return self.size

    def _offset(self, target: int) -> bytes:
        """From where the next 32 bits will lie."""
        return struct.pack("<I", self.size - target + 4)
